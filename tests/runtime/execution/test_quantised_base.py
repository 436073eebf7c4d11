"""Bases whose linears keep their weights in another form: experts run beside them, and cannot be merged into them."""

import copy
from typing import Any

import pytest
import tiny
import torch
from mixing import TOLERANCE, executor, mix, oracle
from torch import nn

from localmoe.errors import UsageError
from localmoe.lora import attached, dequantised
from localmoe.models import target_linears
from localmoe.quantisation import KINDS, quantise
from localmoe.runtime.execution import Choice

IDS = tiny.passages(9)[0].tokens[None]


class Packed(nn.Linear):
    """A linear whose weight is kept as whole numbers in another shape, as quantising libraries do."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = plain.weight.abs().amax() / 127
        whole = (plain.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole.reshape(-1, 1), requires_grad=False)

    def plain(self) -> torch.Tensor:
        """What the weight stands for."""
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.plain())


def _packed() -> tuple[Any, Any]:
    """A base of packed linears, and the same with the weights that they stand for."""
    model = tiny.causal_model("llama", **tiny.LLAMA)
    plain = copy.deepcopy(model)
    for name, module in target_linears(model).items():
        packed = Packed(module)  # type: ignore[arg-type]
        model.set_submodule(name, packed)
        plain.get_submodule(name).weight.data.copy_(packed.plain())
    return model, plain


def test_experts_run_beside_packed_weights() -> None:
    model, plain = _packed()
    before = tiny.checksum(model)
    adapters = {"a": tiny.random_adapter(plain, 1), "b": tiny.random_adapter(plain, 2)}
    chosen = mix(a=0.8, b=-0.3)
    expected = oracle(plain, adapters, chosen, IDS)
    run = executor(model, adapters)
    loaded = run.load([chosen])
    assert run.choose(loaded, 1, 2000, 500) == Choice("stacked", "stacked")
    for way in ("stacked", "grouped"):
        with torch.no_grad(), run.attached(loaded, way):  # type: ignore[arg-type]
            logits = model(IDS).logits
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    both = run.load([chosen, mix(a=1.0)])
    with torch.no_grad(), run.attached(both, "grouped"):
        logits = model(torch.cat([IDS, IDS])).logits
    torch.testing.assert_close(logits[:1].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(UsageError, match="--execution stacked"), run.attached(loaded, "dense"):
        pass
    assert tiny.checksum(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_with_experts_beside_them_are_the_weights_they_stand_for_and_the_update(kind: str) -> None:
    model = tiny.causal_model("qwen2", **tiny.WIDE)  # it has biases
    plain = copy.deepcopy(model)
    quantise(model, kind)
    for name, module in target_linears(model).items():
        bias = 0 if module.bias is None else module.bias
        weight = plain.get_submodule(name).weight
        stands_for = (module(torch.eye(weight.shape[1])) - bias).t()
        assert 0 < (stands_for - weight).norm() / weight.norm() < (0.01 if kind == "int8" else 0.13)
        weight.data.copy_(stands_for)
        if kind != "nf4":
            torch.testing.assert_close(dequantised(module.weight, weight.dtype), weight.data, rtol=0, atol=1e-5)
    adapters = {"a": tiny.random_adapter(plain, 1), "b": tiny.random_adapter(plain, 2)}
    chosen = mix(a=0.8, b=-0.3)
    expected = oracle(plain, adapters, chosen, IDS)
    run = executor(model, adapters)
    for way in ("stacked", "grouped"):
        with torch.no_grad(), run.attached(run.load([chosen]), way):  # type: ignore[arg-type]
            logits = model(IDS).logits
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.no_grad(), run.attached(run.load([chosen, mix(a=1.0)]), "grouped"):
        logits = model(torch.cat([IDS, IDS])).logits
    torch.testing.assert_close(logits[:1].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(UsageError, match="--execution stacked"), run.attached(run.load([chosen]), "dense"):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_quantised_weights(kind: str) -> None:
    model = tiny.causal_model("llama", **tiny.WIDE)
    plain = copy.deepcopy(model)
    quantise(model, kind)
    for name, module in target_linears(model).items():
        weight = plain.get_submodule(name).weight
        weight.data.copy_(module(torch.eye(weight.shape[1])).t())
    adapter = tiny.random_adapter(plain, 1)
    found = []
    for each in (model, plain):
        with attached(each, adapter, train_A=True, train_B=True) as modules:
            each(IDS, labels=IDS).loss.backward()
            found.append([module.A.grad for module in modules.values()])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
