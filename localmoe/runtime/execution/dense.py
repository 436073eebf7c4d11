"""Dense execution: the merged weights in a second buffer; the base weights are never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from localmoe.errors import BankError, UsageError
from localmoe.lora import weight_of
from localmoe.runtime.execution import kernels
from localmoe.runtime.execution.copies import Copies, Copy
from localmoe.runtime.execution.kernels import lay, located, merge
from localmoe.runtime.execution.layout import Block, Layout, Target
from localmoe.runtime.execution.packed import check_called
from localmoe.runtime.execution.replay import Graphs, Stage
from localmoe.runtime.execution.workspace import Active, Factors, Workspace, level_for

Product = tuple[Target, Tensor, Tensor]
"""A target, its Aᵀ [d_in, R] and its Bt [R, d_out]."""


class _Gathered(NamedTuple):
    """The factors of one block; `pieces`: Bt target by target and expert by expert, which the weights multiply."""

    factors: Factors
    products: list[Product]
    pieces: list[Tensor]


class DenseBuffer:
    """One more copy of the target weights, written anew for every mix: W = W0 + Σ w_k B_k A_k.

    Allocated when first used; costs the bytes of the target weights. Nothing has to be restored afterwards, since W0
    stays where it is: outside `attached` the modules point to it. more_bytes: for copies beside that one, each of which
    keeps a mix, so that it need not be merged again.
    """

    def __init__(self, layout: Layout, more_bytes: int = 0) -> None:
        self._layout = layout
        plain = [weight_of(target.module).nbytes for target in layout.targets if is_plain(target.module)]
        self._weights = sum(plain)
        self._more = more_bytes // max(1, self._weights)
        self._copies = Copies(self._more)
        self._workspaces = Workspace(layout, whole=False), Workspace(layout, whole=False)
        self._sums = Workspace(layout, whole=True)
        self._stage = Stage(layout)
        self._level = level_for(layout)
        self._tiles = kernels.Buffer()
        self._gathered: dict[int, _Gathered] = {}
        self._both = torch.empty(0)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Memory held, the workspace included."""
        held = sum(workspace.bytes for workspace in self._workspaces) + self._both.nbytes + self._stage.memory.nbytes
        held += self._tiles.bytes + self._sums.bytes
        return held + self._copies.bytes

    @property
    def bytes_missing(self) -> int:
        """Memory that copies of the weights will take beside what they hold."""
        return max(0, (1 + self._more) * self._weights - self._copies.bytes)

    def holds(self, key: object) -> bool:
        """Whether the mix of this name is merged already."""
        return key in self._copies

    def forget(self) -> None:
        """Lets go of all merged mixes."""
        self._copies.forget()

    @property
    def _buffers(self) -> Copy:
        return self._copies.now

    @torch.no_grad()
    def write(self, active: Active, key: object = None) -> None:
        """Merges one mix into the buffer: by tiles, or one `addmm` a weight; nothing to do if `key` is held.

        w_k goes into Bt, in fp32 arithmetic, rounded once to the dtype of the base. Raises UsageError for weights that
        are offloaded, quantised or spread over devices.
        """
        if self._copies.turn_to(key):
            return
        if self._by_tiles:
            self._write_tiles(active)
        elif self._level > 0 and active.shared is None:
            self._write_laid(active)
        elif self._side is not None:
            self._write_on_gpu(active, self._side)
        else:
            for index in range(len(self._layout.blocks)):
                for target, At, Bt in self._gather(index, active, self._workspaces[0]):
                    if len(Bt) > 0:
                        self._merge(target, At, Bt)
                    else:
                        self._keep(target)
        self._copies.held = key  # now it is whole

    @cached_property
    def _by_tiles(self) -> bool:
        """Whether `kernels.merge` takes these weights; it is faster than `addmm` whatever the ranks."""
        return self._level == 2 and all(_suits_tiles(target.module) for target in self._layout.targets)

    @cached_property
    def _side(self) -> torch.cuda.Stream | None:
        """A second stream, where the base is on one GPU."""
        devices = {block.device for block in self._layout.blocks}
        one = len(devices) == 1 and all(device.type == "cuda" for device in devices)
        return torch.cuda.Stream(devices.pop()) if one else None  # type: ignore[no-untyped-call]

    @cached_property
    def _graphs(self) -> Graphs:
        """The merges of the last kinds of mixes as CUDA graphs."""
        return Graphs(self._layout.blocks[0].device, self._addresses)

    def _addresses(self) -> tuple[int, ...]:
        """Where all that a merge from the stage reads and writes lies."""
        memory = [self._stage.memory, *self._workspaces[0].memory, *self._workspaces[1].memory]
        weights = [target.module._parameters["weight"] for target in self._layout.targets]
        return tuple(held.data_ptr() for held in (*memory, *self._buffers.values(), *weights))  # type: ignore[union-attr]

    def _write_on_gpu(self, active: Active, side: torch.cuda.Stream) -> None:
        """The same on a GPU, from a CUDA graph once two mixes of the kind have come, where the stage takes them."""
        staged = self._stage.fill(active)
        if staged is None:
            self._write_ahead(active, side, weighted=False)
            return
        kind, here = staged
        self._graphs.run(kind, lambda: self._write_ahead(here, side, weighted=True))

    def _write_ahead(self, active: Active, side: torch.cuda.Stream, weighted: bool) -> None:
        """While one block is multiplied, the second stream gathers the next and copies its W0.

        A block's workspace is the one of the block before the last, which has to be multiplied by then.
        """
        main, multiplied = torch.cuda.current_stream(side.device), list[torch.cuda.Event]()
        side.wait_stream(main)
        for index in range(len(self._layout.blocks)):
            with torch.cuda.stream(side):
                if index >= len(self._workspaces):
                    side.wait_event(multiplied[index - len(self._workspaces)])
                workspace = self._workspaces[index % len(self._workspaces)]
                products = self._gather(index, active, workspace, weighted)
                changed = [target for target, _, Bt in products if len(Bt) > 0 or target.name in self._buffers]
                if changed:
                    weights = [weight_of(target.module) for target in changed]
                    torch._foreach_copy_([self._target(target) for target in changed], weights)
                copied = side.record_event()
            main.wait_event(copied)
            for target, At, Bt in products:
                if len(Bt) > 0:
                    self._target(target).addmm_(Bt.t(), At.t())
            multiplied.append(main.record_event())

    def _gather(self, index: int, active: Active, workspace: Workspace, weighted: bool = False) -> list[Product]:
        """The products of a block, with the weights in Bt; `weighted`: they are in it already."""
        block = self._layout.blocks[index]
        factors = workspace.fill(index, active)
        if index not in self._gathered or self._gathered[index].factors is not factors:
            pieces = _pieces(block, factors, active) if active.shared is None else []
            self._gathered[index] = _Gathered(factors, _products(block, factors), pieces)
        _, products, pieces = self._gathered[index]
        if pieces and not weighted:  # a launch or two on a GPU
            torch._foreach_mul_(pieces, active.scalars * len(block.targets))
        return products

    def _write_tiles(self, active: Active) -> None:
        """The same by `kernels.merge`, all targets at once; experts of one A are summed before."""
        factors, weights = self._factors(active)
        changed = factors.rows.sum(axis=1) > 0
        linears = []
        for target, here in zip(self._layout.targets, changed, strict=True):
            if not here:
                self._keep(target)
                continue
            if target.name not in self._buffers:
                self._target(target)
            base, out = target.module._parameters["weight"], self._buffers[target.name]
            linears.append((target.d_in, target.d_out, base.data_ptr(), out.data_ptr()))  # type: ignore[union-attr]
        if linears:
            factors = kernels.Factors(*(part[changed] for part in factors))
            merge(np.array(linears).T.copy(), factors, weights, self._tiles)

    def _factors(self, active: Active) -> tuple[kernels.Factors, Tensor]:
        """Where the factors of all targets lie [targets, N], and the weights [N] of the experts they are of."""
        shared = active.shared
        if shared is None:
            A, Bt = active.addresses
            return kernels.Factors(A, Bt, np.array([expert.ranks for expert in active.experts]).T), active.weights[0]
        summed, where = [], []
        for index, parts in enumerate(shared.parts):
            summed += [Bt.data_ptr() for Bt in self._sums.fill(index, active).Bt]
            where += [kernels.address(part) for part in parts]
        counts = np.array(shared.ranks)[:, None]
        return kernels.Factors(np.array(where)[:, None], np.array(summed)[:, None], counts), torch.ones(1)

    def _write_laid(self, active: Active) -> None:
        """The same by `kernels.lay`, target by target, into memory that the nearest caches hold."""
        A, Bt = active.addresses
        weights = active.weights[0]
        counts = np.array([expert.ranks for expert in active.experts]).T  # [targets, N]
        kinds = {row: np.array([row, row]) for row in set(map(tuple, counts.tolist()))}
        totals = counts.sum(axis=1).tolist()
        for target, total, row in zip(self._layout.targets, totals, map(tuple, counts.tolist()), strict=True):
            if total == 0:
                self._keep(target)
                continue
            rows = kinds[row]
            all_A, all_B, out = self._laid(total, target)
            lay(located(A, target.place, rows), located(Bt, target.place, rows), weights, all_A, all_B)
            if out is not None:
                torch.addmm(target.module._parameters["weight"], all_B, all_A, out=out)  # type: ignore[arg-type]
            else:
                self._merge(target, all_A.t(), all_B.t())

    def _laid(self, rank: int, target: Target) -> tuple[Tensor, Tensor, Tensor | None]:
        """Memory for A [rank, d_in] and B [d_out, rank] of a target, used again for the next, and a linear's buffer."""
        sizes = rank * target.d_in, rank * target.d_out
        if self._both.numel() < sum(sizes):
            self._views = {}
            with torch.inference_mode(False):
                self._both = torch.empty(sum(sizes), dtype=self._layout.dtype, device="cpu")
        if target.place not in self._views or len(self._views[target.place][0]) != rank:
            all_A, all_B = self._both[: sum(sizes)].split_with_sizes(sizes)
            self._views[target.place] = all_A.view(rank, target.d_in), all_B.view(target.d_out, rank)
        out = self._target(target) if isinstance(target.module, nn.Linear) else None
        return *self._views[target.place], out

    @torch.no_grad()
    def write_deltas(self, deltas: Mapping[str, Tensor], key: object = None) -> None:
        """Merges dense updates ΔW [d_out, d_in] into the buffer; targets without one keep the base's weights.

        Nothing to do if `key` is held. Raises as `write` does, and BankError for a module that the base lacks, has in
        another shape, or does not call.
        """
        if self._copies.turn_to(key):
            return
        targets = {target.name: target for target in self._layout.targets}
        for name, delta in deltas.items():
            if name not in targets or tuple(delta.shape) != (targets[name].d_out, targets[name].d_in):
                raise BankError(
                    f"the merged update of {name!r}, {list(delta.shape)}, does not fit the base model",
                    "was the bank built for another base? see `localmoe info BANK`",
                )
        for name, target in targets.items():
            base = weight_of(target.module)
            if name in deltas:
                if target.bypassed:
                    check_called(target, deltas[name])
                self._target(target).copy_(base.float() + deltas[name].to(base.device).float())
            else:
                self._keep(target)
        self._copies.held = key

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with the buffer in place of the weights it holds, for as long as the context lasts."""
        swaps = [
            (target.module._parameters, self._buffers[target.name])
            for target in self._layout.targets
            if target.name in self._buffers
        ]
        originals = [parameters["weight"] for parameters, _ in swaps]
        try:
            for parameters, buffer in swaps:
                parameters["weight"] = buffer
            yield
        finally:
            for (parameters, _), weight in zip(swaps, originals, strict=True):
                parameters["weight"] = weight

    def _keep(self, target: Target) -> None:
        """The base's own weight, of a target that no expert changes."""
        if target.name in self._buffers:
            self._target(target).copy_(weight_of(target.module))

    def _merge(self, target: Target, At: Tensor, Bt: Tensor) -> None:
        out = self._target(target)
        if isinstance(target.module, nn.Linear):
            torch.addmm(target.module.weight, Bt.t(), At.t(), out=out)
        else:  # Conv1D keeps [d_in, d_out]
            torch.addmm(weight_of(target.module).t(), At, Bt, out=out.t())

    def _target(self, target: Target) -> Tensor:
        """The buffer of a target as [d_out, d_in]."""
        if target.name not in self._buffers:
            check_plain(target)
            weight = target.module._parameters["weight"]
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside it
                self._buffers[target.name] = nn.Parameter(torch.empty_like(weight), requires_grad=False)  # type: ignore[arg-type]
        data = self._buffers[target.name].data
        return data if isinstance(target.module, nn.Linear) else data.t()


