"""Quantisation of a base in memory: its linears in 8 bits, through torchao; the one importer of torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from localmoe.errors import UsageError
from localmoe.models import target_linears

KINDS = ("int8",)
"""What a base can be quantised to: `int8` keeps one scale a row, and rounds weights alone."""


def quantise(model: Any, kind: str) -> None:
    """Rounds the target linears of a base to `kind`, in place; head, embeddings and norms stay as they are.

    Experts then run beside the weights, for nothing can be merged into them. Raises UsageError for another kind, for
    linears that are no nn.Linear, and where torchao is missing.
    """
    if kind not in KINDS:
        raise UsageError(f"a base cannot be quantised to {kind!r}", f"choose {' or '.join(KINDS)}")
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("quantising needs the package torchao", "pip install 'localmoe[quantised]'")
    targets = target_linears(model)
    other = [name for name, module in targets.items() if type(module) is not nn.Linear]
    if other:
        raise UsageError(f"{other[0]} is a {type(targets[other[0]]).__name__}, which torchao does not quantise")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in targets)
    model.requires_grad_(False)
