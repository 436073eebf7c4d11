"""Workspace: the factors of the active experts side by side, gathered layer by layer into memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.errors import BankError
from localmoe.runtime.execution import kernels
from localmoe.runtime.execution.layout import Block, Layout
from localmoe.runtime.execution.packed import PackedExpert, SharedFactors, join


@dataclass(frozen=True, eq=False)
class Active:
    """The experts of one mix, or of all mixes of a batch, and what each row of the batch gives them.

    weights: [rows, N] fp32, the expert's scale in it. by_row: each row of the batch has its own; else the one row
    there is stands for all. Raises BankError for experts that change different modules.
    """

    experts: tuple[PackedExpert, ...]
    weights: Tensor
    by_row: bool = False

    def __post_init__(self) -> None:
        first = self.experts[0].modules
        for place, expert in enumerate(self.experts):
            if expert.modules is not first and expert.modules != first:  # comparing equal ones reads them all
                module = min(expert.modules ^ first)
                without = place if module in first else 0
                raise BankError(
                    f"adapter {without} of the {len(self.experts)} to merge has no update for module {module!r}",
                    "merge experts of one bank: they are trained on the same modules",
                )

    @cached_property
    def shared(self) -> SharedFactors | None:
        """The A that all of them share, or None."""
        one = self.experts[0].shared
        return one if one is not None and all(expert.shared is one for expert in self.experts) else None

    @cached_property
    def scalars(self) -> list[float]:
        """The weights of the first row, as numbers."""
        return self.weights[0].tolist()

    @cached_property
    def addresses(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where A and Bt of every target and expert begin in main memory, [targets, N] each."""
        A, Bt = zip(*[expert.addresses for expert in self.experts], strict=True)
        return np.ascontiguousarray(np.stack(A).T), np.ascontiguousarray(np.stack(Bt).T)

    @property
    def single(self) -> bool:
        """Whether one mix serves the whole batch."""
        return not self.by_row

    @property
    def rank(self) -> float:
        """Σ of the experts' ranks, the mean over the targets: what reading and applying them costs."""
        return sum(sum(expert.ranks) / len(expert.ranks) for expert in self.experts)


def level_for(layout: Layout) -> kernels.Level:
    """The kernels for a base: what the processor has, if the weights are bf16, in main memory, and fit the tiles."""
    fits = layout.dtype == torch.bfloat16 and all(block.device.type == "cpu" for block in layout.blocks)
    return kernels.level() if fits and all(target.d_in % 32 == 0 for target in layout.targets) else 0


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory on a device; a GPU's copy does not wait for what the GPU is at."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_APART = 48 * 2**20  # bytes; a core that rewrites sooner what another core has just read waits for that core's cache


class Factors(NamedTuple):
    """The factors of one block: A per group, transposed, [d_in, Σ R_t]; Bt per target [R_t, d_out].

    Of the sums of a batch [rows, r_t, d_out], each contiguous.
    """

    At: tuple[Tensor, ...]
    Bt: tuple[Tensor, ...]


