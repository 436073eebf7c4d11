"""Explanations: the ways to execute a prompt's mix with their predicted and measured cost, as a table and as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localmoe.quantities import duration_text
from localmoe.terminal.screen import remarks, table

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.config import GenerateConfig
    from localmoe.routing import Mix
    from localmoe.runtime.engine import Engine
    from localmoe.runtime.execution.choice import Choice
    from localmoe.runtime.explanation import Explanation


def calibrate(engine: Engine) -> None:
    """Measures the machine where an engine is new to it and has a choice to make; says so."""
    from localmoe.runtime import calibration

    executor = engine.executor
    if executor.config.execution == "auto" and executor.plain and not calibration.known(executor):
        with remarks().status("measuring this machine, once, to know the fastest way to run a mix"):
            executor.planner = calibration.planner(executor)  # where nothing can be remembered, for this engine


def explain_data(engine: Engine, prompt: str, config: GenerateConfig, mix: Mix) -> dict[str, Any]:
    """Explains one prompt with its mix, as plain data."""
    from localmoe.runtime.explanation import explain

    return explanation_data(explain(engine, prompt, config, mix))


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain data; seconds from the routed prompt to the last token."""
    from localmoe.runtime.execution.kernels import NAMES

    return {
        "prompt_tokens": explanation.work.prompt_tokens,
        "expected_tokens": explanation.work.new_tokens,
        "max_new_tokens": explanation.most,
        "experts": explanation.work.experts,
        "rank": explanation.work.rank,
        "kernels": NAMES[explanation.kernels],
        "chosen": _data(explanation.chosen),
        "costs": [
            {
                **_data(cost.choice),
                "predicted": cost.predicted,
                "measured": cost.measured,
                "new_tokens": cost.new_tokens,
            }
            for cost in explanation.costs
        ],
    }


def show_explanation(console: Console, data: dict[str, Any]) -> None:
    """One row for every choice; the chosen one is marked."""
    rows = table("prompt", "answer", "new tokens", "predicted", "measured", "", right=("new tokens",))
    for cost in data["costs"]:
        chosen = all(cost[part] == data["chosen"][part] for part in ("prefill", "decode"))
        times = duration_text(cost["predicted"]), duration_text(cost["measured"])
        rows.add_row(cost["prefill"], cost["decode"], str(cost["new_tokens"]), *times, "chosen" if chosen else "")
    console.print()
    console.print(rows)
    work = f"{data['prompt_tokens']:,} tokens in the prompt, {data['expected_tokens']:,} new ones expected "
    work += f"({data['max_new_tokens']:,} at most), {data['experts']} experts of {data['rank']:g} ranks in all"
    work += f"; kernels: {data['kernels']}"
    console.print(work, style="dim")


def _data(choice: Choice) -> dict[str, str]:
    return {"prefill": choice.prefill, "decode": choice.decode}
