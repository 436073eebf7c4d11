"""Packing: several passages in one row give the losses and gradients that each gives alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from localmoe.attention import packed_attention
from localmoe.errors import UsageError
from localmoe.lora import attached
from localmoe.models import check_packing, packed
from localmoe.packing import Passage, loss, pack, token_nll

TOLERANCE = 1e-4  # nats, fp32; losses are about 6


def _plain_nll(model: Any, passage: Passage) -> torch.Tensor:
    """-log softmax(logits_t)[token_{t+1}] where token t+1 has a label, from the model's own logits, in fp64."""
    with torch.no_grad():
        logits = model(passage.tokens[None]).logits[0].double()
    found = []
    for place in range(1, len(passage)):
        if passage.labels[place]:
            row = logits[place - 1]
            found.append(row.logsumexp(0) - row[passage.tokens[place]])
    return torch.stack(found)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_packed_losses_are_those_of_every_passage_alone(name: str) -> None:
    model, passages = tiny.base(name), tiny.passages(17, 4, 23, 9)
    with packed(model):
        together = token_nll(model, passages)
        alone = [token_nll(model, [passage])[0] for passage in passages]
    for passage, mine, single in zip(passages, together, alone, strict=True):
        torch.testing.assert_close(mine, single, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(mine.double(), _plain_nll(model, passage), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_changing_one_passage_changes_no_other(name: str) -> None:
    model, passages = tiny.base(name), tiny.passages(12, 14, 9)
    other = Passage(passages[1].tokens.roll(1), passages[1].labels)
    with packed(model):
        before = token_nll(model, passages)
        after = token_nll(model, [passages[0], other, passages[2]])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_loss_and_gradients_are_those_of_peft_and_plain_logits(name: str, tmp_path: Path) -> None:
    model, passages = tiny.base(name), tiny.passages(11, 6, 15)
    adapter = tiny.random_adapter(model)
    theirs = tiny.peft_model(model, adapter, tmp_path)
    losses = []
    for passage in passages:
        targets = passage.tokens.masked_fill(~passage.labels, -100)[1:]
        losses.append(F.cross_entropy(theirs(passage.tokens[None]).logits[0, :-1], targets, reduction="sum"))
    expected = torch.stack(losses).sum() / sum(passage.predicted for passage in passages)
    expected.backward()
    with attached(model, adapter, train_A=True, train_B=True) as modules, packed(model):
        value = loss(model, pack(passages))
        value.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=TOLERANCE)
    for module_name, module in modules.items():
        lora = theirs.base_model.model.get_submodule(module_name)
        assert module.A.grad is not None and module.B.grad is not None
        for mine, own in ((module.A, lora.lora_A["default"]), (module.B, lora.lora_B["default"])):
            torch.testing.assert_close(mine.grad, own.weight.grad, rtol=1e-3, atol=1e-5)
            assert mine.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_gradients_of_all_weights_are_those_of_plain_logits(name: str) -> None:
    model, passages = copy.deepcopy(tiny.base(name)).requires_grad_(True), tiny.passages(11, 6, 300)
    passages = [Passage(one.tokens[:60].repeat(len(one) // 60 + 1)[: len(one)], one.labels) for one in passages]
    passages[-1] = Passage(passages[-1].tokens[:120], passages[-1].labels[:120])
    losses = []
    for passage in passages:
        targets = passage.tokens.masked_fill(~passage.labels, -100)[1:]
        losses.append(F.cross_entropy(model(passage.tokens[None]).logits[0, :-1], targets, reduction="sum"))
    (torch.stack(losses).sum() / sum(passage.predicted for passage in passages)).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    with packed(model):
        loss(model, pack(passages)).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-3, atol=1e-5)


def test_more_labels_than_one_chunk_of_logits_make_no_difference() -> None:
    model, passages = tiny.base("llama"), tiny.passages(120, 110, 90)
    with packed(model):
        mean = loss(model, pack(passages))
        nll = token_nll(model, passages)
    torch.testing.assert_close(mean, torch.cat(nll).mean(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(nll[0].double(), _plain_nll(model, passages[0]), rtol=0, atol=TOLERANCE)


def test_a_pack_says_where_the_next_token_counts() -> None:
    first = Passage(torch.tensor([5, 6, 7]), torch.tensor([True, False, True]))
    second = Passage(torch.tensor([8, 9]), torch.tensor([True, True]))
    made = pack([first, second])
    assert made.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert made.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert made.lengths == [3, 2]
    assert made.rows.tolist() == [1, 3]
    assert made.targets.tolist() == [7, 9]
    assert [first.predicted, second.predicted] == [1, 1]


def test_passages_without_labels_have_empty_losses() -> None:
    silent = Passage(torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool))
    spoken = tiny.passages(8)[0]
    model = tiny.base("llama")
    with packed(model):
        assert token_nll(model, [silent])[0].shape == (0,)
        assert [len(nll) for nll in token_nll(model, [silent, spoken])] == [0, spoken.predicted]


def test_attention_without_lengths_or_with_a_soft_cap_is_refused() -> None:
    states = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="lengths"):
        packed_attention(torch.nn.Identity(), states, states, states, None)
    with pytest.raises(ValueError, match="soft cap"):
        packed_attention(torch.nn.Identity(), states, states, states, None, cu_seq_lens_q=[3], softcap=5.0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cohere", tiny.LLAMA | {"logit_scale": 0.0625}),
        ("granite", tiny.LLAMA | {"logits_scaling": 8.0}),
        ("gemma2", tiny.LLAMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
        (
            "gemma2",
            tiny.LLAMA | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
        ),
        ("gemma3_text", tiny.ARCHITECTURES["gemma3"][1] | {"final_logit_softcapping": 2.0}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ],
    ids=["cohere", "granite", "gemma2", "gemma2-final-cap", "gemma3-final-cap", "mamba", "bloom"],
)
def test_a_base_whose_losses_packing_would_change_is_refused(kind: str, settings: dict[str, Any]) -> None:
    tiny.register_attention()
    model = tiny.causal_model(kind, **settings)
    before = model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(UsageError, match="packed") as caught:
            check_packing(model)
        assert "choose a base" in caught.value.remedy
    with pytest.raises(UsageError), packed(model):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_supported_architecture_passes_the_check_of_packing(name: str) -> None:
    check_packing(tiny.base(name))
