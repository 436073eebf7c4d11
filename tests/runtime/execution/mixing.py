"""A bank of adapters in memory, and the logits of mixes of them by the formula, in fp64."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import tiny
import torch

from localmoe.config import ExecutionConfig
from localmoe.lora import Adapter, weight_of
from localmoe.models import target_linears
from localmoe.routing import Mix
from localmoe.runtime.execution import Executor, Way

TOLERANCE = 2e-4  # fp32, logits of size 1 to 10
WAYS: tuple[Way, ...] = ("dense", "stacked", "grouped")
IDS = tiny.passages(9)[0].tokens[None]


def three_adapters(model: Any) -> dict[str, Adapter]:
    """Three experts of different ranks."""
    return {
        name: tiny.random_adapter(model, seed, rank) for name, seed, rank in (("a", 1, 2), ("b", 2, 3), ("c", 3, 1))
    }


def bank(adapters: Mapping[str, Adapter], trunk: Adapter | None = None) -> Any:
    """What an executor reads of a bank; with a trunk its experts have the trunk's A."""
    records = [SimpleNamespace(id=name, adapter=SimpleNamespace(sha256=f"hash of {name}")) for name in adapters]
    manifest = SimpleNamespace(
        digest="digest",
        shared_factors=trunk is not None,
        trunk=None if trunk is None else SimpleNamespace(sha256="hash of the trunk"),
        base=SimpleNamespace(weights="weights"),
        experts=records,
    )
    return SimpleNamespace(manifest=manifest, adapter=adapters.__getitem__, trunk=lambda: trunk)


def executor(model: Any, adapters: Mapping[str, Adapter], trunk: Adapter | None = None, **settings: Any) -> Executor:
    """An executor over adapters in memory."""
    return Executor(model, bank(adapters, trunk), ExecutionConfig(**settings))


def mix(**weights: float) -> Mix:
    """A linear mix of experts by name."""
    names = sorted(weights)
    return Mix(tuple(names), tuple(weights[name] for name in names), "linear", "digest", None)


@torch.no_grad()
def logits_of(run: Executor, chosen: Mix, way: Way, stay: bool = False, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What the executor's model gives for these tokens with the mix attached."""
    with run.attached(run.load([chosen]), way, stay):
        logits: torch.Tensor = run.model(ids).logits
    return logits


@torch.no_grad()
def oracle(model: Any, adapters: Mapping[str, Adapter], chosen: Mix, ids: torch.Tensor) -> torch.Tensor:
    """Logits in fp64 of a copy of the model whose weights are W0 + Σ w_k B_k diag(c_k) A_k, by a loop."""
    exact = copy.deepcopy(model).double()
    for name, module in target_linears(exact).items():
        for expert, weight in zip(chosen.experts, chosen.weights, strict=True):
            update = adapters[expert][name]
            weight_of(module).add_(weight * (update.B.double() * update.c.double()) @ update.A.double())
    logits: torch.Tensor = exact(ids).logits
    return logits
