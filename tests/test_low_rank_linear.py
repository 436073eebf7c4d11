"""LowRankLinear and attached: the update beside the weight is the update that PEFT applies."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from localmoe.lora import LowRank, LowRankLinear, attached, weight_of
from localmoe.models import target_linears

TOLERANCE = 1e-4  # fp32, logits of size 1 to 10


def _update(d_out: int, d_in: int, rank: int = 3) -> LowRank:
    return LowRank(torch.randn(rank, d_in), torch.randn(d_out, rank), torch.rand(rank))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_an_adapter_gives_the_same_logits_attached_and_in_peft(name: str, tmp_path: Path) -> None:
    model = tiny.base(name)
    adapter = tiny.random_adapter(model)
    ids = tiny.passages(20)[0].tokens[None]
    with torch.no_grad():
        expected = tiny.peft_model(model, adapter, tmp_path)(ids).logits
        plain = model(ids).logits
        with attached(model, adapter):
            logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (logits - plain).abs().max() > 100 * TOLERANCE


def test_the_forward_pass_is_the_formula_in_fp64() -> None:
    torch.manual_seed(0)
    base, update = nn.Linear(5, 7), _update(7, 5)
    x = torch.randn(2, 4, 5)
    weight = base.weight.double() + (update.B.double() * update.c.double()) @ update.A.double()
    expected = x.double() @ weight.T + base.bias.double()
    y = LowRankLinear(base, update)(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_that_autograd_finds() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double().requires_grad_(False)
    A, B = torch.randn(3, 5).double(), torch.randn(7, 3).double()
    layer = LowRankLinear(base, LowRank(A, B, torch.rand(3).double()), train_A=True, train_B=True)
    x = torch.randn(4, 5).double().requires_grad_()
    seen = torch.randn(4, 7).double()
    mine = torch.autograd.grad((layer(x) * seen).sum(), [x, layer.A, layer.B])
    plain = x @ base.weight.T + base.bias + ((x @ layer.A.T) * layer.c) @ layer.B.T
    theirs = torch.autograd.grad((plain * seen).sum(), [x, layer.A, layer.B])
    for gradient, expected in zip(mine, theirs, strict=True):
        # factors get their gradients through fp32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_weight_of_gpt2s_transposed_linear_is_d_out_by_d_in() -> None:
    module = target_linears(tiny.base("gpt2"))["transformer.h.0.attn.c_attn"]
    assert weight_of(module).shape == (96, 32)


def test_the_modules_are_put_back_even_after_an_exception() -> None:
    model = tiny.base("llama")
    modules, before = target_linears(model), tiny.checksum(model)
    with pytest.raises(ZeroDivisionError), attached(model, tiny.random_adapter(model), train_A=True, train_B=True):
        assert not target_linears(model).keys() & modules.keys()
        raise ZeroDivisionError
    assert target_linears(model) == modules
    assert tiny.checksum(model) == before


def test_a_module_that_the_model_lacks_is_an_error_and_wraps_nothing() -> None:
    model = tiny.base("llama")
    modules = target_linears(model)
    adapter = tiny.random_adapter(model) | {"model.layers.9.mlp.up_proj": _update(48, 32)}
    with pytest.raises((KeyError, AttributeError)), attached(model, adapter):
        pass
    assert target_linears(model) == modules


def test_trained_factors_are_copies_and_the_adapter_stays_as_it_was() -> None:
    model = tiny.base("llama")
    adapter = tiny.random_adapter(model)
    name = next(iter(adapter))
    before = adapter[name].A.clone()
    with attached(model, adapter, train_A=True, train_B=True) as modules, torch.no_grad():
        modules[name].A.add_(1.0)
    assert torch.equal(adapter[name].A, before)


def test_without_training_no_factor_is_copied() -> None:
    model = tiny.base("llama")
    adapter = tiny.random_adapter(model)
    with attached(model, adapter) as modules:
        assert all(modules[name].A.data_ptr() == update.A.data_ptr() for name, update in adapter.items())
