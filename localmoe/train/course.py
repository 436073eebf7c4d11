"""A training from outside: the job, its batches and rates step by step, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localmoe.config import TrainConfig
from localmoe.errors import LocalMoEError
from localmoe.lora import Adapter
from localmoe.packing import Passage

ORDER = 3
"""Part of a build's key: one more whenever equal inputs train to other bytes."""

Progress = Callable[[int], None]
"""Called after every step with the number of label tokens it used."""


class DivergedError(LocalMoEError):
    """Loss or weights stopped being finite."""


@dataclass(frozen=True)
class Job:
    """One adapter to train; the arguments of `train`, which says what they mean."""

    passages: Sequence[Passage]
    start: Adapter
    config: TrainConfig
    learning_rate: float
    seed: int
    tokens: int | None = None
    floor: float = 0.0
    read: Sequence[Passage] = ()


@dataclass(frozen=True)
class Trained:
    """An adapter and how it came about; `tokens` are label tokens, losses are nats a token."""

    adapter: Adapter
    tokens: int
    steps: int
    first_loss: float
    last_loss: float


def trained(adapter: Adapter, tokens: int, losses: Sequence[float]) -> Trained:
    """An adapter after one step for every loss; the first and the last tenth of the losses are averaged."""
    window = max(1, len(losses) // 10)
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    return Trained(adapter, tokens, len(losses), first, last)


def schedule(step: int, steps: int, warmup: float, floor: float = 0.0) -> float:
    """Share of the peak rate at `step` of `steps`: rises linearly over the warm-up, then falls linearly to `floor`."""
    rise = warmup * steps
    left = min((steps - step) / max(steps - rise, 1.0), 1.0)
    return min((step + 1) / max(rise, 1.0), floor + (1.0 - floor) * left)


def batches_of(
    passages: Sequence[Passage], config: TrainConfig, seed: int, tokens: int | None, read: Sequence[Passage] = ()
) -> list[list[Passage]]:
    """Batches of so many label tokens at least (none = once around), shuffled anew each time around.

    Those that were `read` before come after the others the first time around. Passages without a label are left out,
    since they teach nothing. Raises LocalMoEError if no other is there.
    """
    new, old = ([passage for passage in part if passage.predicted > 0] for part in (passages, read))
    useful = new + old
    if not useful:
        raise LocalMoEError("no passage has a token to learn from")
    left = sum(passage.predicted for passage in useful) if tokens is None else max(1, tokens)
    shuffle = random.Random(seed)  # noqa: S311 - order, not secrets
    order = shuffle.sample(new, len(new)) + shuffle.sample(old, len(old))
    batches = []
    while left > 0:
        for first in range(0, len(order), config.batch):
            if left > 0:
                batches.append(order[first : first + config.batch])
                left -= sum(passage.predicted for passage in batches[-1])
        order = shuffle.sample(useful, len(useful))
    return batches
