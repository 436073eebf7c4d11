"""LowRank, the one value at the centre: exact algebra of low-rank updates, and the module that applies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
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

    Factors are concatenated: A [Σr_k, d_in], B [d_out, Σr_k], c [Σr_k]. Where all updates share one A
    (the same tensor, recipe `trunk-shared`), the sum has rank r: B = Σ_k B_k·diag(c_k), accumulated in fp32.
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
