"""The planner's regret: what its choices cost over the best ones, in 24 settings that it was not calibrated on.

    python benchmarks/planner.py [--rounds 3] [--settings 24] [--experts 32] [--base MODEL | --shape llama-3.2-1b]
                                 [--device cuda] [--json PATH]

A setting is a batch of prompts: N experts each, their rank r, tokens of the prompts, new tokens, rows, and whether the
rows have one mix or each its own. Every choice there is answers it, in turn: the prompt and the new tokens stacked or
dense, several mixes grouped or (which the planner never chooses) one after another. The planner was calibrated
before, on work of its own. The regret of a setting is the time of its choice over that of the fastest, less 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench import Bench

SERIAL = "one after another"


@dataclass(frozen=True)
class Setting:
    """One batch to answer."""

    active: int
    rank: int
    prompt: int
    new_tokens: int
    rows: int
    mixes: int

    @property
    def name(self) -> str:
        """E.g. `N=3 r=16, 20 + 32 tokens, 8 rows of 8 mixes`."""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows of {self.mixes} mix{'es' * (self.mixes > 1)}"
        return f"N={self.active} r={self.rank}, {self.prompt} + {self.new_tokens} tokens, {rows}"


def settings(count: int, ranks: list[int], seed: int = 0) -> list[Setting]:
    """`count` different settings, drawn from a grid; two thirds have one row, the others one mix or many."""
    source = random.Random(seed)
    single = [Setting(*v, 1, 1) for v in itertools.product((1, 3, 10, 20), ranks, (12, 60, 300), (1, 8, 32, 96))]
    grid = itertools.product((1, 3, 6), ranks, (12, 60), (1, 8, 32), (2, 5, 8))
    several = [Setting(*v[:4], v[4], mixes) for v in grid for mixes in (1, v[4])]
    return source.sample(single, count - count // 3) + source.sample(several, count // 3)


def regrets(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean and largest regret over settings, that of the summed times, and how often the best was chosen."""
    each = [row["regret"] for row in rows.values()]
    chosen = sum(row["measured"][row["chosen"]] for row in rows.values())
    best = sum(min(row["measured"].values()) for row in rows.values())
    return {
        "mean": statistics.mean(each),
        "largest": max(each),
        "of_the_sum": chosen / best - 1,
        "best_chosen": sum(regret == 0 for regret in each) / len(each),
    }


def always(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Choice → mean regret of always making it, over the settings of one mix, where all can be made."""
    single = [row["measured"] for row in rows.values() if SERIAL not in row["measured"]]
    return {
        name: statistics.mean(measured[name] / min(measured.values()) - 1 for measured in single)
        for name in (single[0] if single else ())
    }


def row(measured: dict[str, list[float]], chosen: str, predicted: dict[str, float]) -> dict[str, Any]:
    """What is kept of one setting: medians, and the regret of the choice."""
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    regret = medians[chosen] / min(medians.values()) - 1
    return {"chosen": chosen, "regret": regret, "measured": medians, "predicted": predicted, "seconds": measured}


def measure(bench: Bench) -> dict[str, dict[str, Any]]:
    """Setting → times of every choice, and what the planner chose and predicted."""
    from material import mixed_queries, prompts
    from sides import Ours

    arguments, found = bench.arguments, {}
    wanted = settings(arguments.settings, arguments.ranks)
    for rank in arguments.ranks:
        ours = Ours(bench.model, bench.tokenizer, bench.experts(rank, arguments.experts), None, "auto")
        for setting in (setting for setting in wanted if setting.rank == rank):
            texts = prompts(bench.tokenizer, setting.prompt)
            measured: dict[str, list[float]] = {}
            plan: Any = None
            for number in range(arguments.rounds + 1):
                queries = mixed_queries(arguments.experts, setting.active, setting.mixes, seed=number)
                mixes = [ours.select(queries[row % setting.mixes]) for row in range(setting.rows)]
                asked = [next(texts) for _ in mixes]
                plan = ours.plan(asked, mixes, setting.new_tokens)
                for name, work in _turned(_choices(ours, plan, asked, mixes, setting.new_tokens), number):
                    begun = time.perf_counter()
                    work()
                    spent = time.perf_counter() - begun
                    if number > 0:
                        measured.setdefault(name, []).append(spent)
            predicted = {_name(choice): seconds for choice, seconds in plan.predicted.items()}
            found[setting.name] = row(measured, _name(plan.choice), predicted) | {"setting": asdict(setting)}
            _show(setting, found[setting.name])
        del ours
    return found


def _choices(ours: Any, plan: Any, texts: list[str], mixes: list[Any], tokens: int) -> dict[str, Callable[[], Any]]:
    def all_at_once(choice: Any) -> Callable[[], Any]:
        return lambda: ours.answer_batch(texts, mixes, tokens, choice)

    def one_after_another() -> None:
        for text, mix in zip(texts, mixes, strict=True):
            ours.answer_batch([text], [mix], tokens)

    found: dict[str, Callable[[], Any]] = {_name(choice): all_at_once(choice) for choice in plan.predicted}
    return found if len(found) > 1 else found | {SERIAL: one_after_another}


def _turned(choices: dict[str, Callable[[], Any]], number: int) -> list[tuple[str, Callable[[], Any]]]:
    """The choices, another one first every time."""
    pairs = list(choices.items())
    return pairs[number % len(pairs) :] + pairs[: number % len(pairs)]


def _name(choice: Any) -> str:
    return choice.prefill if choice.prefill == choice.decode else f"{choice.prefill}, then {choice.decode}"


def _show(setting: Setting, made: dict[str, Any]) -> None:
    def both(name: str) -> str:
        predicted = made["predicted"].get(name)
        told = "" if predicted is None else f" (predicted {predicted * 1e3:.0f})"
        return f"{name} {made['measured'][name] * 1e3:.0f}{told}"

    times = "; ".join(map(both, made["measured"]))
    print(f"{setting.name}: {times} ms\n    chosen: {made['chosen']}, regret {made['regret']:.1%}", flush=True)


def main() -> None:
    arguments = _arguments()
    import machine
    from bench import Bench

    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        bench = Bench(arguments, Path(folder))
        begun = time.perf_counter()
        calibration = bench.calibrate()
        calibrated = time.perf_counter() - begun
        print(f"calibrated in {calibrated:.1f} s", flush=True)
        found = measure(bench)
    report = {
        "command": " ".join(sys.argv),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "work")},
        "machine": machine.describe(arguments.device),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "calibration_seconds": calibrated,
        "calibration": asdict(calibration),
        "regret": regrets(found),
        "always": always(found),
        "rows": found,
        "seconds": time.perf_counter() - begun,
    }
    print("regret: " + ", ".join(f"{name} {value:.1%}" for name, value in report["regret"].items()))
    print("always one choice: " + ", ".join(f"{name} {value:.1%}" for name, value in report["always"].items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="also the tokenizer of a --shape")
    parser.add_argument("--shape", help="random weights of this shape: llama-3.2-1b, tiny")
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--settings", type=int, default=24)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--experts", type=int, default=32, help="K")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=20, help=argparse.SUPPRESS)
    parser.add_argument(
        "--work", type=Path, default=None, help="where banks are written; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


if __name__ == "__main__":
    main()
