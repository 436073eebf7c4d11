"""Merging on one GPU without launching every kernel anew: factors at fixed places, and CUDA graphs that read them."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from localmoe.runtime.execution.layout import Layout
from localmoe.runtime.execution.packed import PackedExpert, lying
from localmoe.runtime.execution.workspace import Active

KINDS = 16
"""As many kinds of mixes (that is mostly: numbers of experts) keep their graph."""

Kind = tuple[tuple[int, ...], ...]
"""The ranks of a mix's experts: what decides where their factors lie."""


class _Laid(NamedTuple):
    """Mixes of one kind in a stage; `pieces`: Bt expert by expert, `counts` of each, which the weights multiply."""

    active: Active
    pieces: list[Tensor]
    counts: list[int]


class Stage:
    """Memory on one device in which the factors of all mixes of a kind lie at the same places, the weights in Bt.

    Grows to the bytes of the largest mix's experts.
    """

    def __init__(self, layout: Layout) -> None:
        self.memory = torch.empty(0, device="cpu")
        self._layout = layout
        self._laid: OrderedDict[Kind, _Laid] = OrderedDict()
        self._most = math.inf

    def fill(self, active: Active) -> tuple[Kind, Active] | None:
        """Copies a mix in here; its kind, and the mix here, its weights in it already.

        None if there is no room, or if experts share A (they become one expert) or do not lie in one piece.
        """
        wholes = [expert.whole for expert in active.experts if expert.whole is not None and expert.shared is None]
        size = sum(whole.numel() for whole in wholes)
        if len(wholes) < len(active.experts) or not self._holds(size):
            return None
        kind = tuple(expert.ranks for expert in active.experts)
        if kind not in self._laid:
            self._laid[kind] = self._lay(active)
            if len(self._laid) > KINDS:
                self._laid.popitem(last=False)
        self._laid.move_to_end(kind)
        laid = self._laid[kind]
        torch.cat(wholes, out=self.memory[:size])
        weights = zip(active.scalars, laid.counts, strict=True)
        torch._foreach_mul_(laid.pieces, [weight for weight, count in weights for _ in range(count)])
        return kind, laid.active

    @torch.inference_mode(False)  # what is made in that mode cannot be written outside it
    def _holds(self, size: int) -> bool:
        """Whether so many numbers fit, after growing if need be."""
        if size > self._most:
            return False
        if self.memory.numel() < size:
            self._laid.clear()
            self.memory = torch.empty(0, device="cpu")  # what there was goes first
            try:
                self.memory = torch.empty(size, dtype=self._layout.dtype, device=self._layout.blocks[0].device)
            except torch.OutOfMemoryError:
                self._most = size - 1
                return False
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay(self, active: Active) -> _Laid:
        sizes = [expert.whole.numel() for expert in active.experts]  # type: ignore[union-attr]
        parts = self.memory[: sum(sizes)].split_with_sizes(sizes)
        experts = tuple(lying(expert, part, self._layout) for expert, part in zip(active.experts, parts, strict=True))
        pieces = [self._second(expert) for expert in experts]
        here = Active(experts, torch.ones(1, len(experts), device="cpu"))
        return _Laid(here, [piece for own in pieces for piece in own], [len(own) for own in pieces])

    def _second(self, expert: PackedExpert) -> list[Tensor]:
        """All Bt of an expert, block by block, where there are any: each block has its A first."""
        ends = [
            sum(expert.ranks[target.place] * target.d_in for target in block.targets) for block in self._layout.blocks
        ]
        found = [flat[end:] for flat, end in zip(expert.blocks, ends, strict=True)]
        return [piece for piece in found if piece.numel() > 0]


class Graphs:
    """CUDA graphs of work that reads and writes the same memory whenever it is of the same kind.

    Launching the hundreds of kernels of a merge one by one takes longer than running them. The first work of a kind
    runs as it is (libraries set themselves up, memory is made), the second is captured, and from then on the graph is
    replayed. addresses: where all the memory lies; once it lies elsewhere no graph is right, and all begin anew.
    """

    def __init__(self, device: torch.device, addresses: Callable[[], tuple[int, ...]]) -> None:
        self.graphs: OrderedDict[Kind, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._addresses = addresses
        self._known: tuple[int, ...] = ()
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._failed: torch.cuda.CUDAGraph | None = None

    def run(self, kind: Kind, work: Callable[[], None]) -> None:
        """Does the work, or replays what it did before; it must allocate nothing that its first run has not made."""
        if self._failed is not None or kind not in self.graphs or self._addresses() != self._known:
            self._aside(work)
            self._remember(kind)
            return
        self.graphs.move_to_end(kind)
        graph = self.graphs[kind]
        if graph is None:
            graph = self._captured(work)
            if graph is None:
                self._aside(work)
                return
            self.graphs[kind] = graph
        graph.replay()

    def _remember(self, kind: Kind) -> None:
        """Notes that a kind has run, and where the memory lies now: the work may have made some, or it has moved."""
        now = self._addresses()
        if now != self._known:
            self.graphs.clear()
            self._known = now
        self.graphs[kind] = None
        if len(self.graphs) > KINDS:
            self.graphs.popitem(last=False)

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The work as a graph, not run yet; None, and no other attempt, where that fails.

        Not by `torch.cuda.graph`, which empties the allocator's cache. Other threads may go on meanwhile.
        """
        graph = torch.cuda.CUDAGraph()

        def record() -> None:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()

        try:
            self._aside(record)
        except RuntimeError as error:
            self._failed = graph  # torch's allocator may still ask it
            self.graphs.clear()
            warnings.warn(f"merging goes on without CUDA graphs, slower: {error}", stacklevel=2)
            return None
        return graph

    def _aside(self, work: Callable[[], None]) -> None:
        """Runs it on a stream of its own (the current one may be the default stream, which cannot be captured)."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            main.wait_stream(self._stream)
