"""Stacked and grouped execution: factors of the active experts beside untouched weights, W x + Σ_k w_k B_k (A_k x)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from localmoe.errors import UsageError
from localmoe.runtime.execution import kernels
from localmoe.runtime.execution.dense import is_plain
from localmoe.runtime.execution.kernels import Buffer, Located, located
from localmoe.runtime.execution.layout import Layout, Target
from localmoe.runtime.execution.workspace import Active, Factors, Workspace, level_for

_PLANS = 256
_NEAR_SUMMED = 8  # tokens that the sum of experts with one A is multiplied with where it lies

Rows = NDArray[np.int64]


class Beside:
    """Linears that add the active experts' updates to what the base gives; base weights are only read.

    One product with A serves all targets of a group, since they read one input. The rows of a batch may have mixes of
    their own: the weights multiply the narrow activations x Aᵀ, so no factor is copied for a row or a token.
    Few tokens are multiplied with the factors where they lie (`kernels`), many with factors gathered side by side;
    where there are no kernels, or a batch's experts share A, all are. Experts of one mix that share A are summed, and
    then run as one. `held` says whose factors stay gathered, if any do.
    """

    def __init__(self, layout: Layout) -> None:
        self.passing = Workspace(layout, whole=False)
        self.staying = Workspace(layout, whole=True)
        self.held: object = None
        self._blocks = [_BlockLanes(self, layout, index) for index in range(len(layout.blocks))]
        self._lanes = [lane for block in self._blocks for group in block.groups for lane in group.lanes]
        self._groups = [group for block in self._blocks for group in block.groups]
        self._plans: dict[object, _Plan] = {}
        self.buffer = Buffer()
        self.near: int = 0
        """As many tokens are multiplied where the factors lie."""
        self.level = level_for(layout)
        """The kernels that multiply them there."""
        self._weights: dict[int, Tensor] = {}
        self._one = torch.ones(1, 1)
        self.summed = False
        """Whether the experts are one: Σ w_k B_k at the A that they share."""
        self.active: Active | None = None
        self.workspace = self.passing
        self.current: _BlockLanes | None = None

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self.passing.bytes + self.staying.bytes + self.buffer.bytes

    @contextmanager
    def attached(self, active: Active, stay: bool, key: object = None) -> Iterator[None]:
        """The model with the updates of `active` beside its weights, for as long as the context lasts.

        stay: keep the gathered factors of all layers (tokens will follow one by one) instead of one layer's at a time.
        key: what names `active`; if its factors are still gathered nothing is read again.
        """
        self._begin(active, stay, key)
        before = [lane.module.__dict__.get("forward") for lane in self._lanes]
        try:
            for lane, forward in zip(self._lanes, before, strict=True):
                lane.attach(forward)
            yield
        finally:
            for lane, forward in zip(self._lanes, before, strict=True):
                lane.detach(forward)
            for block in self._blocks:
                block.forget()
                block.ready = block.ready and stay  # what passed is not what stays
            self.active = None

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some rows of a batch of different mixes, in this order; raises UsageError if there is none."""
        if self.active is None or not self.active.by_row:
            raise UsageError("there is no batch of different mixes to go on with", "attach one first")
        self.active = replace(self.active, weights=self.active.weights[list(rows)])
        self._weigh(self.active)

    def _plan(self, active: Active) -> _Plan:
        """How the narrow activations are laid out; the same object for experts of the same ranks."""
        key = (*(expert.ranks for expert in active.experts), active.shared)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = _plan([group.targets for group in self._groups], active)
        return self._plans[key]

    def _begin(self, active: Active, stay: bool, key: object) -> None:
        self.summed = active.shared is not None and active.single
        self.near = kernels.TOKENS[self.level] if active.shared is None else 0
        if self.summed:  # one expert of rank r is little to gather: what is saved is torch's time for a small product
            self.near = min(_NEAR_SUMMED, kernels.TOKENS[self.level])
        again = stay and key is not None and key == self.held
        self.active, self.workspace, self.current = active, self.staying if stay else self.passing, None
        for block in self._blocks:
            block.ready = block.ready and again
        self._weigh(active)
        if stay:
            self.held = key  # blocks are gathered when they are first come to; `ready` says which are

    def _weigh(self, active: Active) -> None:
        """Gives every group the weights of its narrow activations."""
        plan = self._plan(active)
        made = [_coefficients(active, ranks) for ranks in plan.ranks]
        on = {(kind, group.device) for group, kind in zip(self._groups, plan.groups, strict=True)}
        there = {} if self.summed else {(kind, device): _on(made[kind], device) for kind, device in on}
        for group, kind in zip(self._groups, plan.groups, strict=True):
            group.c = there.get((kind, group.device))
            group.sizes, group.spread = plan.sizes[kind], active.shared is not None and not self.summed
        self._weights = {}
        if self.near > 0 and not self.summed:
            self._locate(active, plan)

    def _locate(self, active: Active, plan: _Plan) -> None:
        """Tells every group and lane where the factors of the active experts lie."""
        A, Bt = active.addresses
        for group, kind in zip(self._groups, plan.groups, strict=True):
            group.A, group.width = located(A, group.targets[0].place, plan.group_rows[kind]), sum(plan.sizes[kind])
            for lane, rows in zip(group.lanes, plan.lane_rows[kind], strict=True):
                lane.located = located(Bt, lane.target.place, rows)

    def narrow(self, x: Tensor, rows: Tensor, A: Located, width: int) -> Tensor:
        """(x Aᵀ)·w of all experts and targets of a group, [tokens, width] fp32; rows: x as [tokens, d_in]."""
        tokens = len(rows)
        if tokens not in self._weights:
            weights = self._one if self.summed else self.active.weights  # type: ignore[union-attr]
            self._weights[tokens] = (
                weights.repeat_interleave(tokens // len(weights), dim=0) if len(weights) > 1 else weights
            )
        return kernels.narrow(self.level, rows.contiguous(), A, self._weights[tokens], width, self.buffer)

    def widen(self, y: Tensor, Bt: Located, narrow: Tensor) -> None:
        """y += what the narrow activations give a target."""
        kernels.widen(self.level, y, Bt, narrow, self.buffer)


class _Plan(NamedTuple):
    """Per group the number of its kind, and per kind the experts' ranks of every target and the widths of x Aᵀ.

    group_rows, lane_rows: rows of A of a whole group and of Bt of each target, [2, N]: how many, and their places.
    """

    groups: list[int]
    ranks: list[tuple[tuple[int, ...], ...]]
    sizes: list[list[int]]
    group_rows: list[Rows]
    lane_rows: list[list[Rows]]


def _plan(groups: Sequence[tuple[Target, ...]], active: Active) -> _Plan:
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    numbers, sizes = [], []
    for group in groups:
        ranks = tuple(tuple(expert.ranks[target.place] for expert in active.experts) for target in group)
        if ranks not in kinds:
            kinds[ranks] = len(kinds)
            shared = active.shared
            whole = [sum(each) for each in ranks]
            sizes.append(whole if shared is None else [shared.ranks[target.place] for target in group])
        numbers.append(kinds[ranks])
    group_rows, lane_rows = [], []
    for ranks in kinds:
        each = np.array(ranks)  # [targets, N]
        whole = each.sum(axis=0)
        first = np.cumsum(whole) - whole
        group_rows.append(np.stack([whole, first]))
        lane_rows.append(
            [np.stack([own, first + before]) for own, before in zip(each, each.cumsum(axis=0) - each, strict=True)]
        )
    return _Plan(numbers, list(kinds), sizes, group_rows, lane_rows)


def _coefficients(active: Active, ranks: tuple[tuple[int, ...], ...]) -> Tensor:
    """What multiplies the narrow activations of a group: [R] for one mix, [rows, 1, R] for several; fp32."""
    weights = active.weights
    wide = torch.cat([weights.repeat_interleave(torch.tensor(each), dim=1) for each in ranks], dim=1)
    return wide[0] if active.single else wide[:, None]


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory on a device; a GPU's copy does not wait for what the GPU is at."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _lying(factor: Tensor, rows: int, place: int) -> Located:
    """One contiguous factor of so many rows, whose numbers begin at `place` of a row of n."""
    return located(np.array([[factor.data_ptr()]]), 0, np.array([[rows], [place]]))


class _BlockLanes:
    """One block of the layout, ready when its factors are gathered."""

    def __init__(self, owner: Beside, layout: Layout, index: int) -> None:
        self.owner = owner
        self.index = index
        self.device = layout.blocks[index].device
        self.ready = False
        self.groups = [_GroupLanes(self, group) for group in layout.blocks[index].groups]
        self._factors: Factors | None = None

    def fill(self) -> None:
        """Gathers the factors; if one block's are kept at a time, those of the block before are given up."""
        owner = self.owner
        if owner.active is None:
            raise UsageError("this execution has ended", "run the model inside the context that attached it")
        if owner.workspace is owner.passing and owner.current is not None:
            owner.current.ready = False
            owner.current.forget()
        owner.current = self
        factors = owner.workspace.fill(self.index, owner.active, merge_shared=owner.active.single)
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


class _GroupLanes:
    """The targets that read one input, and the narrow activations that the first of them leaves for the others."""

    def __init__(self, block: _BlockLanes, targets: tuple[Target, ...]) -> None:
        self.block = block
        self.targets = targets
        self.device = block.device
        self.d_in = targets[0].d_in
        self.lanes = [_Lane(self, target, i) for i, target in enumerate(targets)]
        self.At: Tensor = torch.empty(0)
        self.c: Tensor | None = None
        self.sizes: list[int] = []
        self.spread = False
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
        ranks = np.array([len(lane.Bt) for lane in self.lanes])
        self.width, places = int(ranks.sum()), ranks.cumsum() - ranks
        self.A = _lying(self.At.t(), self.width, 0)
        for lane, rank, place in zip(self.lanes, ranks.tolist(), places.tolist(), strict=True):
            lane.located = _lying(lane.Bt, rank, place)

    def _gathered(self, x: Tensor) -> Sequence[Tensor]:
        if not self.block.ready:
            self.block.fill()
        narrow = torch.mm(self.rows, self.At)  # type: ignore[arg-type]
        if self.spread:
            return self._spread(x, narrow)
        if self.c is not None and self.c.dim() == 3:
            self._by_row(x, narrow).mul_(self.c)
        elif self.c is not None:
            narrow.mul_(self.c)
        return narrow.split_with_sizes(self.sizes, 1)

    def _spread(self, x: Tensor, narrow: Tensor) -> tuple[Tensor, ...]:
        """Experts that share A: x Aᵀ once for all of them, times each row's weight of each expert."""
        by_row, made, start, end = self._by_row(x, narrow), [], 0, 0
        for lane, size in zip(self.lanes, self.sizes, strict=True):
            wide = len(lane.Bt)
            weights = self.c[:, :, end : end + wide]  # type: ignore[index]
            repeated = by_row[:, :, start : start + size].repeat(1, 1, wide // size if size else 1)
            made.append(repeated.mul_(weights).view(len(narrow), wide))
            start, end = start + size, end + wide
        return tuple(made)

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


class _Lane:
    """One target: what takes the place of its `forward`."""

    def __init__(self, group: _GroupLanes, target: Target, place: int) -> None:
        self.group = group
        self.target = target
        self.module = target.module
        self.place = place
        self.d_out = target.d_out
        self.Bt: Tensor = torch.empty(0)
        self.located: Located | None = None
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
        if group.together is not None and self.located is not None:
            y = self._widened(y, group.together, self.located)
        else:
            y.addmm_(group.narrow[self.place], self.Bt)
        return y.view(*x.shape[:-1], self.d_out)

    def _widened(self, y: Tensor, narrow: Tensor, Bt: Located) -> Tensor:
        owner = self.group.block.owner
        if y.dtype == torch.bfloat16 and y.is_contiguous():
            owner.widen(y, Bt, narrow)
            return y
        update = torch.zeros(y.shape, dtype=torch.bfloat16)  # a linear of another kind may give what it likes
        owner.widen(update, Bt, narrow)
        return y + update
