"""Trainings side by side, one forward pass for all: one after the other, short passages fill no GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmoe.config import TrainConfig
from localmoe.lora import Adapter
from localmoe.models import packed
from localmoe.packing import Passage
from localmoe.train.course import DivergedError, Job, Progress, Trained, batches_of, schedule, trained
from localmoe.train.places import BETAS, PARAMETER_BYTES, Batch, Hyper, Places

TOKENS_AT_ONCE = 32_768
"""Tokens of a step, of all places together, at most; a GPU gains little from more."""
MEMORY_SHARE = 0.3
"""Share of a GPU's free memory that factors may take, and as much again what the way back needs of every token."""
_WIDTHS = 40
"""Bytes that a token keeps in every layer, in hidden widths: about 34 in 16 bits, and the factors' products."""


class _Course:
    """A job on its way: its batches, and the losses [places] of the steps that it was part of."""

    def __init__(self, number: int, job: Job) -> None:
        self.number, self.job = number, job
        self.batches = batches_of(job.passages, job.config, job.seed, job.tokens, job.read)
        self.losses: list[Tensor] = []

    @property
    def rate(self) -> float:
        job = self.job
        return job.learning_rate * schedule(len(self.losses), len(self.batches), job.config.warmup, job.floor)

    @property
    def done(self) -> bool:
        return len(self.losses) == len(self.batches)


def captured(model: Any) -> bool:
    """Whether trainings run in places and their steps as CUDA graphs: if the whole base is on one GPU."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


def places_for(model: Any, jobs: Sequence[Job]) -> int:
    """How many of these trainings are worth running at once: one on a CPU or on several GPUs, else what fills it."""
    if not captured(model) or not jobs:
        return 1
    room = free(model.device)
    parameters = sum(update.A.numel() + update.B.numel() for update in jobs[0].start.values())
    fit = int(MEMORY_SHARE * room / (PARAMETER_BYTES * parameters))
    shape = model.config.get_text_config()
    most = min(TOKENS_AT_ONCE, int(MEMORY_SHARE * room / (_WIDTHS * shape.hidden_size * shape.num_hidden_layers)))
    longest = max(len(passage) for job in jobs for passage in (*job.passages, *job.read))
    tokens = longest * max(job.config.batch for job in jobs)
    return max(1, min(fit, most // tokens, len(jobs)))


def free(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that torch holds unused."""
    left, _ = torch.cuda.mem_get_info(device)
    return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def train_together(
    model: Any,
    jobs: Sequence[Job],
    places: int,
    freeze_A: bool = False,
    progress: Progress | None = None,
) -> list[Trained | DivergedError]:
    """Train every job as `train` does, `places` of them at once; a place that is done takes the next job.

    The same steps as each would make alone, but for the order of additions. All starts must have the same modules,
    rank and scale. progress: called after every step with its label tokens, of all places together.
    """
    courses = [_Course(number, job) for number, job in enumerate(jobs)]
    waiting = sorted(courses, key=lambda course: len(course.batches))  # taken from the end: the longest start first
    rows = max(course.job.config.batch for course in courses)
    length = max(len(passage) for course in courses for batch in course.batches for passage in batch)
    room = Places(model, jobs[0].start, min(places, len(jobs)), freeze_A)
    held: list[_Course | None] = [None] * room.count
    results: dict[int, Trained | DivergedError] = {}
    with on_device(model), packed(model), room.attached():
        while True:
            for place, course in enumerate(held):
                if course is None and waiting:
                    held[place] = now = waiting.pop()
                    room.load(place, now.job.start)
            if not any(held):
                break
            batches = [[] if course is None else course.batches[len(course.losses)] for course in held]
            steps = [None if it is None else (it.rate, it.job.config, len(it.losses) + 1) for it in held]
            losses = room.step(batch_of(batches, rows, length, model.device), _hyper(steps, model.device))
            seen = 0
            for place, course in enumerate(held):
                if course is None:
                    continue
                seen += sum(passage.predicted for passage in course.batches[len(course.losses)])
                course.losses.append(losses)
                if course.done:
                    held[place] = None
                    results[course.number] = _result(room, place, course)
            if progress is not None:
                progress(seen)
    return [results[number] for number in range(len(jobs))]


def step_through(
    room: Places, start: Adapter, passages: Sequence[Passage], config: TrainConfig, rate: float
) -> Adapter:
    """`start` after one step of AdamW at a constant rate on each passage in turn, in the first place of `room`.

    The other places stay as they are. With the same `room` again the steps that it has captured are used again.
    Raises DivergedError for factors that are not finite.
    """
    if not passages:
        return start
    room.load(0, start)
    rest, device = room.count - 1, room.model.device
    length = max(len(passage) for passage in passages)
    with on_device(room.model), packed(room.model), room.attached():
        for step, passage in enumerate(passages, 1):
            batch = batch_of([[passage], *([[]] * rest)], 1, length, device)
            hyper = _hyper([(rate, config, step)] + [None] * rest, device)
            room.step(batch, hyper)
    if not room.finite(0):
        raise DivergedError("the factors are not finite after training")
    return room.adapter(0, start)


def on_device(model: Any) -> AbstractContextManager[Any]:
    """A model's GPU as the one that steps are captured on; of one on a CPU nothing."""
    return torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()


def batch_of(batches: Sequence[Sequence[Passage]], rows: int, length: int, device: torch.device) -> Batch:
    """A batch for every place, filled up to `rows` passages of one, two, three or four quarters of `length`."""
    quarter = -(-length // 4)
    longest = max(len(passage) for batch in batches for passage in batch)
    shape = (len(batches), rows, min(length, -(-longest // quarter) * quarter))
    ids, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for place, batch in enumerate(batches):
        share = 1.0 / max(1, sum(passage.predicted for passage in batch))
        for row, passage in enumerate(batch):
            tokens, last = passage.tokens.numpy(), len(passage) - 1
            ids[place, row, : last + 1] = tokens
            targets[place, row, :last] = tokens[1:]
            weights[place, row, :last] = passage.labels[1:].numpy() * share
    flat = (torch.from_numpy(values.reshape(-1, shape[-1])) for values in (ids, targets, weights))
    return Batch(*(_sent(values, device) for values in flat))


def _hyper(steps: Sequence[tuple[float, TrainConfig, int] | None], device: torch.device) -> Hyper:
    """What every place goes by: rate, settings and the number of the step, from 1 on; none = it stays as it is."""
    told = [(0.0, 0.0, 1.0, 1) if one is None else (one[0], one[1].weight_decay, one[1].clip, one[2]) for one in steps]
    rates, decays, clips, numbers = zip(*told, strict=True)
    corrections = ([1 - beta**number for number in numbers] for beta in BETAS)
    return Hyper(*(_sent(torch.tensor(values), device) for values in (rates, decays, clips, *corrections)))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _result(room: Places, place: int, course: _Course) -> Trained | DivergedError:
    losses = torch.stack(course.losses)[:, place].tolist()
    bad = next((loss for loss in losses if not math.isfinite(loss)), None)
    if bad is not None:
        return DivergedError(f"the loss became {bad}")
    if not room.finite(place):
        return DivergedError("the factors are not finite after training")
    last = min(course.batches[-1], key=len)  # what the last step did, no loss has seen yet
    alone = [[last] if other == place else [] for other in range(room.count)]
    after = float(room.losses(batch_of(alone, 1, len(last), room.model.device))[place])
    if not math.isfinite(after):
        return DivergedError(f"the loss became {after}")
    tokens = sum(passage.predicted for batch in course.batches for passage in batch)
    return trained(room.adapter(place, course.job.start), tokens, losses)
