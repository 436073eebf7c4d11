"""The dense buffer: merged weights beside the base's own, which are never written."""

from pathlib import Path

import pytest
import tiny
import torch

from localmoe.errors import BankError, UsageError
from localmoe.lora import LowRank, attached
from localmoe.merging import merge_adapters
from localmoe.models import target_linears
from localmoe.runtime.execution import DenseBuffer

TOLERANCE = 1e-4  # fp32, logits of size 1 to 10


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_merged_weights_give_the_logits_of_peft_and_of_the_unmerged_update(name: str, tmp_path: Path) -> None:
    model = tiny.base(name)
    adapter, before = tiny.random_adapter(model), tiny.checksum(model)
    ids = tiny.passages(20)[0].tokens[None]
    with torch.no_grad():
        with DenseBuffer(model).merged(adapter):
            logits = model(ids).logits
        with attached(model, adapter):
            unmerged = model(ids).logits
        theirs = tiny.peft_model(model, adapter, tmp_path)(ids).logits
    torch.testing.assert_close(logits, unmerged, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(logits, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert tiny.checksum(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merge_of_several_experts_is_the_sum_in_fp64(name: str) -> None:
    model = tiny.base(name)
    adapters = [tiny.random_adapter(model, seed, rank) for seed, rank in ((1, 2), (2, 3), (3, 4))]
    weights = [0.5, 0.3, 0.2]
    targets = target_linears(model)
    with DenseBuffer(model).merged(merge_adapters(adapters, weights)):
        written = {module: targets[module].weight.clone() for module in targets}
    for module, target in targets.items():
        base = target.weight.double()
        expected = base if name == "llama" else base.T
        for adapter, weight in zip(adapters, weights, strict=True):
            update = adapter[module]
            expected = expected + weight * (update.B.double() * update.c.double()) @ update.A.double()
        mine = written[module].double() if name == "llama" else written[module].double().T
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dense_update_is_added_as_it_is(name: str) -> None:
    model = tiny.base(name)
    adapter = tiny.random_adapter(model)
    ids = tiny.passages(9)[0].tokens[None]
    buffer = DenseBuffer(model)
    with torch.no_grad():
        with buffer.merged({module: update.delta() for module, update in adapter.items()}):
            dense = model(ids).logits
        with buffer.merged(adapter):
            torch.testing.assert_close(model(ids).logits, dense, rtol=TOLERANCE, atol=TOLERANCE)


def test_one_mix_leaves_nothing_to_the_next() -> None:
    model = tiny.base("llama")
    first, second = tiny.random_adapter(model, 1), tiny.random_adapter(model, 2)
    ids = tiny.passages(9)[0].tokens[None]
    buffer = DenseBuffer(model)
    with torch.no_grad():
        plain = model(ids).logits
        with DenseBuffer(model).merged(second):
            expected = model(ids).logits
        with buffer.merged(first):
            pass
        with buffer.merged(second):
            assert torch.equal(model(ids).logits, expected)
        half = dict(list(second.items())[:3])
        with buffer.merged(half), attached(model, {}):
            merged_half = model(ids).logits
        with attached(model, half):
            torch.testing.assert_close(model(ids).logits, merged_half, rtol=TOLERANCE, atol=TOLERANCE)
        with buffer.merged({}):
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)


def test_the_base_weights_are_back_after_an_exception_inside() -> None:
    model = tiny.base("llama-tied")
    before, buffer = tiny.checksum(model), DenseBuffer(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), buffer.merged(tiny.random_adapter(model)):
            assert tiny.checksum(model) != before
            raise ZeroDivisionError
    assert tiny.checksum(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_base_weights_are_back_after_an_update_of_a_wrong_shape() -> None:
    model = tiny.base("llama")
    before = tiny.checksum(model)
    adapter = tiny.random_adapter(model)
    last = list(adapter)[-1]
    for update in (LowRank(torch.ones(2, 5), torch.ones(7, 2), torch.ones(2)), torch.ones(1)):
        with pytest.raises(BankError, match="as if it were"), DenseBuffer(model).merged(dict(adapter) | {last: update}):
            pass
    assert tiny.checksum(model) == before


def test_a_module_that_the_base_lacks_is_an_error_that_names_it() -> None:
    model = tiny.base("llama")
    before = tiny.checksum(model)
    extra = dict(tiny.random_adapter(model)) | {
        "model.layers.9.mlp.up_proj": tiny.random_adapter(model)["model.layers.0.mlp.up_proj"]
    }
    with pytest.raises(BankError, match=r"model\.layers\.9"), DenseBuffer(model).merged(extra):
        pass
    assert tiny.checksum(model) == before


def test_a_quantised_or_offloaded_base_is_refused() -> None:
    for change in (torch.int8, "meta"):
        model = tiny.causal_model("llama", **tiny.LLAMA)
        adapter = tiny.random_adapter(model)
        module = model.model.layers[0].mlp.up_proj
        module.weight = torch.nn.Parameter(module.weight.to(change), requires_grad=False)
        with pytest.raises(UsageError, match="offloaded or quantised"), DenseBuffer(model).merged(adapter):
            pass
