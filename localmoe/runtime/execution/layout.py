"""Layout: which linears of a base read the same input, and in which order a forward pass comes to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localmoe.models import target_linears

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True, eq=False)
class Target:
    """One linear that experts change; `place` is its index among all targets of the layout.

    bypassed: the base reads its weight and does not call it, so that nothing beside the weight would be heard of.
    """

    name: str
    module: nn.Module
    place: int
    d_in: int
    d_out: int
    bypassed: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """The targets of one layer of the base, in groups that read one and the same input (q, k, v; gate, up)."""

    name: str
    groups: tuple[tuple[Target, ...], ...]
    device: torch.device

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets of the block, in the order in which factors are packed."""
        return tuple(target for group in self.groups for target in group)


@dataclass(frozen=True, eq=False)
class Layout:
    """The targets of a base, block by block in the order of a forward pass."""

    blocks: tuple[Block, ...]
    dtype: torch.dtype

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets, by place."""
        return tuple(target for block in self.blocks for target in block.targets)


def layout(model: Any) -> Layout:
    """The layout of a base, found by one forward pass of two tokens that records every target's input.

    A target that this pass does not come to stands in a group of its own, after the others.
    """
    modules = target_linears(model)
    seen, logits = _inputs(model, modules)
    groups = _grouped(list(modules), seen)
    called = {name for name, _ in seen}
    bypassed = _bypassed(model, {name: module for name, module in modules.items() if name not in called}, logits)
    names: dict[str, list[list[str]]] = {}
    for group in groups:
        names.setdefault(_layer(group[0]), []).append(group)
    place, blocks = 0, []
    for layer, members in names.items():
        made = []
        for group in members:
            made.append(tuple(_target(name, modules[name], place + i, bypassed) for i, name in enumerate(group)))
            place += len(group)
        weight = made[0][0].module.weight
        blocks.append(Block(layer, tuple(made), weight.device))  # type: ignore[arg-type]
    return Layout(tuple(blocks), model.dtype)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear, whatever form its weight is stored in (quantised ones are packed)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]


@torch.inference_mode()
def _inputs(model: Any, modules: dict[str, nn.Module]) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Name and input of every target, in the order of the calls, and the logits of the pass.

    The inputs are kept, so that identity means one.
    """
    seen: list[tuple[str, Tensor]] = []
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():  # no hooks: a base's own code may call `forward` itself
            module.__dict__["forward"] = _noting(seen, name, module.forward)
        logits = _pass(model)
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]
    return seen, logits


def _noting(seen: list[tuple[str, Tensor]], name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(*given: Tensor, **named: Tensor) -> Tensor:
        seen.append((name, next(iter((*given, *named.values())))))
        return forward(*given, **named)

    return noted


def _pass(model: Any) -> Tensor:
    """Logits of two tokens."""
    logits: Tensor = model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False).logits
    return logits


@torch.inference_mode()
def _bypassed(model: Any, modules: dict[str, nn.Module], logits: Tensor) -> frozenset[str]:
    """Those of the modules, which the pass that gave `logits` did not call, whose weights it read all the same.

    With a weight that is not a number a pass gives other logits if it reads it, called or not (torch's own attention
    reads its output projection so). A linear that this pass has no use for, such as that of an expert of the base's
    own, is none of them.
    """
    plain = {name: module for name, module in modules.items() if type(module._parameters["weight"]) is nn.Parameter}
    plain = {name: module for name, module in plain.items() if _can_be_nan(module)}
    if not plain or not _reads(model, list(plain.values()), logits):
        return frozenset()
    return frozenset(name for name, module in plain.items() if _reads(model, [module], logits))


def _can_be_nan(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    return weight is not None and weight.is_floating_point() and not weight.is_meta


def _reads(model: Any, modules: Sequence[nn.Module], logits: Tensor) -> bool:
    """Whether two tokens get other logits once these weights are no numbers."""
    before = [module._parameters["weight"] for module in modules]
    try:
        for module, weight in zip(modules, before, strict=True):
            nothing = torch.full((1, 1), float("nan"), dtype=weight.dtype, device=weight.device)  # type: ignore[union-attr]
            module._parameters["weight"] = nn.Parameter(nothing.expand(weight.shape), requires_grad=False)  # type: ignore[union-attr]
        return not torch.equal(_pass(model), logits)
    finally:
        for module, weight in zip(modules, before, strict=True):
            module._parameters["weight"] = weight


def _grouped(names: Sequence[str], seen: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    """Consecutive calls of one layer with one input form a group."""
    groups: list[list[str]] = []
    last: Tensor | None = None
    known: set[str] = set()
    for name, given in seen:
        if name in known:  # called more than once a pass: it stays where it was first
            continue
        known.add(name)
        if given is last and _layer(groups[-1][-1]) == _layer(name):
            groups[-1].append(name)
        else:
            groups.append([name])
        last = given
    return groups + [[name] for name in names if name not in known]


def _target(name: str, module: nn.Module, place: int, bypassed: frozenset[str]) -> Target:
    d_out, d_in = shape_of(module)
    return Target(name, module, place, d_in, d_out, name in bypassed)


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`."""
    match = _LAYER.match(name)
    return match[0] if match is not None else ""
