"""Packed experts: one adapter laid out as execution reads it, every factor in rows, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.errors import BankError
from localmoe.lora import Adapter
from localmoe.runtime.execution.kernels import address
from localmoe.runtime.execution.layout import Block, Layout, Target

_LARGE = 4 * 2**20  # bytes; below, handing one half to another thread costs what it saves


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """One expert: ΔW of target t = scale · Btᵀ A, with A [r_t, d_in] and Bt [r_t, d_out] in the dtype of the base.

    blocks: one flat tensor a block, on the block's device: A of all its targets, then Bt of all; Bt alone where A is
    shared. parts: the same memory, a view per factor (empty where the expert does not change the target), see `views`.
    shared: the packed A that this expert shares with others; ranks: r_t by the place of the target.
    whole: all blocks end to end, where they lie so.
    """

    blocks: tuple[Tensor, ...]
    parts: tuple[tuple[Any, ...], ...]
    ranks: tuple[int, ...]
    scale: float
    shared: SharedFactors | None
    modules: frozenset[str]
    whole: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that this expert alone holds."""
        return sum(block.nbytes for block in self.blocks)

    def factors(self, index: int) -> tuple[Any, ...]:
        """Views of block `index`: A of all its targets, shared or not, then Bt of all."""
        return self.parts[index] if self.shared is None else self.shared.parts[index] + self.parts[index]

    @cached_property
    def addresses(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where A and Bt of every target begin in main memory, by place."""
        A, Bt = [], []
        for index in range(len(self.parts)):
            factors = self.factors(index)
            found = [address(part) for part in factors]
            for place in reversed(range(len(found) - 1)):  # numpy does not say where an empty part would begin
                if factors[place].nbytes == 0:
                    found[place] = found[place + 1]
            A += found[: len(found) // 2]
            Bt += found[len(found) // 2 :]
        return np.array(A), np.array(Bt)


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """The A of a trunk that all its experts share: per block and group [Σ r_t, d_in], contiguous.

    parts: the same memory, a flat view per target; source: module name → the tensor that `Bank.adapter` hands out.
    """

    groups: tuple[tuple[Tensor, ...], ...]
    parts: tuple[tuple[Any, ...], ...]
    source: dict[str, Tensor]
    ranks: tuple[int, ...]


@torch.inference_mode(False)
@torch.no_grad()
def shared_factors(trunk: Adapter, layout: Layout) -> SharedFactors:
    """The A factors of a trunk, packed once for all experts that share them."""
    check_fits(trunk, layout)
    ranks, groups, parts = _ranks(trunk, layout), [], []
    for block in layout.blocks:
        made: list[Tensor] = []
        pieces: list[Any] = []
        for group in block.groups:
            rows = [trunk[target.name].A for target in group if target.name in trunk]
            empty = torch.empty(0, group[0].d_in)
            made.append(torch.cat(rows or [empty]).to(block.device, layout.dtype))
            pieces += views(made[-1].view(-1), [ranks[target.place] * target.d_in for target in group])
        groups.append(tuple(made))
        parts.append(tuple(pieces))
    return SharedFactors(tuple(groups), tuple(parts), {name: update.A for name, update in trunk.items()}, ranks)


@torch.inference_mode(False)
@torch.no_grad()
def pack(adapter: Adapter, layout: Layout, shared: SharedFactors | None = None, pin: bool = False) -> PackedExpert:
    """An adapter in the layout of a base, in host memory (pinned if asked) in the base's dtype.

    Where all c are one number it stays apart, as `scale`; else B takes c, in fp32, before it is rounded.
    Raises BankError for a module that the base lacks or has in another shape.
    """
    check_fits(adapter, layout)
    with_A = shared is None or any(shared.source.get(name) is not update.A for name, update in adapter.items())
    ranks = _ranks(adapter, layout)
    if not with_A and shared is not None and ranks != shared.ranks:
        with_A = True  # it leaves modules out: its rows do not line up with the trunk's
    sizes = [_sizes(block, ranks, with_A) for block in layout.blocks]
    flat = torch.empty(sum(map(sum, sizes)), dtype=layout.dtype, pin_memory=pin)
    blocks = tuple(flat.split_with_sizes([sum(part) for part in sizes]))
    scale = _common_scale(adapter)
    for block, memory, part in zip(layout.blocks, blocks, sizes, strict=True):
        _fill(block, memory.split_with_sizes(part), adapter, ranks, with_A, fold=scale is None)
    parts = tuple(views(memory, part) for memory, part in zip(blocks, sizes, strict=True))
    one = 1.0 if scale is None else scale
    return PackedExpert(blocks, parts, ranks, one, None if with_A else shared, _one_set(frozenset(adapter)), flat)


@torch.inference_mode(False)
@torch.no_grad()
def moved(expert: PackedExpert, layout: Layout) -> PackedExpert:
    """The expert on the devices of the base's blocks, by one copy if that is one device.

    Copies from pinned memory do not wait; torch does not give that memory to others before they are done.
    """
    devices = {block.device for block in layout.blocks}
    if len(devices) == 1 and expert.whole is not None:
        return lying(expert, expert.whole.to(devices.pop(), non_blocking=True), layout)
    blocks = tuple(
        flat.to(block.device, non_blocking=True) for flat, block in zip(expert.blocks, layout.blocks, strict=True)
    )
    return _in_blocks(expert, blocks, None, layout)


def lying(expert: PackedExpert, whole: Tensor, layout: Layout) -> PackedExpert:
    """An expert like this one, whose blocks lie end to end in `whole`."""
    blocks = whole.split_with_sizes([block.numel() for block in expert.blocks])
    return _in_blocks(expert, tuple(blocks), whole, layout)


def _in_blocks(expert: PackedExpert, blocks: tuple[Tensor, ...], whole: Tensor | None, layout: Layout) -> PackedExpert:
    with_A = expert.shared is None
    parts = tuple(
        views(memory, _sizes(block, expert.ranks, with_A)) for memory, block in zip(blocks, layout.blocks, strict=True)
    )
    return PackedExpert(blocks, parts, expert.ranks, expert.scale, expert.shared, expert.modules, whole)


def views(flat: Tensor, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Consecutive parts of a flat tensor, to be put together by `join`: as bytes in main memory, else as tensors."""
    if flat.device.type != "cpu":
        return tuple(flat.split_with_sizes(list(sizes)))
    ends = np.cumsum([0, *sizes]) * flat.element_size()
    whole = flat.view(torch.uint8).numpy()
    return tuple(whole[start:end] for start, end in itertools.pairwise(ends.tolist()))


def join(parts: Sequence[Any], out: Tensor) -> None:
    """Writes parts made by `views` one after another into a flat tensor.

    numpy copies them at the speed of memory, large ones in two threads; torch's `cat`, with several threads, takes half
    as long again for small parts.
    """
    if out.device.type != "cpu":
        torch.cat(list(parts), out=out)
        return
    whole = out.view(torch.uint8).numpy()
    if out.nbytes < _LARGE or torch.get_num_threads() == 1:
        np.concatenate(parts, out=whole)
        return
    half = len(parts) // 2
    cut = sum(part.nbytes for part in parts[:half])
    other = _helper().submit(np.concatenate, parts[:half], out=whole[:cut])
    np.concatenate(parts[half:], out=whole[cut:])
    other.result()


def check_fits(adapter: Adapter, layout: Layout) -> None:
    """Raises BankError for a module that the base lacks, has in another shape, or does not call."""
    shapes = {target.name: (target.d_out, target.d_in) for target in layout.targets}
    for target in layout.targets:
        if target.bypassed and target.name in adapter:
            check_called(target, adapter[target.name].B)
    for name, update in adapter.items():
        found = (update.B.shape[0], update.A.shape[1])
        if name not in shapes:
            raise BankError(
                f"the expert changes {name!r}, which the base model does not have",
                "was the bank built for another base? see `localmoe info BANK`",
            )
        if found != shapes[name]:
            raise BankError(
                f"the expert changes {name} as if it were {list(found)}, and it is {list(shapes[name])}",
                "was the bank built for another base? see `localmoe info BANK`",
            )


def check_called(target: Target, update: Tensor) -> None:
    """Raises BankError for a change, other than zero, of a weight that the base reads without a call.

    Beside the weight it would do nothing, as it did in training; merged into the weight it would do something else.
    """
    if bool(update.any()):
        raise BankError(
            f"the expert changes {target.name!r}, whose weight the base reads without calling it: what it does there "
            "would depend on how the mix is run",
            "train or export the expert without this module",
        )


def _ranks(adapter: Adapter, layout: Layout) -> tuple[int, ...]:
    return _one(tuple(adapter[target.name].rank if target.name in adapter else 0 for target in layout.targets))


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="localmoe-copy")


