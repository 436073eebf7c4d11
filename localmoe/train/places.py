"""Places: factors of several adapters beside one frozen base, each with an AdamW of its own.

Place e holds row e of every tensor. No place sees another, so that each adapter is trained as it would be alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmoe.errors import UsageError
from localmoe.lora import Adapter, LowRank, dequantised, weight_of
from localmoe.packing import Passage, loss, pack, weighted_loss

PARAMETER_BYTES = 28
"""Memory of a parameter in a place: factor, two moments and temporaries in fp32, factor and gradient in bf16."""
BETAS = (0.9, 0.999)
"""Of AdamW, as torch has them."""
_EPSILON = 1e-8
_EAGER = 2  # steps of one shape that run kernel by kernel before it is captured: libraries set themselves up in them


class Batch(NamedTuple):
    """What the places learn from in one step: [places · n, length], a row a passage, one place after the other.

    weights: 1 / predicted tokens of the place where a token is predicted, else 0.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor


class Hyper(NamedTuple):
    """What a step of AdamW goes by, each [places] fp32; a rate of 0 leaves a place as it is."""

    rate: Tensor
    decay: Tensor
    clip: Tensor
    first: Tensor
    """1 − β₁ᵗ with every place's own step t."""
    second: Tensor
    """1 − β₂ᵗ."""


