"""Material: losses against the engine's own and against the formula, kept and not computed twice."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from localmoe.errors import UsageError
from localmoe.evaluate.entropies import entropies
from localmoe.evaluate.figures import material as material_module
from localmoe.evaluate.figures.material import HeldOut, Material, Source
from localmoe.evaluate.figures.token_losses import TokenLosses
from localmoe.packing import Passage
from localmoe.routing import Mix
from localmoe.runtime.engine import base_mix
from localmoe.train.documents import Message

CLOSE = {"rel": 1e-4, "abs": 1e-4}  # fp32 logits of rows of other lengths


def _own_nll(held: HeldOut, place: int, mix: Mix, prefix: int) -> torch.Tensor:
    """By the engine alone, one document a forward."""
    tokens = held.trials[place].passage.tokens
    passage = Passage(tokens, torch.arange(len(tokens)) >= prefix)
    return held.engine.token_nll(passage, mix).double()


def test_losses_are_the_engine_s_own_after_every_prefix(held: HeldOut) -> None:
    mixes = held.mixes()
    assert len({mix.experts for mix in mixes}) > 1
    for prefix in (held.prefix, held.prefix + 5):
        expected = [float(_own_nll(held, place, mix, prefix).sum()) for place, mix in enumerate(mixes)]
        assert held.nll(mixes, "test", prefix) == pytest.approx(expected, **CLOSE)
        assert held.counts(prefix) == [len(trial.passage) - prefix for trial in held.trials]


def test_an_ensemble_is_the_weighted_sum_of_probabilities(held: HeldOut) -> None:
    mixes = held.mixes(replace(held.engine.config, router="uniform", active=2.0))
    expected = []
    for place, mix in enumerate(mixes):
        parts = [_own_nll(held, place, held.alone(name), held.prefix).tolist() for name in mix.experts]
        chances = [
            sum(weight * math.exp(-part[token]) for part, weight in zip(parts, mix.weights, strict=True))
            for token in range(held.counts()[place])
        ]
        expected.append(-sum(math.log(chance) for chance in chances))
    assert held.ensemble_nll(mixes, "test") == pytest.approx(expected, **CLOSE)


def test_a_bank_of_conversations_is_refused(held: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = replace(held.trials[0], messages=(Message("user", "boat"), Message("assistant", "sail")))
    monkeypatch.setattr(material_module, "trials_of", lambda *_, **__: [talk])
    with pytest.raises(UsageError, match="holds conversations"):
        HeldOut(held.source, held.prefix)


def test_what_is_kept_is_not_computed_again(material: Material, held: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    mixes = held.mixes()
    before = held.nll(mixes, "test")

    def forbidden(*_: object) -> None:
        raise AssertionError("a forward although the losses are kept")

    monkeypatch.setattr(material_module, "token_nll", forbidden)
    again = Source("again", lambda: held.engine, material.evaluation, material.source.losses, lambda *_: None)
    assert again.held_out(held.prefix).nll(mixes, "test") == before
    with pytest.raises(AssertionError, match="a forward"):
        held.nll([replace(mixes[0], weights=tuple(2 * w for w in mixes[0].weights)), *mixes[1:]], "test")


def test_forwards_are_shared_by_documents_of_one_mix(material: Material, held: HeldOut, tmp_path: Path) -> None:
    told = []
    losses = TokenLosses(tmp_path / "losses.sqlite")
    source = Source("new", lambda: held.engine, material.evaluation, losses, lambda *note: told.append(note))
    fresh = source.held_out(held.prefix)
    fresh.nll([base_mix(held.engine.bank)] * len(fresh), "base")
    assert told == [("base", len(fresh), len(fresh))]  # all in one row
    losses.close()


def test_a_file_that_is_no_database_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "losses.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(UsageError, match="remove it"):
        TokenLosses(path)


def test_entropies_are_those_of_the_merged_model_s_predictions(held: HeldOut) -> None:
    tokens = held.trials[0].passage.tokens[: held.prefix]
    found = entropies(held.engine, tokens)
    for name, value in zip(held.engine.router.centroids.experts, found.tolist(), strict=True):
        with held.engine.merged(held.alone(name)):
            p = torch.softmax(held.engine.model(input_ids=tokens[None]).logits[0].double(), dim=-1)
        expected = -sum(float((row * row.log()).sum()) for row in p) / len(tokens)
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_figure_of_a_bank_needs_one(material: Material) -> None:
    empty = Material(material.config, material.evaluation)
    with pytest.raises(UsageError, match="made from a bank"):
        empty.held_out()
    with pytest.raises(UsageError, match="made from results"):
        empty.some_results()


def test_banks_that_hold_out_other_documents_are_not_compared(material: Material, held: HeldOut) -> None:
    fewer = replace(material.evaluation, documents=len(held) - 1)
    other = Source("other", lambda: held.engine, fewer, material.source.losses, lambda *_: None)
    both = replace(material, sources=(material.source, other))
    with pytest.raises(UsageError, match="holds out other documents"):
        list(both.every_held_out())
