"""Shrinkage: experts drawn towards their mean, by the share that held-out documents like."""

import dataclasses
from typing import Any

import pytest
import tiny
import torch

from localmoe.lora import LowRank, attached
from localmoe.train import shrinkage
from localmoe.train.course import trained
from localmoe.train.joint import JointTrained
from localmoe.train.shrinkage import SHARES, search_share, shrunk


def _made(model: Any, experts: int = 3, size: float = 0.1) -> JointTrained:
    """A trunk and experts of its A, each as far from it as the next."""
    trunk = tiny.random_adapter(model, 1)
    away = [tiny.random_adapter(model, 10 + k) for k in range(experts)]
    own = [{n: LowRank(trunk[n].A, trunk[n].B + size * one[n].B, trunk[n].c) for n in trunk} for one in away]
    return JointTrained(trained(trunk, 9, [1.0]), tuple(trained(one, 3, [1.0]) for one in own))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_experts_are_drawn_to_the_trunk_and_keep_its_a(share: float) -> None:
    found = _made(tiny.base("llama"))
    near = shrunk(found, share)
    assert near.trunk is found.trunk
    for before, after in zip(found.experts, near.experts, strict=True):
        for name, update in after.adapter.items():
            trunk, own = found.trunk.adapter[name], before.adapter[name]
            assert update.A is trunk.A and update.rank == trunk.rank
            expected = trunk.delta() + share * (own.delta() - trunk.delta())
            torch.testing.assert_close(update.delta(), expected, rtol=2e-2, atol=2e-3)


def _teacher(model: Any, found: JointTrained, share: float) -> list[tuple[Any, Any]]:
    """Documents that the base with so much of expert 0 would write: the likeliest token after every token."""
    adapter = shrunk(found, share).experts[0].adapter
    judges = []
    for passage in tiny.passages(*[24] * 8, seed=5):
        tokens = passage.tokens[:1].clone()
        with torch.no_grad(), attached(model, adapter):
            for _ in range(23):
                tokens = torch.cat([tokens, model(tokens[None]).logits[0, -1:].argmax(dim=-1)])
        judges.append(
            (dataclasses.replace(passage, tokens=tokens, labels=torch.ones(24, dtype=torch.bool)), ((0, 1.0),))
        )
    return judges


def test_the_share_that_held_out_documents_like_is_found() -> None:
    """Against an oracle: the loss of each share, one document after the other, from the model's own logits."""
    model = tiny.base("llama")
    found = _made(model, size=3.0)
    judges = _teacher(model, found, 0.5)
    share, told = search_share(model, found, judges)
    for one in SHARES:
        total, count = 0.0, 0
        for passage, _ in judges:
            with torch.no_grad(), attached(model, shrunk(found, one).experts[0].adapter):
                logits = model(passage.tokens[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, passage.tokens[1:], reduction="sum"))
            count += len(passage) - 1
        assert told[one] == pytest.approx(total / count, rel=5e-3)
    assert share == min(told, key=told.__getitem__) == 0.5


def test_only_so_many_tokens_of_a_document_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinkage, "JUDGED_TOKENS", 8)
    model = tiny.base("llama")
    found, judges = _made(model), [(passage, ((1, 1.0),)) for passage in tiny.passages(20, 30, 25)]
    short = [(dataclasses.replace(p, tokens=p.tokens[:8], labels=p.labels[:8]), w) for p, w in judges]
    assert search_share(model, found, judges)[1] == search_share(model, found, short)[1]


def test_with_few_documents_or_one_expert_all_is_kept() -> None:
    model = tiny.base("llama")
    judges = [(passage, ((0, 1.0),)) for passage in tiny.passages(20, 30, 25)]
    assert search_share(model, _made(model), judges[:2]) == (1.0, {})
    assert search_share(model, _made(model, experts=1), judges) == (1.0, {})
