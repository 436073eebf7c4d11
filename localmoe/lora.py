"""LowRank, the one value at the centre: exact algebra of low-rank updates, and the module that applies them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LowRank:
    """One update of one weight: ΔW = B · diag(c) · A.

    A: [r, d_in] and B: [d_out, r], in the dtype they are stored in, never rewritten;
    c: [r] fp32 holds all scaling: alpha/r (or alpha/√r) times the expert's weight.
    """

    A: Tensor
    B: Tensor
    c: Tensor

    @property
    def rank(self) -> int:
        """r, the number of rank-one terms."""
        return self.c.shape[0]

    def scaled(self, weight: float) -> LowRank:
        """weight · ΔW; only c changes."""
        return LowRank(self.A, self.B, self.c * weight)

    def delta(self) -> Tensor:
        """ΔW as a dense matrix [d_out, d_in] in fp32."""
        return (self.B.float() * self.c) @ self.A.float()


Adapter = Mapping[str, LowRank]
"""One expert: module name (as in `model.named_modules()`) → its update."""


def stack(updates: Sequence[LowRank]) -> LowRank:
    """Σ_k ΔW_k as one LowRank, exactly.

    Factors are concatenated: A [Σr_k, d_in], B [d_out, Σr_k], c [Σr_k]. Where all updates share one A (the same
    tensor: recipes `joint` and `trunk-shared`), the sum has rank r: B = Σ_k B_k·diag(c_k), accumulated in fp32.
    """
    first = updates[0]
    if len(updates) == 1:
        return first
    if all(update.A is first.A for update in updates):
        B = torch.zeros_like(first.B, dtype=torch.float32)
        for update in updates:
            B.addcmul_(update.B.float(), update.c.expand_as(B))
        return LowRank(first.A, B, torch.ones_like(first.c))
    return LowRank(
        torch.cat([update.A for update in updates]),
        torch.cat([update.B for update in updates], dim=1),
        torch.cat([update.c for update in updates]),
    )


def mixed(parts: Sequence[tuple[Adapter, float]]) -> dict[str, LowRank]:
    """Σ_k w_k ΔW_k of every module as one LowRank, exactly (`stack`); all adapters have the modules of the first."""
    return {module: stack([adapter[module].scaled(weight) for adapter, weight in parts]) for module in parts[0][0]}


class LowRankLinear(nn.Module):
    """A frozen linear module with a low-rank update beside it: y = base(x) + ((x Aᵀ) · c) Bᵀ.

    A [r, d_in] and B [d_out, r] are fp32 parameters where they are trained; the products run in the dtype of x.
    """

    def __init__(self, base: nn.Module, update: LowRank, train_A: bool = False, train_B: bool = False) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(update.A, requires_grad=train_A)
        self.B = nn.Parameter(update.B, requires_grad=train_B)
        self.register_buffer("c", update.c, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] → [..., d_out]."""
        weight = weight_of(self.base)
        if not weight.is_floating_point():  # packed: only the module itself can multiply with it
            scaled = (self.B * cast(Tensor, self.c)).to(x.dtype)
            return cast(Tensor, self.base(x)) + (x @ self.A.to(x.dtype).t()) @ scaled.t()
        rows = x.reshape(-1, x.shape[-1])
        bias = getattr(self.base, "bias", None)
        y: Tensor = _Apply.apply(rows, weight, bias, self.A, self.B, self.c)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], weight.shape[0])


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as [d_out, d_in]: GPT-2's Conv1D keeps it transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.t()


def dequantised(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [d_out, d_in] as an ordinary tensor of a dtype; of a kind that is none already a copy."""
    if type(weight).dequantize is not Tensor.dequantize:
        weight = weight.dequantize()
    elif hasattr(weight, "__tensor_flatten__"):  # packed: its products alone are known
        weight = F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).t()
    return weight.to(dtype)


class _Apply(torch.autograd.Function):
    """x Wᵀ + b + x Aᵀ (c·B)ᵀ with W frozen, in two products each way; keeps x and x Aᵀ, nothing else.

    dA = (g cB)ᵀ x, dB = gᵀ (x Aᵀ) · c, dx = g W + (g cB) A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        A, scaled = A.to(x.dtype), (B * c).to(x.dtype)
        narrow = x @ A.t()
        ctx.save_for_backward(x, weight, A, scaled, narrow, c)
        return F.linear(x, weight, bias).addmm_(narrow, scaled.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, scaled, narrow, c = ctx.saved_tensors
        (g,) = grads
        narrow_g = g @ scaled
        dx = (g @ dequantised(weight, g.dtype)).addmm_(narrow_g, A) if ctx.needs_input_grad[0] else None
        dA = (narrow_g.t() @ x).float() if ctx.needs_input_grad[3] else None
        dB = (g.t() @ narrow).float() * c if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


@contextmanager
def attached(
    model: nn.Module, adapter: Adapter, train_A: bool = False, train_B: bool = False
) -> Iterator[dict[str, LowRankLinear]]:
    """The model with `adapter` applied beside its weights, for as long as the context lasts.

    The linear modules are wrapped, never written, and put back on exit, exceptions included. Where factors are
    trained they are fp32 copies, so that the adapter handed in stays as it was.
    Raises KeyError for a module that the model lacks.
    """
    wrapped: dict[str, LowRankLinear] = {}
    try:
        for name, update in adapter.items():
            base = model.get_submodule(name)
            device, trained = weight_of(base).device, train_A or train_B
            update = LowRank(
                update.A.to(device, torch.float32 if trained else None, copy=trained),
                update.B.to(device, torch.float32 if trained else None, copy=trained),
                update.c.to(device),
            )
            wrapped[name] = LowRankLinear(base, update, train_A, train_B)
            model.set_submodule(name, wrapped[name])
        yield wrapped
    finally:
        for name, module in wrapped.items():
            model.set_submodule(name, module.base)
