"""How many experts are active: the rule of one standard error, and a bank whose number tune documents chose."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

import localmoe
from localmoe.config import SearchConfig
from localmoe.errors import ConfigError
from localmoe.models import load_tokenizer
from localmoe.train import activity, prompts
from localmoe.train.activity import fewest_of_the_best
from localmoe.train.checks import Nll
from localmoe.train.progress import Event


def _losses(*totals: float) -> list[Nll]:
    return [Nll(total, 10) for total in totals]


def test_the_fewest_are_taken_that_are_as_good_as_the_best_but_for_one_standard_error() -> None:
    best = _losses(10, 20, 30, 40)
    noisy = _losses(12, 19, 32, 38.5)  # mean difference 0.375, its standard error more
    worse = _losses(11, 21, 31, 41)  # worse by the same everywhere
    assert fewest_of_the_best({1.0: worse, 3.0: noisy, 10.0: best}) == 3.0
    assert fewest_of_the_best({1.0: worse, 10.0: best}) == 10.0
    assert fewest_of_the_best({1.0: best, 10.0: best}) == 1.0


def test_longer_documents_weigh_more() -> None:
    short, long = Nll(11.0, 10), Nll(990.0, 1000)
    assert fewest_of_the_best({1.0: [Nll(10.0, 10), Nll(1000.0, 1000)], 2.0: [short, long]}) == 2.0


def test_a_bank_routes_by_the_number_that_tune_documents_like(
    tmp_path: Path, tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    config = dataclasses.replace(tiny.tiny_config(tiny_base, tiny_encoder), search=SearchConfig(active=(1.0, 2.0)))
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config, watch=events.append)
    told = next(event.note for event in events if event.stage == "route" and "by nats a token" in event.note)
    assert told.startswith(f"{bank.manifest.router.wanted:g} active experts")
    assert "1 (" in told and "2 (" in told


def test_a_document_is_scored_under_the_mix_of_its_own_prefix(
    tmp_path: Path, tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixes of one expert each: the expert's texts are those of the passage's topic, whose words no other has."""
    seen: list[tuple[str, str]] = []
    config = tiny.tiny_config(tiny_base, tiny_encoder)
    config = dataclasses.replace(config, search=SearchConfig(active=(1.0, 2.0)))
    tokenizer = load_tokenizer(str(tiny_base))
    real = activity._losses

    def noted(ground: Any, passages: Any, mixes: Any, experts: Any) -> Any:
        labels = {expert.id: expert.label for expert in experts}
        for passage, mix in zip(passages, mixes, strict=True):
            heaviest = max(zip(mix.weights, mix.experts, strict=True))[1]
            seen.append((tokenizer.decode(passage.tokens), labels[heaviest]))
        return real(ground, passages, mixes, experts)

    monkeypatch.setattr(activity, "_losses", noted)
    monkeypatch.setattr(prompts, "PREFIX_TOKENS", 10)
    localmoe.build(tiny_corpus, tmp_path / "bank", config)
    assert len(seen) > 4
    assert sum(any(word in text for word in label.split()) for text, label in seen) > 0.8 * len(seen)


def test_losses_that_are_not_finite_are_passed_over() -> None:
    assert fewest_of_the_best({1.0: _losses(math.nan, 1, 1, 1), 3.0: _losses(2, 1, 1, 1)}) == 3.0
    assert fewest_of_the_best({1.0: _losses(2, 1, 1, 1), 3.0: _losses(math.inf, 1, 1, 1)}) == 1.0


def test_one_number_alone_is_refused(tmp_path: Path, tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path) -> None:
    config = dataclasses.replace(tiny.tiny_config(tiny_base, tiny_encoder), search=SearchConfig(active=(2.0,)))
    with pytest.raises(ConfigError, match="nothing to compare"):
        localmoe.build(tiny_corpus, tmp_path / "bank", config)
