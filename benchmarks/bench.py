"""The bench: what the parts of a benchmark share, rounds in which all sides take turns, and what follows of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import material

from localmoe.lora import weight_of
from localmoe.models import load_tokenizer, target_linears

OURS, OWN_BASE = "localmoe", "base by our engine"


class Bench:
    """What all parts share: arguments, base, tokenizer, prompts, and a folder for banks."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.device = arguments, folder, arguments.device
        material.note(f"loading {arguments.shape or arguments.base}")
        self.model = material.load_base(arguments.base, arguments.shape, self.device)
        self.tokenizer = load_tokenizer(arguments.base)
        self.texts = material.prompts(self.tokenizer, arguments.prompt_tokens)
        self.shapes = [tuple(weight_of(module).shape) for module in target_linears(self.model).values()]
        self._experts: dict[str, material.Experts] = {}
        self.speeds = machine.speeds(self.device, self.model.dtype)

    def calibrate(self) -> Any:
        """A calibration of the base, made anew and remembered."""
        from localmoe.config import ExecutionConfig
        from localmoe.runtime.calibration import planner
        from localmoe.runtime.execution import Executor

        return planner(Executor(self.model, None, ExecutionConfig()), anew=True).calibration

    @property
    def shared(self) -> bool:
        """Whether experts share A where nothing else is asked for (`--shared`)."""
        return getattr(self.arguments, "shared", False)

    def experts(self, rank: int, count: int, shared: bool | None = None) -> material.Experts:
        """Random experts, written when first asked for."""
        shared = self.shared if shared is None else shared
        key = f"{'shared' if shared else 'own'}-{rank}-{count}"
        if key not in self._experts:
            base = self.arguments.base
            base = Path(base).name if Path(base).is_dir() else base  # a bank names no folders
            self._experts[key] = material.write_experts(self.folder / key, self.model, base, count, rank, shared)
        return self._experts[key]


def in_turn(
    sides: Mapping[str, Callable[[str, Any], Any]],
    texts: Iterator[str],
    queries: Sequence[Any],
    before: Callable[[Any], None] | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Every side answers every query, a round each, the order turning from round to round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    names = list(sides)
    for number, query in enumerate(queries):
        text = next(texts)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if before is not None:
                before(query)
            found[name].append(sides[name](text, query).data())
    return found


def stages(rounds: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Side → median of every stage, of what it adds to the base's first token, and to its whole call.

    Where rounds have the base by our engine too, what LocalMoE adds is over the faster of both bases, round by round:
    an engine that runs the base faster than transformers does must not hide what a mix costs.
    """
    found = {}
    for side, times in rounds.items():
        row = {stage: statistics.median(t[stage] for t in times) for stage in times[0]}
        own = [rounds[OWN_BASE]] if side.startswith(OURS) and OWN_BASE in rounds else []
        bases = [rounds["base"], *own]
        for added, whole in (("added_first_token", "first_token"), ("added_total", "total")):
            least = [min(base[whole] for base in of_round) for of_round in zip(*bases, strict=True)]
            row[added] = statistics.median(t[whole] - base for t, base in zip(times, least, strict=True))
        found[side] = row
    return found


def ratio(
    medians: Mapping[str, dict[str, float]], ours: str = "localmoe", key: str = "added_first_token"
) -> float | None:
    """`ttmerge`'s added time over ours; None where ours adds nothing that can be measured."""
    mine = medians[ours][key]
    return medians["ttmerge"][key] / mine if mine > 0 else None
