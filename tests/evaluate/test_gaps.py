"""Gaps: the share of the way to test-time training, and the sentence that says it or why there is none."""

from __future__ import annotations

from dataclasses import replace

import made_results
import pytest

from localmoe.evaluate.gaps import (
    FAR,
    NEAR,
    closed_gap,
    closing_sentences,
    gap_sentences,
    out_of_reach,
)
from localmoe.evaluate.results import ComparisonRow, Results
from localmoe.evaluate.verdicts import control_sentence


def _made(share: float, gap: float = 1.0) -> Results:
    """Test-time training `gap` nats better than the trunk on 40 documents, the default `share` of that, on all."""
    results = made_results.results()
    trunk, merged, ttt = (results.method(name) for name in ("trunk", "merged", "ttt-trunk"))
    assert trunk is not None and merged is not None and ttt is not None
    ours = replace(merged, nll=tuple(nll - share * gap for nll in trunk.nll))
    far = replace(ttt, nll=tuple(trunk.nll[place] - gap for place in ttt.documents))
    return replace(results, methods=(trunk, ours, far))


def test_half_of_the_way_on_every_document_is_a_half_without_width() -> None:
    found = closed_gap(_made(0.5), "merged", NEAR, FAR)
    assert found["share"] == pytest.approx(0.5) and found["interval"] == pytest.approx([0.5, 0.5])
    assert found["documents"] == len(made_results.TTT)


@pytest.mark.parametrize(("share", "said"), [(0.424, "42 % [42, 42]"), (1.19, "119 % [119, 119]")])
def test_the_share_is_one_sentence(share: float, said: str) -> None:
    (sentence,) = gap_sentences(_made(share))
    assert sentence == f"merging 3 experts closes {said} of the gap from trunk to ttt-trunk, on 40 documents"


def test_what_an_evaluation_found_is_said_as_it_was_found() -> None:
    results = _made(0.5)
    gap = {"share": 0.42, "interval": [0.32, 0.57], "documents": 7}
    methods = [replace(method, detail={"gap": gap}) if method.default else method for method in results.methods]
    (sentence,) = gap_sentences(replace(results, methods=tuple(methods)))
    assert sentence == "merging 3 experts closes 42 % [32, 57] of the gap from trunk to ttt-trunk, on 7 documents"


def test_why_there_is_no_share_is_said_too() -> None:
    results = _made(0.5, gap=0.0)
    why = "no share of the gap from trunk to ttt-trunk can be told: "
    assert gap_sentences(results) == [f"{why}ttt-trunk is not shown to be better than trunk on these 40 documents"]
    without = [method for method in results.methods if method.name != "trunk"]
    assert gap_sentences(replace(results, methods=tuple(without))) == [f"{why}trunk was not scored"]


def test_nothing_is_said_of_a_gap_that_was_not_asked_for() -> None:
    results = _made(0.5)
    without = [method for method in results.methods if method.name != "ttt-trunk"]
    assert gap_sentences(replace(results, methods=tuple(without))) == []
    assert gap_sentences(replace(results, methods=())) == []


def test_the_control_is_among_the_closing_sentences() -> None:
    results = _made(0.5)
    merged = results.method("merged")
    assert merged is not None
    null = replace(merged, name="null", default=False)
    with_control = replace(results, methods=(*results.methods, null))
    assert control_sentence(with_control) in closing_sentences(with_control)


def test_the_way_from_the_fine_tune_has_a_sentence_of_its_own() -> None:
    results = _made(0.5)
    trunk, merged, ttt = results.methods
    tuned = replace(trunk, name="fine-tuned", nll=tuple(nll - 0.25 for nll in trunk.nll))
    beyond = replace(ttt, name="ttt-fine-tuned", nll=tuple(nll - 0.25 for nll in ttt.nll))
    first, second, third = gap_sentences(replace(results, methods=(trunk, merged, ttt, tuned, beyond)))
    assert first.endswith("closes 33 % [33, 33] of the gap from fine-tuned to ttt-trunk, on 40 documents")
    share = "closes 50 % [50, 50] of the gap from trunk to ttt-trunk, on 40 documents"
    assert second.endswith(f"{share} (the fine-tune: 25 % [25, 25])")
    assert third.endswith("closes 25 % [25, 25] of the gap from fine-tuned to ttt-fine-tuned, on 40 documents")


@pytest.mark.parametrize(("interval", "said"), [((-0.05, -0.02), True), ((-0.05, 0.01), False), ((0.02, 0.05), False)])
def test_where_test_time_training_loses_to_the_fine_tune_it_is_said_that_experts_cannot_win(
    interval: tuple[float, float], said: bool
) -> None:
    row = ComparisonRow("ttt-trunk", "fine-tuned", False, sum(interval) / 2, interval, 40, "")
    loses, wins = (
        ComparisonRow("merged", "fine-tuned", True, *it, 40, "") for it in ((-0.1, (-0.2, -0.1)), (0.1, (0.1, 0.2)))
    )
    sentence = out_of_reach(replace(_made(0.5), comparisons=(row, loses)))
    assert out_of_reach(replace(_made(0.5), comparisons=(row, wins))) is None
    assert (sentence is not None) == said
    if sentence is not None:
        assert sentence.startswith("ttt-trunk loses to the fine-tune too, by 3.5 %: ")
    assert out_of_reach(replace(_made(0.5), comparisons=())) is None