class _Graph(NamedTuple):
    """A step captured as a CUDA graph, with the tensors that it reads and the losses that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    hyper: Hyper | None
    losses: Tensor


class Places:
    """The factors that are trained, flat: [places, parameters], the A of all modules, then from `middle` on their B.

    With `freeze_A` they are B alone, and all places share the A of `like`. c is the same in all places. With
    `gradients_only` there is no optimiser: `put` and `learn` in the place of `load` and `step`.
    """

    def __init__(
        self, model: Any, like: Adapter, count: int, freeze_A: bool = False, gradients_only: bool = False
    ) -> None:
        self.model, self.count, self._frozen = model, count, freeze_A
        self._like = {name: LowRank(u.A, u.B, u.c.to(model.device)) for name, u in like.items()}
        self.middle = 0 if freeze_A else sum(update.A.numel() for update in like.values())
        self._parts: dict[str, tuple[slice, slice]] = {}
        begin, end = 0, self.middle
        for name, update in like.items():
            first = slice(begin, begin + (0 if freeze_A else update.A.numel()))
            self._parts[name] = (first, slice(end, end + update.B.numel()))
            begin, end = first.stop, end + update.B.numel()

        def zeros(dtype: torch.dtype, rows: int = count) -> Tensor:
            return torch.zeros(rows, end, dtype=dtype, device=model.device)

        moments = 0 if gradients_only else count
        self._factors = zeros(torch.float32)
        self._first, self._second = (zeros(torch.float32, moments) for _ in range(2))
        self._applied, self._gradient = zeros(model.dtype), zeros(model.dtype)
        self._last: tuple[Adapter, Tensor] | None = None
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._turn = _Turn()
        self._seen: dict[tuple[int, ...], int] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._pool: Any = None
        self._failed: torch.cuda.CUDAGraph | None = None
        self._scale = torch.ones(end, device=model.device)
        for name, update in self._like.items():
            self._scale[self._parts[name][1]] = update.c.expand(update.B.shape).reshape(-1)

    def load(self, place: int, start: Adapter) -> None:
        """Put an adapter into a place, with an optimiser that has seen nothing.

        Raises ValueError for another c than the places have, or with `freeze_A` another A.
        """
        self._factors[place] = self.flat(start)
        self._first[place] = 0
        self._second[place] = 0

    def put(self, place: int, flat: Tensor) -> None:
        """Put factors into a place as `flat` lays them out [parameters]."""
        self._factors[place] = flat

    def adapter(self, place: int, start: Adapter) -> Adapter:
        """The factors of a place as they are stored, bf16; an A that was not trained stays the very tensor it was."""
        flat, found = self._factors[place].bfloat16().cpu(), {}  # many wait for their wave to end
        for name, (a, b) in self._parts.items():
            A = start[name].A if self._frozen else flat[a].view(start[name].A.shape)
            found[name] = LowRank(A, flat[b].view(start[name].B.shape), start[name].c)
        return found

    def flat(self, start: Adapter) -> Tensor:
        """The factors that are trained, as they lie in a place; the last start is kept, since many share one."""
        if self._last is None or self._last[0] is not start:
            for name, update in start.items():
                if not torch.equal(update.c.to(self.model.device), self._like[name].c):
                    raise ValueError(f"{name}: adapters trained side by side must have one scale alpha / rank")
                if self._frozen and update.A is not self._like[name].A:
                    raise ValueError(f"{name}: adapters trained side by side must share an A that is not trained")
            first = [] if self._frozen else [update.A for update in start.values()]
            parts = first + [update.B for update in start.values()]
            self._last = start, torch.cat([part.to(self._factors).reshape(-1) for part in parts])
        return self._last[1]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with the places' factors beside its weights; its modules are put back on exit."""
        bases = {name: self.model.get_submodule(name) for name in self._like}
        try:
            for name, base in bases.items():
                self.model.set_submodule(name, self._beside(name, base))
            yield
        finally:
            for name, base in bases.items():
                self.model.set_submodule(name, base)

    def step(self, batch: Batch, hyper: Hyper) -> Tensor:
        """One step of AdamW in every place, gradients clipped place by place; the mean loss of each [places].

        On a GPU a step is captured as a graph: launching its thousands of small kernels takes longer than running them.
        Raises UsageError for a base that runs a linear twice, or on other tokens than were put in.
        """
        return self._run(batch, hyper)

    def learn(self, batch: Batch) -> Tensor:
        """The mean loss of each place [places], whose gradients are then in `gradient`; no factor is changed.

        As `step`, of which a `Places` takes either one or the other.
        """
        return self._run(batch, None)

    def learn_packed(self, passages: Sequence[Passage]) -> Tensor:
        """The mean loss over the tokens of at most one passage a place, laid end to end; gradients as in `learn`.

        Without padding, which a CPU would compute too; the gradients of places without a passage mean nothing.
        """
        value = self.loss_packed(passages)
        torch.autograd.backward(value, inputs=[self._anchor])
        return value.detach()

    def loss_packed(self, passages: Sequence[Passage]) -> Tensor:
        """The mean loss over the tokens of at most one passage a place."""
        torch.mul(self._factors, self._scale, out=self._applied)
        packed = pack(passages, self.model.device)
        self._turn.begin(packed.ids.numel(), packed.lengths)
        return loss(self.model, packed)

    def gradient(self, place: int) -> Tensor:
        """dloss/dfactors of a place after the last `learn` [parameters], fp32."""
        return self._gradient[place].float().mul_(self._scale)

    def _run(self, batch: Batch, hyper: Hyper | None) -> Tensor:
        if self.model.device.type != "cuda" or self._failed is not None:
            return self._step(batch, hyper)
        shape = tuple(batch.ids.shape)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] <= _EAGER:
            return self._step(batch, hyper)
        if shape not in self._graphs:
            captured = self._captured(batch, hyper)
            if captured is None:
                return self._step(batch, hyper)
            self._graphs[shape] = captured
        held = self._graphs[shape]
        for mine, given in zip((*held.batch, *(held.hyper or ())), (*batch, *(hyper or ())), strict=True):
            mine.copy_(given)
        held.graph.replay()
        return held.losses.clone()

    def losses(self, batch: Batch) -> Tensor:
        """The mean loss of each place [places], of which nothing is learnt."""
        torch.mul(self._factors, self._scale, out=self._applied)
        self._turn.begin(batch.ids.numel())
        with torch.no_grad():
            _, nll = weighted_loss(self.model, batch.ids, batch.targets, batch.weights)
        return nll.view(self.count, -1).sum(dim=1)

    def _captured(self, batch: Batch, hyper: Hyper | None) -> _Graph | None:
        """The step as a graph, not run yet; None, and no other attempt, where the base's forward cannot be captured."""
        mine = Batch(*map(torch.clone, batch))
        own = None if hyper is None else Hyper(*map(torch.clone, hyper))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                losses = self._step(mine, own)
        except RuntimeError as error:
            self._failed = graph  # torch's allocator may still ask it
            warnings.warn(f"training goes on without CUDA graphs, slower: {error}", stacklevel=2)
            return None
        self._pool = graph.pool()
        return _Graph(graph, mine, own, losses)

    def _step(self, batch: Batch, hyper: Hyper | None) -> Tensor:
        torch.mul(self._factors, self._scale, out=self._applied)
        self._turn.begin(batch.ids.numel())
        total, nll = weighted_loss(self.model, batch.ids, batch.targets, batch.weights)
        torch.autograd.backward(total, inputs=[self._anchor])
        if hyper is not None:
            self._descend(hyper)
        return nll.view(self.count, -1).sum(dim=1)

    def finite(self, place: int) -> bool:
        """Whether all factors of a place are finite."""
        return bool(self._factors[place].isfinite().all())

    def _descend(self, hyper: Hyper) -> None:
        gradient = self._gradient.float().mul_(self._scale)
        norm = gradient.norm(dim=1)
        gradient.mul_((hyper.clip / (norm + 1e-6)).clamp_(max=1.0)[:, None])
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self._factors.mul_((1 - hyper.rate * hyper.decay)[:, None])
        torch.div(self._second, hyper.second[:, None], out=gradient).sqrt_().add_(_EPSILON)
        torch.div(self._first, gradient, out=gradient)
        self._factors.sub_(gradient.mul_((hyper.rate / hyper.first)[:, None]))

    def _beside(self, name: str, base: nn.Module) -> _Beside:
        a, b = self._parts[name]
        like = self._like[name]
        shape_A, shape_B = (self.count, *like.A.shape), (self.count, *like.B.shape)
        if self._frozen:
            A = like.A.to(self._applied).expand(shape_A)
            B, dB = (flat[:, b].view(shape_B) for flat in (self._applied, self._gradient))
            return _Beside(name, base, (A, B, None, dB, self._anchor), self._turn)
        pairs = ((flat[:, a].view(shape_A), flat[:, b].view(shape_B)) for flat in (self._applied, self._gradient))
        (A, B), (dA, dB) = pairs
        return _Beside(name, base, (A, B, dA, dB, self._anchor), self._turn)


