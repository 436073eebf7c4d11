"""The search for a rate: over the edge, resumed, without judges, and what the bank is then built with."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

import localmoe
from localmoe.config import BuildConfig, SearchConfig
from localmoe.errors import ConfigError
from localmoe.train import experts as training
from localmoe.train import rates
from localmoe.train.course import DivergedError
from localmoe.train.groundwork import RATE_AFTER_TRUNK
from localmoe.train.progress import Event
from localmoe.train.rates import best_of, lowest_of_the_best


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, {0.5, 1.0, 2.0}),
        (4.0, {0.5, 1.0, 2.0, 4.0, 8.0}),
        (0.25, {0.125, 0.25, 0.5, 1.0, 2.0}),
        (1000.0, {0.5, 1.0, 2.0, 4.0, 8.0, 16.0}),
    ],
)
def test_a_best_rate_at_the_edge_widens_the_search(best: float, tried: set[float]) -> None:
    found = best_of((1.0, 0.5, 2.0), lambda factor: abs(math.log(factor / best)))
    assert set(found) == tried
    assert min(found, key=found.__getitem__) == (best if best in tried else 16.0)


def test_a_single_rate_is_taken_as_it_is() -> None:
    assert best_of((0.7,), lambda _: 1.0) == {0.7: 1.0}


def test_of_rates_that_cannot_be_told_apart_the_lowest_is_taken() -> None:
    assert lowest_of_the_best({1.0: 2.071, 2.0: 2.028, 4.0: 1.996, 8.0: 1.994, 16.0: 2.226}) == 4.0
    assert lowest_of_the_best({1.0: 2.0, 2.0: 1.9, 4.0: 1.8}) == 4.0
    assert lowest_of_the_best({1.0: math.inf, 2.0: math.inf}) == 1.0


@pytest.fixture
def config(tiny_base: Path, tiny_encoder: Path) -> BuildConfig:
    made = tiny.tiny_config(tiny_base, tiny_encoder)
    return dataclasses.replace(made, search=SearchConfig((0.01, 1.0), tokens=2_000))


def test_a_bank_is_built_at_the_rates_that_tune_documents_like_best(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig
) -> None:
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config, watch=events.append)
    first, second = (event.note for event in events if event.stage == "rates" and event.note)
    trunk = bank.manifest.trunk
    assert trunk is not None and trunk.training is not None
    assert f"rate {trunk.training.learning_rate:g}, by nats a token on" in first
    told = _told(first)
    assert lowest_of_the_best(told) == pytest.approx(trunk.training.learning_rate)
    assert len(told) >= 3  # one of two rates is at the edge
    assert second.count(" experts (") == 1
    told = _told(second)
    best = min(told, key=told.__getitem__)
    found = {e.adapter.training.learning_rate for e in bank.manifest.experts if e.adapter and e.adapter.training}
    assert [pytest.approx(rate, rel=1e-4) for rate in found] == [best]
    assert [rate / trunk.training.learning_rate / RATE_AFTER_TRUNK for rate in found] != [1.0]


def test_trials_that_are_done_are_not_run_again(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, asked = rates._mean, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(rates, "_mean", interrupted)
    with pytest.raises(KeyboardInterrupt):
        localmoe.build(tiny_corpus, tmp_path / "bank", config)
    localmoe.build(tiny_corpus, tmp_path / "bank", config)
    resumed, asked = asked, 2
    whole = localmoe.build(tiny_corpus, tmp_path / "other", config)
    assert resumed == asked - 1  # the first trial was not asked for again
    assert localmoe.Bank.open(tmp_path / "bank").manifest.trunk == whole.manifest.trunk


def test_rates_that_diverge_lose_and_where_all_do_the_asked_one_is_used(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise DivergedError("the loss became nan")

    monkeypatch.setattr(training, "rehearse", diverge)
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config, watch=events.append)
    assert sum("every rate diverged" in event.note for event in events) == 2
    trunk = bank.manifest.trunk
    assert trunk is not None and trunk.training is not None
    assert trunk.training.learning_rate == config.train.learning_rate


def test_without_tune_documents_nothing_is_tried_and_it_is_said(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig
) -> None:
    events: list[Event] = []
    without = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, tune_fraction=0.0))
    localmoe.build(tiny_corpus, tmp_path / "bank", without, watch=events.append)
    assert any("no rates were tried" in event.note for event in events if event.stage == "rates")


def test_a_rate_without_another_is_refused_before_anything_is_read(tmp_path: Path, config: BuildConfig) -> None:
    alone = dataclasses.replace(config, search=SearchConfig((0.5, 0.5)))
    with pytest.raises(ConfigError, match=r"0\.5 alone") as error:
        localmoe.build(tmp_path / "nowhere", tmp_path / "bank", alone)
    assert "--try-rate 1" in error.value.remedy


def _told(note: str) -> dict[float, float]:
    """Rate → nats a token."""
    pairs = (pair.split(": ") for pair in note.rpartition("(")[2].removesuffix(")").split(", "))
    return {float(rate): float(nll) for rate, nll in pairs}
