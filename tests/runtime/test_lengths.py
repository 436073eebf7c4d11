"""Lengths of answers: what is expected of the next, and that an engine's planner is told so."""

from pathlib import Path

import pytest

from localmoe import open as open_bank
from localmoe.config import GenerateConfig
from localmoe.runtime.engine import Engine
from localmoe.runtime.execution import Choice, Work
from localmoe.runtime.explanation import explain
from localmoe.runtime.lengths import ANSWERS, Lengths


def test_before_the_first_answer_the_limit_is_expected() -> None:
    assert Lengths().expected(128) == 128


def test_the_mean_is_expected_and_no_more_than_the_limit() -> None:
    lengths = Lengths()
    for tokens in (10, 30, 110):
        lengths.note(tokens, 128)
    assert lengths.expected(128) == lengths.expected(512) == 50
    assert lengths.expected(20) == round((10 + 20 + 20) / 3)
    assert lengths.expected(1) == 1


def test_an_answer_that_was_cut_short_counts_as_the_limit() -> None:
    lengths = Lengths()
    lengths.note(16, 16)
    assert lengths.expected(512) == 512 and lengths.expected(8) == 8
    lengths.note(12, 16)
    assert lengths.expected(512) == (512 + 12) // 2


def test_the_last_answers_count() -> None:
    lengths = Lengths()
    lengths.note(100, 128)
    for _ in range(ANSWERS):
        lengths.note(4, 128)
    assert lengths.expected(128) == 4


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_bank(tiny_bank, str(tiny_base), str(tiny_encoder))


def test_an_engine_expects_what_its_answers_were(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def planner(work: Work) -> Choice:
        asked.append(work.new_tokens)
        return Choice("stacked", "stacked")

    monkeypatch.setattr(engine, "lengths", Lengths())
    monkeypatch.setattr(engine.executor, "planner", planner)
    config = GenerateConfig(max_new_tokens=9)
    engine.lengths.note(4, 9)
    pieces = engine.stream("the ferry left", config)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert asked == [4] and len(engine.lengths._answers) == 2
    engine.lengths = Lengths()
    whole = engine.generate("the ferry left", config)
    engine.generate_batch(["the ferry left"] * 2, config)
    assert asked[1:] == [9, whole.new_tokens]
    assert len(engine.lengths._answers) == 3


def test_an_explanation_says_what_was_expected_and_changes_nothing_of_it(engine: Engine) -> None:
    engine.lengths = Lengths()
    engine.lengths.note(2, 9)
    made = explain(engine, "the ferry left", GenerateConfig(max_new_tokens=9))
    assert (made.work.new_tokens, made.most) == (2, 9)
    assert list(engine.lengths._answers) == [(2, 9)]
