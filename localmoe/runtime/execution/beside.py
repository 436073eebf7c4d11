"""Stacked and grouped execution: factors of the active experts beside untouched weights, W x + Σ_k w_k B_k (A_k x)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.errors import UsageError
from localmoe.runtime.execution import kernels
from localmoe.runtime.execution.kernels import Buffer, Located, located
from localmoe.runtime.execution.lanes import BlockLanes, Lane
from localmoe.runtime.execution.layout import Layout, Target
from localmoe.runtime.execution.workspace import Active, Workspace, level_for, on

_PLANS = 256
_NEAR_SUMMED = 8  # tokens that the sum of experts with one A is multiplied with where it lies

Rows = NDArray[np.int64]


class Beside:
    """Linears that add the active experts' updates to what the base gives; base weights are only read.

    One product with A serves all targets of a group, since they read one input. The rows of a batch may have mixes of
    their own: the weights multiply the narrow activations x Aᵀ, so no factor is copied for a row or a token.
    Few tokens are multiplied with the factors where they lie (`kernels`), many with factors gathered side by side;
    where there are no kernels all are. Experts of one mix that share A are summed, and then run as one: of a batch,
    every row has x Aᵀ and a sum of its own. `held` says whose factors stay gathered, if any do.
    """

    def __init__(self, layout: Layout) -> None:
        self.passing = Workspace(layout, whole=False)
        self.staying = Workspace(layout, whole=True)
        self.held: object = None
        self._blocks = [BlockLanes(self, layout, index) for index in range(len(layout.blocks))]
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
        self._set_numbers = np.zeros(0, dtype=np.int64)
        self._in_order = True
        self.summed = False
        """Whether the experts of a mix are one: Σ w_k B_k at the A that they share."""
        self.sets: Tensor | None = None
        """Of a batch of such mixes, which of the sums each row has, [rows] int64."""
        self.active: Active | None = None
        self.filled: Active | None = None
        """What is gathered, where that is not `active`: every mix of a batch once, and rows that have left too."""
        self.workspace = self.passing
        self.current: BlockLanes | None = None

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
        self._weights = {}
        if self.sets is None:
            self._weigh(self.active)
        elif self.level > 0:
            self._choose(self.sets[list(rows)])
        else:
            self._sum_rows(self.active)
            self.held = None
            for block in self._blocks:
                block.ready = False

    def _plan(self, active: Active) -> _Plan:
        """How the narrow activations are laid out; the same object for experts of the same ranks."""
        key = (*(expert.ranks for expert in active.experts), active.shared)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = _plan([group.targets for group in self._groups], active)
        return self._plans[key]

    def _begin(self, active: Active, stay: bool, key: object) -> None:
        self.summed = active.shared is not None
        self.near = kernels.TOKENS[self.level]
        if self.summed and active.single:  # one expert of rank r is little to gather: torch's own time is what is saved
            self.near = min(_NEAR_SUMMED, self.near)
        again = stay and key is not None and key == self.held
        self.active, self.workspace, self.current = active, self.staying if stay else self.passing, None
        self.filled = self.sets = None
        if self.summed and active.by_row:
            self._sum_rows(active)
        for block in self._blocks:
            block.ready = block.ready and again
        self._weigh(active)
        if stay:
            self.held = key  # blocks are gathered when they are first come to; `ready` says which are

    def _sum_rows(self, active: Active) -> None:
        """Decides which sums are gathered: equal ones once, where kernels find each row's; else one for every row."""
        self.filled, sets = active, list(range(len(active.weights)))
        if self.level > 0:
            places: dict[tuple[float, ...], int] = {}
            sets = [places.setdefault(tuple(row), len(places)) for row in active.weights.tolist()]
            self.filled = replace(active, weights=active.weights[[sets.index(place) for place in range(len(places))]])
        self._choose(torch.tensor(sets, device="cpu"))

    def _choose(self, sets: Tensor) -> None:
        self.sets, self._set_numbers = sets, sets.numpy()
        self._in_order = sets.tolist() == list(range(len(self.filled.weights)))  # type: ignore[union-attr]

    def of_rows(self, Bt: Tensor) -> Tensor:
        """Each row's sum of a target [rows, r, d_out], of those that are gathered [S, r, d_out]."""
        return Bt if self._in_order else Bt[self.sets]

    def _weigh(self, active: Active) -> None:
        """Gives every group the weights of its narrow activations."""
        plan, made, there = self._plan(active), list[Tensor](), dict[tuple[int, torch.device], Tensor]()
        if not self.summed:
            made = [_coefficients(active, ranks) for ranks in plan.ranks]
            places = {(kind, group.device) for group, kind in zip(self._groups, plan.groups, strict=True)}
            there = {(kind, device): on(made[kind], device) for kind, device in places}
        for group, kind in zip(self._groups, plan.groups, strict=True):
            group.c, group.sizes = there.get((kind, group.device)), plan.sizes[kind]
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

    def widen(self, y: Tensor, lane: Lane, narrow: Tensor) -> None:
        """y += what the narrow activations give a target; y [tokens, d_out] bf16."""
        if self.sets is not None:
            kernels.widen_rows(y, lane.Bt, self._set_numbers, narrow, lane.start)
        elif lane.located is not None:
            kernels.widen(self.level, y, lane.located, narrow, self.buffer)


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
