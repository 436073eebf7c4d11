"""Plans: what `localmoe plan` says before a build, as plain data and for people."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from localmoe.quantities import bytes_text, duration_text
from localmoe.terminal.screen import bar, facts, plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.train.plan import Plan, Times

_BINS = 8
_SPLITS = {"train": "to train on", "tune": "to tune on", "test": "held out", "unused": "not used"}


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    from localmoe.train.plan import advice

    data = dataclasses.asdict(plan) | {"experts": len(plan.sizes), "advice": advice(plan)}
    if plan.times is not None:
        data["times"] |= {"total": plan.times.total}
    return data


def show_plan(console: Console, plan: Plan) -> None:
    """A plan at a glance."""
    from localmoe.train.plan import advice

    for note in plan.notes:
        console.print(plain(note))
    console.print()
    splits = table("", "documents", "tokens", right=("documents", "tokens"))
    for name, purpose in _SPLITS.items():
        splits.add_row(purpose, f"{plan.documents.get(name, 0):,}", f"{plan.tokens.get(name, 0):,}")
    console.print(splits)
    console.print()
    _show_clusters(console, plan)
    console.print()
    console.print(
        facts(
            [
                (
                    "disk",
                    f"{bytes_text(plan.bank_bytes)} for the bank, {bytes_text(plan.work_bytes)} more while building",
                ),
                *_memory(plan),
                ("time", "not measured (--no-probe)" if plan.times is None else _time_text(plan.times, plan.recipe)),
                ("worth it?", advice(plan)),
            ]
        )
    )


def _memory(plan: Plan) -> list[tuple[str, str]]:
    if plan.training_bytes == 0:
        return []
    return [("memory", f"{bytes_text(plan.training_bytes)} for the experts in training, the base aside")]


def histogram(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(from, to, clusters) for at most `_BINS` ranges of equal width from the smallest to the largest size."""
    low, high = min(sizes), max(sizes)
    bins = max(1, min(_BINS, len(sizes) // 2))
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * -(-(high - low + 1) // width)
    for size in sizes:
        counts[(size - low) // width] += 1
    return [(low + place * width, low + (place + 1) * width - 1, count) for place, count in enumerate(counts)]


def _show_clusters(console: Console, plan: Plan) -> None:
    of_all = plan.embedded == plan.documents.get("train")
    seen = "all train documents" if of_all else f"a sample of {plan.embedded:,} train documents"
    console.print(f"[bold]{len(plan.sizes)} experts[/bold], clusters estimated from {seen}")
    if len(plan.sizes) < plan.wanted:
        console.print(
            f"fewer than the {plan.wanted} wanted: smaller clusters would have too few tokens (cluster.min_tokens)",
            style="yellow",
        )
    most = max(count for _, _, count in histogram(plan.sizes))
    rows = table("train tokens", "experts", "", right=("train tokens", "experts"))
    for low, high, count in histogram(plan.sizes):
        rows.add_row(f"{low:,} to {high:,}" if high > low else f"{low:,}", f"{count}", bar(count / most))
    console.print(rows)


def _time_text(times: Times, recipe: str) -> str:
    stages = ["embedding", "rates", "trunk with experts" if recipe == "joint" else "trunk", "experts", "checks"]
    seconds = [times.embed, times.rates, times.trunk, times.experts, times.checks]
    parts = ", ".join(f"{name} {duration_text(each)}" for name, each in zip(stages, seconds, strict=True) if each)
    speeds = f"{times.tokens_per_second:,.0f} tokens/s"
    if times.expert_tokens_per_second != times.tokens_per_second:
        speeds += f", of experts {times.expert_tokens_per_second:,.0f}"
    return f"about {duration_text(times.total)}: {parts} ({speeds}, measured now)"
