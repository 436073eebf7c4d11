"""Calibration: how fast this machine runs a base, and factors beside it, measured in a few seconds and remembered."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from localmoe.identity import architecture
from localmoe.lora import LowRank
from localmoe.models import context_length
from localmoe.runtime.execution.beside import Beside
from localmoe.runtime.execution.choice import Choice, Planner, Work
from localmoe.runtime.execution.dense import DenseBuffer
from localmoe.runtime.execution.executor import Executor, Loaded
from localmoe.runtime.execution.layout import Layout
from localmoe.runtime.execution.packed import moved, pack
from localmoe.runtime.execution.workspace import Active
from localmoe.runtime.planner import (
    CalibratedPlanner,
    Point,
    calibration_key,
    fit,
    recall_calibration,
    remember_calibration,
)

RANKS = (32, 256)
MERGED, MERGED_BYTES = 512, 2**30
"""A merge is measured at this rank too, unless its factors take more memory: past some rank products bound it."""
OF_ONE = 64
"""Rank of a made-up expert, at most."""
PROMPTS = (8, 128)
SLOW_PROMPTS = (8, 32)
"""For a base that takes more than `SLOW` seconds for the shortest prompt."""
SLOW = 0.25
ROWS = (1, 8)
REPEATS = 3

ENOUGH = 4.0
"""Seconds after which every point is measured only once more, and without a first time that does not count."""


def planner(executor: Executor, anew: bool = False) -> CalibratedPlanner:
    """A planner for the executor's base on this machine: remembered, or (`anew`: always) calibrated and remembered."""
    key = _key(executor)
    found = None if anew else recall_calibration(key)
    if found is None:
        found = fit(list(measure(executor)))
        remember_calibration(key, found)
    return CalibratedPlanner(found)


def known(executor: Executor) -> bool:
    """Whether this machine was calibrated for the executor's base before."""
    return recall_calibration(_key(executor)) is not None


def _key(executor: Executor) -> str:
    model = executor.model
    return calibration_key(architecture(model), model.dtype, torch.device(model.device), executor.kinds)


def on_demand(executor: Executor) -> Planner:
    """The same as `planner`, which is made when something is to be chosen for the first time."""
    made: list[CalibratedPlanner] = []

    def choose(work: Work) -> Choice:
        if not made:
            made.append(planner(executor))
        return made[0](work)

    return choose


@torch.inference_mode()
def measure(executor: Executor) -> Iterator[Point]:
    """Times of all phases with made-up experts, medians of a few; the executor's own buffers are not touched."""
    model, layout = executor.model, executor.layout
    clock = _Clock(str(model.device))
    plain = Loaded((), None, None, None)
    with executor.attached(plain, "stacked"):
        slow = clock.seconds(partial(_forward, model, 1, PROMPTS[0])) > SLOW
        prompts = [min(tokens, context_length(model) // 2) for tokens in (SLOW_PROMPTS if slow else PROMPTS)]
        for tokens in prompts:
            yield Point("base prefill", tokens, 0, 0, clock.seconds(partial(_forward, model, 1, tokens)))
        for rows in ROWS:
            yield Point("base step", rows, 0, 0, clock.steps(model, rows))
        for rank in RANKS:
            yield from _with_factors(model, layout, rank, prompts, clock, executor.plain)
        values = sum(target.d_in + target.d_out for target in layout.targets)
        if executor.plain and MERGED * values * layout.dtype.itemsize <= MERGED_BYTES:
            yield _write(layout, _made_up(layout, MERGED), MERGED, clock)


def _with_factors(
    model: Any, layout: Layout, rank: int, prompts: list[int], clock: _Clock, plain: bool
) -> Iterator[Point]:
    active, beside = _made_up(layout, rank), Beside(layout)
    for tokens in prompts:
        yield Point("beside prefill", tokens, rank, rank, clock.seconds(_gathered(model, beside, active, tokens)))
    for rows in ROWS:
        with beside.attached(active, stay=True):
            yield Point("beside step", rows, rank, rank, clock.steps(model, rows))
    if plain:
        yield _write(layout, active, rank, clock)


def _write(layout: Layout, active: Active, rank: int, clock: _Clock) -> Point:
    buffer = DenseBuffer(layout)
    return Point("write", 0, rank, rank, clock.seconds(lambda: buffer.write(active)))


def _gathered(model: Any, beside: Beside, active: Active, tokens: int) -> Callable[[], Any]:
    def work() -> None:
        with beside.attached(active, stay=False):
            _forward(model, 1, tokens)

    return work


def _made_up(layout: Layout, rank: int) -> Active:
    """Experts of `rank` in all, none above `OF_ONE`, whose factors are small numbers, each in memory of its own."""
    count = -(-rank // OF_ONE)
    one = rank // count
    adapter = {
        target.name: LowRank(
            torch.full((one, target.d_in), 1e-3), torch.full((target.d_out, one), 1e-3), torch.ones(one)
        )
        for target in layout.targets
    }
    return Active(tuple(moved(pack(adapter, layout), layout) for _ in range(count)), torch.ones(1, count))


def _forward(model: Any, rows: int, tokens: int, cache: Any = None) -> Any:
    ids = torch.ones(rows, tokens, dtype=torch.long, device=model.device)
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class _Clock:
    """Medians of a few times, of fewer once much time has gone by."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begun = time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes, after one time that does not count, while there is time for that."""
        hurried = time.perf_counter() - self._begun > ENOUGH
        if not hurried:
            work()
        found = []
        for _ in range(1 if hurried else REPEATS):
            begun = self._now()
            work()
            found.append(self._now() - begun)
        return statistics.median(found)

    def steps(self, model: Any, rows: int) -> float:
        """How long one more token a row takes."""
        cache = _forward(model, rows, 8).past_key_values
        return self.seconds(lambda: _forward(model, rows, 1, cache))

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
