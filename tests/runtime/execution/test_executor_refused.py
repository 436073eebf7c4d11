"""What the executor refuses or cannot do, with errors that say so; nothing of the base is changed by it."""

import types
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from mixing import IDS, TOLERANCE, WAYS, executor, logits_of, mix, oracle, three_adapters

from localmoe.errors import BankError, UsageError
from localmoe.lora import LowRank
from localmoe.routing import Mix


def test_a_base_that_is_cut_over_devices_is_refused() -> None:
    class DTensor(torch.Tensor):
        """What a tensor-parallel plan makes of a weight, by name."""

    model = tiny.causal_model("llama", **tiny.LLAMA)
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(DTensor), requires_grad=False)
    run = executor(model, {"a": tiny.random_adapter(tiny.base("llama"))})
    with pytest.raises(UsageError, match=r"up_proj\.weight is cut over several devices"):
        run.load([mix(a=1.0)])


def test_an_expert_that_does_not_fit_the_base_is_an_error_that_names_the_module() -> None:
    model = tiny.base("llama")
    before, good = tiny.checksum(model), tiny.random_adapter(model)
    last = list(good)[-1]
    wrong = {
        "as if it were": good | {last: LowRank(torch.ones(2, 5), torch.ones(7, 2), torch.ones(2))},
        r"model\.layers\.9": good | {"model.layers.9.mlp.up_proj": good["model.layers.0.mlp.up_proj"]},
    }
    for message, adapter in wrong.items():
        with pytest.raises(BankError, match=message):
            executor(model, {"a": adapter}).load([mix(a=1.0)])
    few = dict(list(good.items())[:3])
    with pytest.raises(BankError, match="has no update for module"):
        executor(model, {"a": good, "b": few}).load([mix(a=0.5, b=0.5)])
    assert tiny.checksum(model) == before


def test_a_linear_whose_forward_the_base_calls_itself_is_called() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(
        lambda mlp, x: mlp.down_proj.forward(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), mlp
    )
    adapters = {"a": tiny.random_adapter(model, 1)}
    expected = oracle(model, adapters, mix(a=1.0), IDS)
    for way in WAYS:
        logits = logits_of(executor(model, adapters), mix(a=1.0), way)
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_expert_may_not_change_a_weight_that_the_base_reads_without_calling_it() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    mlp, name = model.model.layers[0].mlp, "model.layers.0.mlp.up_proj"

    class Reading(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * F.linear(x, self.up_proj.weight))

    mlp.__class__ = Reading
    before, changing = tiny.checksum(model), tiny.random_adapter(model)
    with pytest.raises(BankError, match=f"{name}.*without calling it"):
        executor(model, {"a": changing}).load([mix(a=1.0)])
    harmless = changing | {name: LowRank(changing[name].A, changing[name].B * 0, changing[name].c)}
    expected = oracle(model, {"a": harmless}, mix(a=1.0), IDS)
    for way in WAYS:
        logits = logits_of(executor(model, {"a": harmless}), mix(a=1.0), way)
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert tiny.checksum(model) == before


def test_a_linear_that_the_base_has_no_use_for_may_be_changed() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    model.spare = torch.nn.Linear(4, 3)
    adapters = {"a": tiny.random_adapter(model)}
    assert "spare" in adapters["a"]
    expected = oracle(model, adapters, mix(a=1.0), IDS)
    for way in WAYS:
        logits = logits_of(executor(model, adapters), mix(a=1.0), way)
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_that_cannot_be_merged_into_are_refused_for_dense() -> None:
    for change in (torch.int8, "meta"):
        model = tiny.causal_model("llama", **tiny.LLAMA)
        run = executor(model, {"a": tiny.random_adapter(model)})
        loaded = run.load([mix(a=1.0)])
        module = model.model.layers[0].mlp.up_proj
        module.weight = torch.nn.Parameter(module.weight.to(change), requires_grad=False)
        with pytest.raises(UsageError, match="offloaded, quantised"), run.attached(loaded, "dense"):
            pass


def test_a_batch_of_different_mixes_is_refused_for_dense_and_where_rows_are_mixed() -> None:
    model = tiny.base("llama")
    run = executor(model, three_adapters(model))
    loaded = run.load([mix(a=1.0), mix(b=1.0)])
    with pytest.raises(UsageError, match="different mixes"), run.attached(loaded, "dense"):
        pass
    with pytest.raises(UsageError, match="batch of 2"), torch.no_grad(), run.attached(loaded, "grouped"):
        model(torch.cat([IDS] * 3))


def test_a_mix_of_another_bank_is_refused() -> None:
    model = tiny.base("llama")
    with pytest.raises(BankError, match="another bank"):
        executor(model, three_adapters(model)).load([Mix(("a",), (1.0,), "linear", "other", None)])
