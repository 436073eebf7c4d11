"""Quantisation of a base in memory: its linears in 8 or 4 bits; the one importer of torchao and bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from localmoe.errors import UsageError
from localmoe.models import keep_packing, target_linears

KINDS = ("int8", "int4", "nf4")
"""What a base can be quantised to: `int8` has one scale a row, `int4` a scale and a zero for 32 weights, `nf4` the 16
values of QLoRA and a scale for 64. Weights alone are rounded."""

_GROUP = 32
_ROWS = 16  # torch's product with int4 takes rows of a weight by so many
_BLOCK = 64  # of nf4; bitsandbytes reads rows of other lengths wrongly on a processor
_PACKAGES = {"int8": ("torchao", "quantised"), "int4": ("torchao", "quantised"), "nf4": ("bitsandbytes", "nf4")}


def quantise(model: Any, kind: str) -> None:
    """Rounds the target linears of a base to `kind`, in place; head, embeddings and norms stay as they are.

    A linear whose shape 4 bits do not suit goes to 8 bits with `int4`, and stays as it is with `nf4`. Experts then run
    beside the weights, for nothing can be merged into them. Raises UsageError for another kind, for linears that are
    no nn.Linear or are quantised already, for `int4` on a GPU, and where the package is missing.
    """
    if kind not in KINDS:
        raise UsageError(f"a base cannot be quantised to {kind!r}", f"choose {' or '.join(KINDS)}")
    package, extra = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"quantising to {kind} needs the package {package}", f"pip install 'localmoe[{extra}]'")
    targets = target_linears(model)
    for name, module in targets.items():
        _check(name, module, kind)
    if kind == "nf4":
        _to_nf4(model, targets)
    else:
        _to_integers(model, targets, kind)
    model.requires_grad_(False)


def _check(name: str, module: nn.Module, kind: str) -> None:
    weight = module._parameters["weight"]
    if getattr(module, "quant_state", None) is not None or type(weight) is not nn.Parameter:
        raise UsageError(f"the base is quantised already: {name} has {type(weight).__name__}", "leave out --quantised")
    if type(module) is not nn.Linear:
        raise UsageError(
            f"{name} is a {type(module).__name__}, which cannot be quantised", "leave out --quantised, or change --base"
        )
    if kind == "int4" and weight.device.type != "cpu":
        raise UsageError("int4 runs on a processor alone", "on a GPU: --quantised nf4, or int8")


def _to_integers(model: Any, targets: Mapping[str, Any], kind: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    four: set[str] = set()
    if kind == "int4":
        four = _to_int4(model, targets)
    eight = targets.keys() - four
    settings = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, settings, filter_fn=lambda _module, name: name in eight)


def _to_int4(model: Any, targets: Mapping[str, Any]) -> set[str]:
    """Names of the linears that went to 4 bits."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    suited = {
        name
        for name, module in targets.items()
        if module.in_features % _GROUP == 0 and module.out_features % _ROWS == 0
    }
    settings = PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)
    quantize_(model, settings, filter_fn=lambda _module, name: name in suited)
    return suited


def _to_nf4(model: Any, targets: Mapping[str, Any]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    suited = {name: module for name, module in targets.items() if module.in_features % _BLOCK == 0}
    if not suited:
        raise UsageError(
            f"no linear of the base has rows of a multiple of {_BLOCK}, so that nf4 would leave all as they are",
            "--quantised int8",
        )
    for name, module in suited.items():
        weight = module.weight
        packed = Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=weight.dtype, device="meta"
        )
        packed.weight = Params4bit(
            weight.data, requires_grad=False, quant_type="nf4", blocksize=_BLOCK, compress_statistics=False
        ).to(weight.device)
        packed.bias = module.bias
        model.set_submodule(name, packed.train(module.training))
    keep_packing(model)