def check_plain(target: Target) -> None:
    """Raises UsageError for a weight that cannot be merged into."""
    if not is_plain(target.module):
        raise UsageError(
            f"{target.name} is offloaded, quantised or spread over devices, and cannot be merged into",
            "load the base with all its weights in memory, in a floating-point dtype; "
            "a quantised one runs with --execution stacked",
        )


def is_plain(module: nn.Module) -> bool:
    """Whether the weight of a linear is an ordinary floating-point matrix in memory."""
    weight = module._parameters["weight"]
    return type(weight) is nn.Parameter and not weight.is_meta and weight.is_floating_point()


def _suits_tiles(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    plain = isinstance(module, nn.Linear) and is_plain(module)
    return plain and weight is not None and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def _products(block: Block, factors: Factors) -> list[Product]:
    """Every target of a block with its own part of Aᵀ, and Bt."""
    found, targets = [], iter(zip(block.targets, factors.Bt, strict=True))
    for group, At in zip(block.groups, factors.At, strict=True):
        start = 0
        for _ in group:
            target, Bt = next(targets)
            found.append((target, At[:, start : start + len(Bt)], Bt))
            start += len(Bt)
    return found


def _pieces(block: Block, factors: Factors, active: Active) -> list[Tensor]:
    """The rows of every expert in all Bt of a block, target by target."""
    parts: list[Tensor] = []
    for target, Bt in zip(block.targets, factors.Bt, strict=True):
        parts += Bt.split_with_sizes([expert.ranks[target.place] for expert in active.experts])
    return parts
