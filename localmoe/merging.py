"""Merging: the weighted updates of several experts → one update per module; no files, no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from localmoe.errors import BankError, UsageError
from localmoe.lora import Adapter, LowRank, stack
from localmoe.registry import Registry

Merger = Callable[[Sequence[LowRank]], LowRank | Tensor]
"""One module's updates, already weighted (in c) → a LowRank, or a dense ΔW [d_out, d_in] in fp32."""

mergers: Registry[Merger] = Registry("merger")


@mergers.register("linear")
def linear(updates: Sequence[LowRank]) -> LowRank:
    """ΔW = Σ_k ΔW_k, exactly, by stacking the factors; at rank r if all share one A."""
    return stack(updates)


def merge_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = "linear"
) -> dict[str, LowRank | Tensor]:
    """ΔW of every module, merged from w_k · ΔW_k of all experts k; `linear`: Σ_k w_k B_k·diag(c_k)·A_k.

    Ranks may differ between experts; modules and their shapes may not. Raises UsageError for no adapters (a
    mix without experts is the base model), another number of weights than of adapters, or a weight that is
    not finite; BankError for a module that an expert lacks or has in another shape; UnknownNameError.
    """
    merger = mergers[method]
    if not adapters:
        raise UsageError("no adapters to merge", "a mix without experts is the base model: run it as it is")
    if len(adapters) != len(weights):
        raise UsageError(f"{len(adapters)} adapters cannot be merged with {len(weights)} weights")
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"adapters can be merged with finite weights only, not {list(weights)}")
    _check_alike(adapters)
    return {
        module: merger([adapter[module].scaled(weight) for adapter, weight in zip(adapters, weights, strict=True)])
        for module in adapters[0]
    }


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Raises BankError unless all adapters update the same modules, of the same shapes."""
    modules = {module: None for adapter in adapters for module in adapter}
    shapes = {module: _shape(module, adapters[0][module]) for module in adapters[0]}
    for place, adapter in enumerate(adapters):
        for module in modules:
            if module not in adapter:
                raise BankError(
                    f"adapter {place} of the {len(adapters)} to merge has no update for module {module!r}",
                    "merge experts of one bank: they are trained on the same modules",
                )
        for module, update in adapter.items():
            shape = _shape(module, update)
            if shape != shapes[module]:
                raise BankError(
                    f"adapter {place} of the {len(adapters)} to merge updates module {module!r} of shape "
                    f"{list(shape)}, adapter 0 one of shape {list(shapes[module])}",
                    "merge experts of one bank: they are trained on the same base model",
                )


def _shape(module: str, update: LowRank) -> tuple[int, int]:
    """[d_out, d_in] of an update; raises BankError if its factors do not share one rank."""
    if update.A.ndim != 2 or update.B.ndim != 2 or not update.A.shape[0] == update.B.shape[1] == update.rank:
        raise BankError(
            f"the update of module {module!r} is not of one rank: A {list(update.A.shape)}, "
            f"B {list(update.B.shape)}, c {list(update.c.shape)}",
            "train or import this expert again",
        )
    return update.B.shape[0], update.A.shape[1]