class Workspace:
    """Memory for the factors of one block at a time, or of all blocks (`whole`).

    One block at a time costs little memory: on a processor, blocks take turns in `_APART` bytes (or in one block's, if
    that is more). All blocks are for factors that are read again at every token.
    Experts that share A become one of their rank, Σ w_k B_k; of a batch one for each of its rows.
    """

    def __init__(self, layout: Layout, whole: bool) -> None:
        self._layout = layout
        self._whole = whole
        self._level = level_for(layout)
        self._memory: dict[object, Tensor] = {}
        self._views: dict[int, tuple[tuple[object, ...], Factors]] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(memory.nbytes for memory in self._memory.values())

    @property
    def memory(self) -> list[Tensor]:
        """All of it."""
        return list(self._memory.values())

    @torch.no_grad()
    def fill(self, index: int, active: Active) -> Factors:
        """Gathers block `index` for the active experts; unless the workspace is `whole` this ends an earlier block.

        Rows of A and Bt are ordered by target, then by expert. With one common A the weights are in Bt already.
        """
        if active.shared is not None:
            return self._summed(index, active, active.shared)
        experts = active.experts
        size = sum([expert.blocks[index].numel() for expert in experts])
        if all([expert.shared is None for expert in experts]):
            parts = [expert.parts[index] for expert in experts]
        else:
            parts = [expert.factors(index) for expert in experts]
            size += sum(A.numel() for one in experts if one.shared is not None for A in one.shared.groups[index])
        flat = self._flat(index, size)
        join(_interleaved(parts), flat)
        return self._factors(index, flat, [expert.ranks for expert in experts], None)

    def _summed(self, index: int, active: Active, shared: SharedFactors) -> Factors:
        """Σ_k w_k Bt_k in fp32, rounded once; A is the shared one itself."""
        blocks = [expert.blocks[index] for expert in active.experts]
        flat = self._flat(index, len(active.weights) * blocks[0].numel())
        each = flat.view(len(active.weights), -1)
        if self._level > 0:
            kernels.add(blocks, active.weights, each)
        elif active.by_row:
            each.copy_(on(active.weights, flat.device) @ torch.stack(blocks).float())
        else:
            total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
            for block, weight in zip(blocks, active.scalars, strict=True):
                total.add_(block, alpha=weight)
            flat.copy_(total)
        return self._factors(index, flat, [shared.ranks], shared, len(active.weights) if active.by_row else 0)

    def _flat(self, index: int, size: int) -> Tensor:
        device = self._layout.blocks[index].device
        turns = max(1, _APART // max(1, size * self._layout.dtype.itemsize)) if device.type == "cpu" else 1
        key = index if self._whole else (device, index % turns)
        if key not in self._memory or self._memory[key].numel() < size:
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside it
                self._memory[key] = torch.empty(size, dtype=self._layout.dtype, device=device)
        return self._memory[key][:size]

    def _factors(
        self, index: int, flat: Tensor, ranks: Sequence[tuple[int, ...]], shared: SharedFactors | None, rows: int = 0
    ) -> Factors:
        """Views of the gathered memory; made again only where memory or ranks changed. rows: of sums, if of a batch."""
        key = (flat.data_ptr(), flat.numel(), rows, *ranks, shared)
        if index in self._views and self._views[index][0] == key:
            return self._views[index][1]
        block = self._layout.blocks[index]
        R = {target.place: sum(rank[target.place] for rank in ranks) for target in block.targets}
        if shared is not None and rows:
            sizes = [R[target.place] * target.d_out for target in block.targets]
            parts = zip(block.targets, flat.view(rows, -1).split_with_sizes(sizes, 1), strict=True)
            Bt = tuple(part.view(rows, R[target.place], target.d_out) for target, part in parts)
            made = Factors(tuple(A.t() for A in shared.groups[index]), Bt)
        else:
            made = _views(block, flat, R, None if shared is None else shared.groups[index])
        self._views[index] = (key, made)
        return made


def _interleaved(parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Factor by factor, and of each factor expert by expert."""
    return list(chain.from_iterable(zip(*parts, strict=True)))


def _views(block: Block, flat: Tensor, R: dict[int, int], shared: tuple[Tensor, ...] | None) -> Factors:
    start, At, Bt = 0, [], []
    for group in block.groups if shared is None else ():
        rows, d_in = sum(R[target.place] for target in group), group[0].d_in
        At.append(flat[start : start + rows * d_in].view(rows, d_in).t())
        start += rows * d_in
    for target in block.targets:
        size = R[target.place] * target.d_out
        Bt.append(flat[start : start + size].view(R[target.place], target.d_out))
        start += size
    return Factors(tuple(At) if shared is None else tuple(A.t() for A in shared), tuple(Bt))
