"""Lanes: what takes the place of the `forward` of every target while factors run beside untouched weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmoe.errors import UsageError
from localmoe.runtime.execution.dense import is_plain
from localmoe.runtime.execution.kernels import Located, located
from localmoe.runtime.execution.layout import Layout, Target
from localmoe.runtime.execution.workspace import Factors

if TYPE_CHECKING:
    from localmoe.runtime.execution.beside import Beside


class BlockLanes:
    """One block of the layout, ready when its factors are gathered."""

    def __init__(self, owner: Beside, layout: Layout, index: int) -> None:
        self.owner = owner
        self.index = index
        self.device = layout.blocks[index].device
        self.ready = False
        self.groups = [GroupLanes(self, group) for group in layout.blocks[index].groups]
        self._factors: Factors | None = None

    def fill(self, differentiated: bool = False) -> None:
        """Gathers the factors; if one block's are kept at a time, those of the block before are given up.

        differentiated: the way back will read them when those of another block lie where they lay.
        """
        owner = self.owner
        if owner.active is None:
            raise UsageError("this execution has ended", "run the model inside the context that attached it")
        if owner.workspace is owner.passing and owner.current is not None:
            owner.current.ready = False
            owner.current.forget()
        owner.current = self
        filled = owner.active if owner.filled is None else owner.filled
        factors = owner.workspace.fill(self.index, filled)
        if differentiated and owner.workspace is owner.passing:
            own = factors.At if owner.summed else tuple(A.t().clone().t() for A in factors.At)
            factors = Factors(own, tuple(B.clone() for B in factors.Bt))
        if factors is not self._factors:
            self._factors = factors
            Bt = iter(factors.Bt)
            for group, At in zip(self.groups, factors.At, strict=True):
                group.At = At
                for lane in group.lanes:
                    lane.Bt = next(Bt)
        if owner.summed and owner.near > 0:
            for group in self.groups:
                group.locate()
        self.ready = True

    def forget(self) -> None:
        """Lets go of the activations of the last pass."""
        for group in self.groups:
            group.x = group.rows = group.together = None
            group.narrow = ()


class GroupLanes:
    """The targets that read one input, and the narrow activations that the first of them leaves for the others."""

    def __init__(self, block: BlockLanes, targets: tuple[Target, ...]) -> None:
        self.block = block
        self.targets = targets
        self.device = block.device
        self.d_in = targets[0].d_in
        self.lanes = [Lane(self, target, i) for i, target in enumerate(targets)]
        self.At: Tensor = torch.empty(0)
        self.c: Tensor | None = None
        self.sizes: list[int] = []
        self.x: Tensor | None = None
        self.rows: Tensor | None = None
        self.narrow: Sequence[Tensor] = ()
        self.A: Located | None = None
        self.width = 0
        self.together: Tensor | None = None

    def read(self, x: Tensor) -> None:
        """(x Aᵀ)·w for every target of the group, [tokens, R_t] each, or for all of them `together`."""
        owner, self.rows = self.block.owner, x.reshape(-1, self.d_in)
        near = len(self.rows) <= owner.near and x.dtype == torch.bfloat16
        near = near and not (x.requires_grad and torch.is_grad_enabled())
        if near and owner.summed and not self.block.ready:
            self.block.fill()
        if near and self.A is not None and owner.active is not None:
            if owner.active.by_row:
                self._check_rows(x, len(owner.active.weights))
            self.together = owner.narrow(x, self.rows, self.A, self.width)
        else:
            self.together, self.narrow = None, self._gathered(x)
        self.x = x

    def locate(self) -> None:
        """Tells the kernels where the gathered factors lie, as those of one expert."""
        ranks = np.array([lane.Bt.shape[-2] for lane in self.lanes])
        self.width, places = int(ranks.sum()), ranks.cumsum() - ranks
        self.A = _lying(self.At.t(), self.width, 0)
        for lane, rank, place in zip(self.lanes, ranks.tolist(), places.tolist(), strict=True):
            lane.start = place
            lane.located = _lying(lane.Bt, rank, place)  # of a batch, of its first mix

    def _gathered(self, x: Tensor) -> Sequence[Tensor]:
        if not self.block.ready:
            self.block.fill(differentiated=x.requires_grad and torch.is_grad_enabled())
        narrow = torch.mm(self.rows, self.At)  # type: ignore[arg-type]
        if self.block.owner.sets is not None:
            self._check_rows(x, len(self.block.owner.sets))
        if self.c is not None and self.c.dim() == 3:
            self._by_row(x, narrow).mul_(self.c)
        elif self.c is not None:
            narrow.mul_(self.c)
        return narrow.split_with_sizes(self.sizes, 1)

    def _by_row(self, x: Tensor, narrow: Tensor) -> Tensor:
        rows = self.c.shape[0]  # type: ignore[union-attr]
        self._check_rows(x, rows)
        return narrow.view(rows, -1, narrow.shape[1])

    def _check_rows(self, x: Tensor, rows: int) -> None:
        """Raises UsageError for an input that is not one row for each mix."""
        if x.dim() != 3 or x.shape[0] != rows:
            raise UsageError(
                f"{self.targets[0].name} was given {list(x.shape)} in a batch of {rows} different mixes",
                "this base mixes the rows of a batch: run one prompt after another",
            )


class Lane:
    """One target: what takes the place of its `forward`."""

    def __init__(self, group: GroupLanes, target: Target, place: int) -> None:
        self.group = group
        self.target = target
        self.module = target.module
        self.place = place
        self.d_out = target.d_out
        self.Bt: Tensor = torch.empty(0)
        self.located: Located | None = None
        self.start = 0
        """Where its numbers begin in a row of the narrow activations, for a batch of sums."""
        self._plain = False
        self._base = target.module.forward

    def attach(self, forward: object) -> None:
        """Takes the place of `forward`, the instance's own one, if it has one (accelerate sets such)."""
        self._plain = forward is None and type(self.module) is nn.Linear and is_plain(self.module)
        self._base = self.module.forward
        self.module.__dict__["forward"] = self.forward

    def detach(self, forward: object) -> None:
        """Puts back what was there."""
        if forward is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = forward

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] → [..., d_out]."""
        group = self.group
        if x is not group.x:
            group.read(x)
        if self._plain:
            parameters = self.module._parameters
            y = F.linear(group.rows, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        else:
            y = self._base(x).reshape(-1, self.d_out)
        owner = group.block.owner
        if group.together is not None:
            y = self._widened(y, group.together)
        elif owner.sets is not None:
            Bt = owner.of_rows(self.Bt)
            rows, rank, _ = Bt.shape
            narrow = group.narrow[self.place].view(rows, len(y) // rows, rank)
            y.view(rows, len(y) // rows, self.d_out).baddbmm_(narrow, Bt)
        else:
            y.addmm_(group.narrow[self.place], self.Bt)
        return y.view(*x.shape[:-1], self.d_out)

    def _widened(self, y: Tensor, narrow: Tensor) -> Tensor:
        owner = self.group.block.owner
        if y.dtype == torch.bfloat16 and y.is_contiguous():
            owner.widen(y, self, narrow)
            return y
        update = torch.zeros(y.shape, dtype=torch.bfloat16)  # a linear of another kind may give what it likes
        owner.widen(update, self, narrow)
        return y + update


def _lying(factor: Tensor, rows: int, place: int) -> Located:
    """One contiguous factor of so many rows, whose numbers begin at `place` of a row of n."""
    return located(np.array([[factor.data_ptr()]]), 0, np.array([[rows], [place]]))
