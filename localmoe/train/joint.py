"""Joint training: a trunk and its experts in one course, every document by the mix of experts that it would get.

All experts share A. A document with weights w has B = B₀ + Σ_k w_k b_k: A and B₀ are taught by every document, b_k by
those that expert k has a weight for. So a token trained on once serves both, and what is merged for a prompt is what
was trained: Σ w_k (B₀ + b_k) A, since weights sum to 1. The trunk is the mean of the documents' mixes: b_k also hold
what their documents have in common, so that (A, B₀) alone would be no model of anything.

With g = dloss/dB of a document and v̂ the second moment that AdamW keeps of B₀, a step of rate η takes ρ η w_k g / √v̂
from b_k, no element of g / √v̂ beyond 1: what one document teaches moves another's mix by about 1 + ρ Σ_k w_k w'_k of
what AdamW moves B₀. With moments of their own experts would take steps of one size, whether their documents agree or
not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from localmoe.config import TrainConfig
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.models import packed, target_linears
from localmoe.packing import Passage
from localmoe.train.course import DivergedError, Progress, Trained, batches_of, schedule, trained
from localmoe.train.places import Places
from localmoe.train.together import batch_of, captured, free, on_device

SAVE_EVERY = 300.0
"""Seconds between two states that an interrupted training goes on from, at least, ..."""
SAVE_SHARE = 0.05
"""... and so that writing them takes no larger share of the time."""
STATE_BYTES = 4
"""Memory of a parameter of b_k, fp32."""
_DEVICE_SHARE = 0.5  # of a GPU's free memory that all b_k may take; else they stay in main memory

Weights = Sequence[tuple[int, float]]
"""A mix in training: numbers of experts with their weights, which sum to 1."""
State = Mapping[str, Any]
"""What an interrupted training goes on from: plain values and tensors."""


def state_bytes(model: Any, rank: int, experts: int) -> int:
    """Memory that the b_k of so many experts take in training, and as much on disk where the state is kept."""
    return STATE_BYTES * experts * rank * sum(weight_of(module).shape[0] for module in target_linears(model).values())


@dataclass(frozen=True)
class JointJob:
    """A trunk and `count` experts to train; `rate` is the trunk's peak, `expert_rate` a multiple of it."""

    passages: Sequence[tuple[Passage, Weights]]
    count: int
    start: Adapter
    config: TrainConfig
    rate: float
    expert_rate: float
    seed: int
    tokens: int
    """Label tokens at least; all passages in a new order each time around."""


@dataclass(frozen=True)
class JointTrained:
    """The trunk and every expert, complete in itself, with the trunk's A; losses are those of the steps it was part of.

    An expert's tokens are each document's times its weight there, so that they sum to the trunk's.
    """

    trunk: Trained
    experts: tuple[Trained, ...]


def train_jointly(
    model: Any,
    job: JointJob,
    progress: Progress | None = None,
    keep: Callable[[State], None] | None = None,
    kept: State | None = None,
) -> JointTrained:
    """Train a trunk by AdamW and its experts beside it: warm-up then linear decay to zero.

    Gradients are clipped, the experts' by the trunk's factor. b_k starts at zero, takes a step only where one of the
    step's documents has a weight for it, and has neither momentum nor decay. The base is frozen.
    `keep` is handed the state now and then, and at the end; `kept` is one to go on from. Equal inputs, seed and threads
    give equal bytes on a CPU, interrupted or not. Raises DivergedError for a loss or a factor that is not finite.
    """
    course = _Course(model, job)
    if kept is not None:
        course.restore(kept)
    clock = _Clock()
    with on_device(model), packed(model), course.room.attached():
        while not course.done:
            seen = course.step()
            if progress is not None:
                progress(seen)
            if keep is not None and (course.done or clock.due):
                with clock.writing():
                    keep(course.state())
        return course.result()


