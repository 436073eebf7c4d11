"""The one training loop: low-rank factors on packed passages, for trunk, experts and fine-tuning alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from localmoe.config import TrainConfig
from localmoe.lora import Adapter, LowRank, attached, weight_of
from localmoe.models import packed, target_linears
from localmoe.packing import Passage, loss, pack
from localmoe.train.course import DivergedError, Job, Progress, Trained, batches_of, schedule, trained
from localmoe.train.together import captured, places_for, train_together


def fresh_adapter(model: Any, config: TrainConfig, seed: int) -> Adapter:
    """LoRA's start for every target linear: A uniform as PEFT draws it (Kaiming, a = √5), B zero, c = alpha/r."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in target_linears(model).items():
        d_out, d_in = weight_of(module).shape
        A = (torch.rand(config.rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)
        c = torch.full((config.rank,), config.alpha / config.rank)
        adapter[name] = LowRank(A, torch.zeros(d_out, config.rank), c)
    return adapter


def adapter_bytes(model: Any, rank: int) -> int:
    """Bytes of one stored adapter: bf16 factors of every target linear."""
    return sum(2 * rank * sum(weight_of(module).shape) for module in target_linears(model).values())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads, for as long as the context lasts; none = as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count if count is not None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: Any,
    passages: Sequence[Passage],
    start: Adapter,
    config: TrainConfig,
    learning_rate: float,
    seed: int,
    tokens: int | None = None,
    freeze_A: bool = False,
    progress: Progress | None = None,
    floor: float = 0.0,
    read: Sequence[Passage] = (),
) -> Trained:
    """Go on training `start` on `passages`: AdamW, warm-up then linear decay to `floor` · rate, gradients clipped.

    The base is frozen and never written; with `freeze_A` B alone is trained. `tokens`: so many label tokens at least,
    passages in a new order each time around; none = once around. `read`: passages of which `start` has seen already
    what they teach; they come last the first time around. Equal inputs, seed and threads give equal bytes on a CPU.
    On one GPU the steps are captured (`train_together`). Raises DivergedError for a loss or a factor that is not
    finite: as soon as there is one, there after the training.
    """
    if captured(model):
        job = Job(passages, start, config, learning_rate, seed, tokens, floor, read)
        (found,) = train_together(model, [job], 1, freeze_A, progress)
        if isinstance(found, DivergedError):
            raise found
        return found
    batches = batches_of(passages, config, seed, tokens, read)
    with attached(model, start, train_A=not freeze_A, train_B=True) as modules, packed(model):
        factors = [p for module in modules.values() for p in (module.A, module.B) if p.requires_grad]
        losses = descend(model, factors, batches, config, learning_rate, progress, floor)
        adapter = {name: _frozen(module.A, module.B, start[name]) for name, module in modules.items()}
    if not all(bool(u.A.isfinite().all() and u.B.isfinite().all()) for u in adapter.values()):
        raise DivergedError("the factors are not finite after training")
    return trained(adapter, sum(passage.predicted for batch in batches for passage in batch), losses)


def train_all(
    model: Any, jobs: Sequence[Job], freeze_A: bool = False, progress: Progress | None = None
) -> list[Trained | DivergedError]:
    """What `train` makes of every job: on a GPU side by side, as many as fill it, else one after the other."""
    places = places_for(model, jobs)
    if jobs and (places > 1 or captured(model)):
        return train_together(model, jobs, places, freeze_A, progress)
    found: list[Trained | DivergedError] = []
    for job in jobs:
        given = (job.passages, job.start, job.config, job.learning_rate, job.seed, job.tokens)
        try:
            found.append(train(model, *given, freeze_A, progress, job.floor, job.read))
        except DivergedError as error:
            found.append(error)
    return found


def descend(
    model: Any,
    parameters: Sequence[Tensor],
    batches: Sequence[Sequence[Passage]],
    config: TrainConfig,
    learning_rate: float,
    progress: Progress | None = None,
    floor: float = 0.0,
) -> list[float]:
    """One step of AdamW on `parameters` for every batch, as `train` says; the loss of each. The model must be `packed`.

    Raises DivergedError as soon as a loss is not finite, that after the last step too.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, len(batches), config.warmup, floor)
        value = step_once(model, batch, parameters, optimizer, config.clip)
        losses.append(value)
        if progress is not None:
            progress(sum(passage.predicted for passage in batch))
    with torch.no_grad():  # what the last step did, no loss has seen yet
        _finite(loss(model, pack([min(batches[-1], key=len)], model.device)))
    return losses


def step_once(
    model: Any,
    batch: Sequence[Passage],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    clip: float,
) -> float:
    """One step of the optimiser on a packed batch; its loss. The model must be `packed` and hold the parameters."""
    value = _finite(loss(model, pack(batch, model.device)))
    torch.autograd.backward(value, inputs=list(parameters))
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def _finite(value: Tensor) -> Tensor:
    if not bool(value.isfinite()):
        raise DivergedError(f"the loss became {value.item()}")
    return value


def _frozen(A: Tensor, B: Tensor, start: LowRank) -> LowRank:
    """Factors as they are stored, bf16; an A that was not trained stays the very tensor it was."""
    return LowRank(A.detach().bfloat16() if A.requires_grad else start.A, B.detach().bfloat16(), start.c)