@lru_cache(maxsize=64)
def _one(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The same tuple for equal ranks, so that comparing them costs nothing."""
    return ranks


@lru_cache(maxsize=64)
def _one_set(modules: frozenset[str]) -> frozenset[str]:
    """The same for the modules."""
    return modules


def _sizes(block: Block, ranks: tuple[int, ...], with_A: bool) -> list[int]:
    A = [ranks[target.place] * target.d_in for target in block.targets] if with_A else []
    return A + [ranks[target.place] * target.d_out for target in block.targets]


def _common_scale(adapter: Adapter) -> float | None:
    """The one value of all c, or None."""
    first = next(iter(adapter.values())).c[0]
    alike = all(bool((update.c == first).all()) for update in adapter.values())
    return float(first) if alike else None


def _fill(
    block: Block, factors: Sequence[Tensor], adapter: Adapter, ranks: tuple[int, ...], with_A: bool, fold: bool
) -> None:
    targets = block.targets
    for i, target in enumerate(targets):
        rank = ranks[target.place]
        if rank == 0:
            continue
        update = adapter[target.name]
        if with_A:
            factors[i].view(rank, target.d_in).copy_(update.A)
        B = update.B.float() * update.c if fold else update.B
        factors[len(targets) * with_A + i].view(rank, target.d_out).copy_(B.t())