class _Turn:
    """One way through the base: how many tokens were put in, and which linears have run."""

    def begin(self, tokens: int, lengths: list[int] | None = None) -> None:
        """So many tokens, of each place as many as of the others, or so many of the first places as `lengths` say."""
        self.tokens, self.lengths, self.seen = tokens, lengths, set[str]()

    def check(self, name: str, rows: int) -> None:
        """Raises UsageError for a linear that has run before, or on other rows: its gradients would be wrong."""
        if name in self.seen or rows != self.tokens:
            raise UsageError(
                f"{name} runs twice, or on a part of the tokens: such a base is trained neither jointly nor on a GPU",
                "use the CPU and another recipe: CUDA_VISIBLE_DEVICES= before the same command, and --recipe trunk",
            )
        self.seen.add(name)


class _Beside(nn.Module):
    """A frozen linear with a low-rank update for each place: y_e = base(x_e) + (x_e A_eᵀ) B_eᵀ, B with c in it.

    The gradients of A and B are written where `dA` and `dB` lie.
    """

    def __init__(
        self, name: str, base: nn.Module, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor], turn: _Turn
    ) -> None:
        super().__init__()
        self.base = base
        self._name, self._tensors, self._turn = name, tensors, turn

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] → [..., d_out]; the rows of the places lie one after the other."""
        weight, bias = weight_of(self.base), getattr(self.base, "bias", None)
        rows = x.reshape(-1, x.shape[-1])
        self._turn.check(self._name, len(rows))
        lengths = self._turn.lengths
        if lengths is None:
            y: Tensor = _Apply.apply(rows, weight, bias, *self._tensors)  # type: ignore[no-untyped-call]
        else:
            y = _ApplyPacked.apply(rows, weight, bias, *self._tensors, lengths)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], weight.shape[0])


class _Apply(torch.autograd.Function):
    """`_Beside`'s product; `anchor` takes part in nothing but that the way back goes through here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        A: Tensor, B: Tensor, dA: Tensor | None, dB: Tensor, anchor: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)
        narrow = torch.bmm(x.view(len(A), -1, x.shape[-1]), A.transpose(1, 2))
        y.view(len(A), -1, y.shape[-1]).baddbmm_(narrow, B.transpose(1, 2))
        ctx.save_for_backward(x, weight, narrow)
        ctx.factors = (A, B, dA, dB)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, narrow = ctx.saved_tensors
        A, B, dA, dB = ctx.factors
        g = grads[0].contiguous()
        apart = g.view(len(A), -1, g.shape[-1])
        narrow_g = torch.bmm(apart, B)
        torch.bmm(apart.transpose(1, 2), narrow, out=dB)
        if dA is not None:
            torch.bmm(narrow_g.transpose(1, 2), x.view(len(A), -1, x.shape[-1]), out=dA)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ dequantised(weight, g.dtype)
            dx.view(len(A), -1, dx.shape[-1]).baddbmm_(narrow_g, A)
        return dx, None, None, None, None, None, None, None


class _ApplyPacked(torch.autograd.Function):
    """`_Apply` where place i has the next `lengths[i]` rows, and no more places have any than there are lengths."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, anchor: Tensor, lengths: list[int],
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)
        narrow = [part @ A[place].t() for place, part in enumerate(torch.split(x, lengths))]
        for place, (part, thin) in enumerate(zip(torch.split(y, lengths), narrow, strict=True)):
            part.addmm_(thin, B[place].t())
        ctx.save_for_backward(x, weight, *narrow)
        ctx.factors = (A, B, dA, dB, lengths)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *narrow = ctx.saved_tensors
        A, B, dA, dB, lengths = ctx.factors
        g = grads[0]
        dx = g @ dequantised(weight, g.dtype) if ctx.needs_input_grad[0] else None
        into = [None] * len(lengths) if dx is None else torch.split(dx, lengths)
        parts = zip(torch.split(g, lengths), torch.split(x, lengths), narrow, into, strict=True)
        for place, (out, rows, thin, back) in enumerate(parts):
            thin_g = out @ B[place]
            torch.mm(out.t(), thin, out=dB[place])
            torch.mm(thin_g.t(), rows, out=dA[place])
            if back is not None:
                back.addmm_(thin_g, A[place])
        return dx, None, None, None, None, None, None, None, None