class _Clock:
    """When the state is to be written again."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SAVE_EVERY

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def writing(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + max(SAVE_EVERY, (ended - started) / SAVE_SHARE)


class _Learner:
    """Numbers that are trained [parameters], fp32, with an AdamW."""

    def __init__(self, start: Tensor, decay: float) -> None:
        self.values = nn.Parameter(start.clone())
        self._optimizer = torch.optim.AdamW([self.values], weight_decay=decay, fused=True)

    def step(self, gradient: Tensor, rate: float, clip: float) -> float:
        """One step, the gradient clipped to the norm `clip`; what it was multiplied by."""
        self.values.grad = gradient
        norm = float(torch.nn.utils.clip_grad_norm_([self.values], clip))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.values.grad = None
        return min(1.0, clip / (norm + 1e-6))  # as torch has it

    def spread(self, first: int) -> Tensor:
        """√v̂ + ε of the parameters from `first` on, as the last step had it."""
        (group,), moments = self._optimizer.param_groups, self._optimizer.state[self.values]
        seen = 1.0 - group["betas"][1] ** float(moments["step"])
        spread: Tensor = (moments["exp_avg_sq"][first:] / seen).sqrt_().add_(group["eps"])
        return spread

    def state(self) -> State:
        return {"values": self.values.detach(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: State) -> None:
        with torch.no_grad():
            self.values.copy_(state["values"])
        self._optimizer.load_state_dict(dict(state["optimizer"]))


class _Course:
    """A joint training on its way."""

    def __init__(self, model: Any, job: JointJob) -> None:
        self.model, self.job = model, job
        self._weights = {id(passage): weights for passage, weights in job.passages}
        self.batches = batches_of([passage for passage, _ in job.passages], job.config, job.seed, job.tokens)
        self._length = max(len(passage) for batch in self.batches for passage in batch)
        self.room = Places(model, job.start, job.config.batch, gradients_only=True)
        begin, decay = self.room.flat(job.start), job.config.weight_decay
        own = torch.zeros_like(begin[self.room.middle :])
        own = own.to(_home(model, job.count * own.numel() * STATE_BYTES))
        self._trunk = _Learner(begin, decay)
        self._experts = [own.clone() for _ in range(job.count)]
        self._losses: list[float] = []
        self._own: list[list[float]] = [[] for _ in range(job.count)]
        self._tokens = [0.0] * job.count

    @property
    def done(self) -> bool:
        return len(self._losses) == len(self.batches)

    def step(self) -> int:
        """One step of the trunk and of every expert that has a weight in the batch; the label tokens of the batch."""
        job, batch = self.job, self.batches[len(self._losses)]
        for place, passage in enumerate(batch):
            self.room.put(place, self._merged(self._weights[id(passage)]))
        value = self._learn(batch)
        if not math.isfinite(value):
            raise DivergedError(f"the loss became {value}")
        now = job.rate * schedule(len(self._losses), len(self.batches), job.config.warmup)
        gradients = [self.room.gradient(place) for place in range(len(batch))]
        clipped = self._trunk.step(sum(gradients[1:], gradients[0].clone()), now, job.config.clip)
        spread = self._trunk.spread(self.room.middle)
        for passage, gradient in zip(batch, gradients, strict=True):
            own = gradient[self.room.middle :].mul_(clipped)
            direction = own.div_(torch.maximum(spread, own.abs())).to(self._experts[0].device)
            for k, weight in self._weights[id(passage)]:
                self._experts[k].add_(direction, alpha=-now * job.expert_rate * weight)
                self._tokens[k] += weight * passage.predicted
        for k in {k for passage in batch for k, _ in self._weights[id(passage)]}:
            self._own[k].append(value)
        self._losses.append(value)
        return sum(passage.predicted for passage in batch)

    def _learn(self, batch: Sequence[Passage]) -> float:
        """The mean loss over the tokens of a passage a place; the gradients of that mean lie in `room`."""
        if not captured(self.model):
            return float(self.room.learn_packed(batch))
        places = [[passage] for passage in batch] + [[]] * (self.room.count - len(batch))
        total = sum(passage.predicted for passage in batch)
        shares = [sum(passage.predicted for passage in place) / total for place in places]
        filled = batch_of(places, 1, self._length, self.model.device)
        weights = filled.weights * torch.tensor(shares, device=self.model.device)[:, None]
        return float(self.room.learn(filled._replace(weights=weights)).sum())

    @torch.no_grad()
    def _merged(self, weights: Weights) -> Tensor:
        """A and B₀ + Σ w_k b_k [parameters]."""
        values = self._trunk.values.detach().clone()
        home = self._experts[0].device
        mixed = values[self.room.middle :].to(home, copy=True)
        for k, weight in weights:
            mixed.add_(self._experts[k], alpha=weight)
        values[self.room.middle :] = mixed
        return values

    def state(self) -> State:
        """All that is needed to go on; experts that have taken no step are left out."""
        return {
            "trunk": self._trunk.state(),
            "experts": {k: expert for k, expert in enumerate(self._experts) if self._own[k]},
            "losses": self._losses,
            "own": self._own,
            "tokens": self._tokens,
            "seen": sum(passage.predicted for batch in self.batches[: len(self._losses)] for passage in batch),
        }

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self._trunk.restore(state["trunk"])
        for k, expert in state["experts"].items():
            self._experts[k].copy_(expert)
        self._losses, self._tokens = list(state["losses"]), list(state["tokens"])
        self._own = [list(losses) for losses in state["own"]]

    @property
    def _mean(self) -> Weights:
        """The mean mix: every expert's share of the tokens read."""
        total = sum(self._tokens)
        return [(k, tokens / total) for k, tokens in enumerate(self._tokens) if tokens > 0]

    def result(self) -> JointTrained:
        """The adapters as they are stored; raises DivergedError where a factor or the next loss is not finite."""
        last = min(self.batches[-1], key=len)  # what the last step did, no loss has seen yet
        self.room.put(0, self._merged(self._weights[id(last)]))
        with torch.no_grad():
            after = float(self.room.loss_packed([last]))
        if not math.isfinite(after):
            raise DivergedError(f"the loss became {after}")
        count = sum(passage.predicted for batch in self.batches for passage in batch)
        trunk = trained(self._stored(self._mean, None), count, self._losses)
        return JointTrained(trunk, tuple(self._expert(k, trunk) for k in range(self.job.count)))

    def _expert(self, k: int, trunk: Trained) -> Trained:
        """Expert k; what all documents taught where no step taught it, with the losses of all."""
        adapter = self._stored([(k, 1.0)], trunk.adapter)
        if not self._own[k]:
            return replace(trunk, adapter=adapter, tokens=0, steps=0)
        return trained(adapter, round(self._tokens[k]), self._own[k])

    def _stored(self, weights: Weights, trunk: Adapter | None) -> Adapter:
        """A mix as bf16 factors; with a trunk its very A."""
        self.room.put(0, self._merged(weights))
        if not self.room.finite(0):
            raise DivergedError("the factors are not finite after training")
        adapter = self.room.adapter(0, self.job.start)
        if trunk is None:
            return adapter
        return {name: LowRank(trunk[name].A, update.B, update.c) for name, update in adapter.items()}


def _home(model: Any, needed: int) -> torch.device:
    """Where the b_k lie: beside the model, or in main memory where a GPU has not the room."""
    if model.device.type != "cuda":
        return torch.device("cpu")
    return torch.device(model.device) if needed <= _DEVICE_SHARE * free(model.device) else torch.device("cpu")
