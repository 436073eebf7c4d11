"""Execution: the merged weights in a second buffer; the base weights are never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from localmoe.errors import BankError, UsageError
from localmoe.lora import LowRank, weight_of
from localmoe.models import target_linears


class DenseBuffer:
    """One more copy of the target weights, written anew for every mix: W = W0 + ΔW.

    Allocated when first used; costs the bytes of the target weights. Nothing has to be restored afterwards,
    since W0 stays where it is: on leaving the context the modules point to it again.
    """

    def __init__(self, model: Any) -> None:
        self._targets = target_linears(model)
        self._buffers: dict[str, nn.Parameter] = {}

    @contextmanager
    def merged(self, updates: Mapping[str, LowRank | Tensor]) -> Iterator[None]:
        """The model with `updates` (module name → ΔW) merged in, for as long as the context lasts.

        No updates = the base model. Raises BankError for a module that the base lacks or has in another shape,
        UsageError for weights that are offloaded or quantised.
        """
        unknown = sorted(set(updates) - set(self._targets))
        if unknown:
            raise BankError(
                f"the expert changes {unknown[0]!r}, which the base model does not have",
                "was the bank built for another base? see `localmoe info BANK`",
            )
        originals = {name: self._targets[name]._parameters["weight"] for name in updates}
        try:
            for name, update in updates.items():
                self._targets[name]._parameters["weight"] = self._write(name, update)
            yield
        finally:
            for name, weight in originals.items():
                self._targets[name]._parameters["weight"] = weight

    @torch.no_grad()
    def _write(self, name: str, update: LowRank | Tensor) -> nn.Parameter:
        module = self._targets[name]
        weight = module._parameters["weight"]
        if weight is None or weight.is_meta or not weight.is_floating_point():
            raise UsageError(
                f"{name} is offloaded or quantised, and cannot be merged into",
                "load the base with all its weights in memory, in a floating-point dtype",
            )
        shape = (update.B.shape[0], update.A.shape[1]) if isinstance(update, LowRank) else tuple(update.shape)
        base = weight_of(module)
        if shape != tuple(base.shape):
            raise BankError(
                f"the expert changes {name} as if it were {list(shape)}, and it is {list(base.shape)}",
                "was the bank built for another base? see `localmoe info BANK`",
            )
        if name not in self._buffers:
            self._buffers[name] = nn.Parameter(torch.empty_like(weight), requires_grad=False)
        buffer = self._buffers[name]
        target = buffer.data if base is weight else buffer.data.t()
        if isinstance(update, LowRank):
            scaled = (update.B.to(base.device, torch.float32) * update.c.to(base.device)).to(base.dtype)
            torch.addmm(base, scaled, update.A.to(base.device, base.dtype), out=target)
        else:
            torch.add(base, update.to(base.device, base.dtype), out=target)
        return buffer
