"""Verdicts: the sentences, and the effect that a comparison could have shown."""

from dataclasses import replace

import made_results
import numpy as np
import pytest

from localmoe.evaluate.results import ComparisonRow, Results
from localmoe.evaluate.statistics import compare
from localmoe.evaluate.verdicts import control_sentence, in_words, noun, rank_sentence, smallest_effect, verdict


@pytest.fixture(scope="module")
def results() -> Results:
    return made_results.results()


def test_a_gain_clear_of_zero_is_said_with_its_interval_and_its_cost() -> None:
    said = in_words("merging 3 experts", "the fine-tune", 0.018, 0.011, 0.024, 120, 0.004)
    assert said == "merging 3 experts beats the fine-tune by 1.8 % [1.1, 2.4] for +4 ms a prompt"


def test_a_loss_is_said_the_other_way_round() -> None:
    said = in_words("merging 3 experts", "the fine-tune", -0.004, -0.0072, -0.001, 120, 0.004)
    assert said == "merging 3 experts loses to the fine-tune by 0.4 % [0.1, 0.7] for +4 ms a prompt"


@pytest.mark.parametrize(("low", "high"), [(-0.005, 0.013), (0.0, 0.018), (-0.018, 0.0)])
def test_an_interval_that_holds_zero_says_what_could_have_been_shown(low: float, high: float) -> None:
    said = in_words("merging 3 experts", "the fine-tune", (low + high) / 2, low, high, 120, 0.004)
    assert said == (
        "no difference shown between merging 3 experts and the fine-tune; "
        "the smallest effect that these 120 documents could show is 0.9 %"
    )


def test_the_smallest_effect_is_1_96_standard_errors_of_the_bootstrap() -> None:
    draw = np.random.default_rng(3)
    tokens = [400] * 300
    ours = draw.normal(2.6, 0.3, 300) * 400
    theirs = ours + draw.normal(0, 0.05, 300) * 400
    found = compare(list(ours), list(theirs), tokens)
    error = np.std((theirs - ours) / 400, ddof=1) / np.sqrt(300)  # of the mean difference, nats a token
    assert smallest_effect(found.low, found.high) == pytest.approx(1.96 * error, rel=0.05)


def test_a_row_is_said_with_its_methods_and_what_they_add(results: Results) -> None:
    rows = {(row.method, row.baseline): verdict(row, results) for row in results.comparisons}
    assert rows["merged", "fine-tuned"].startswith("merging 3 experts beats the fine-tune by ")
    assert rows["merged", "fine-tuned"].endswith(" for +31 ms a prompt")
    assert rows["merged-1", "base"].startswith("merging 1 expert beats the base model by ")
    assert rows["ensemble-3", "base"].startswith("ensembling 3 experts beats ")
    assert rows["null", "fine-tuned"].startswith("merging by shuffled centroids loses to the fine-tune")
    assert "between the trunk and the fine-tune" in rows["trunk", "fine-tuned"]
    assert rows["trunk", "fine-tuned"].endswith("%")


def test_an_unknown_method_is_called_by_its_title(results: Results) -> None:
    merged = results.method("merged")
    assert merged is not None
    assert noun(replace(merged, name="mine", title="My own way")) == "My own way"


@pytest.mark.parametrize(("worse", "begins"), [(0.5, "the control loses as it must: "), (0.0, "the control does not ")])
def test_the_control_is_said_to_lose_only_if_it_does(worse: float, begins: str, results: Results) -> None:
    merged = results.method("merged")
    assert merged is not None
    null = replace(merged, name="null", default=False, nll=tuple(nll + worse for nll in merged.nll))
    said = control_sentence(replace(results, methods=(merged, null)))
    assert said is not None and said.startswith(begins)
    assert control_sentence(replace(results, methods=(merged,))) is None


@pytest.mark.parametrize(("worse", "gain", "said"), [(0.5, 0.02, False), (0.0, 0.02, True), (0.0, -0.02, False)])
def test_a_win_that_shuffled_experts_have_too_is_said_to_be_none_of_routing(
    worse: float, gain: float, said: bool, results: Results
) -> None:
    merged = results.method("merged")
    assert merged is not None
    null = replace(merged, name="null", default=False, nll=tuple(nll + worse for nll in merged.nll))
    row = ComparisonRow("merged", "fine-tuned", True, gain, (gain - 0.01, gain + 0.01), 40, "")
    told = verdict(row, replace(results, methods=(merged, null)))
    assert told.endswith("but shuffled experts are not shown to be worse: none of it is shown to be routing") is said
    assert "shown to be routing" not in verdict(replace(row, default=False), replace(results, methods=(merged, null)))


@pytest.mark.parametrize(("rank", "said"), [(16, False), (64, True)])
def test_a_fine_tune_that_was_best_at_another_rank_says_how_to_build_such_a_bank(rank: int, said: bool) -> None:
    results = made_results.results()
    tuned = results.method("fine-tuned")
    assert tuned is not None
    tried = [{"rate": 2e-3, "rank": 16, "perplexity": 20.0}, {"rate": 1e-3, "rank": rank, "perplexity": 19.0}]
    methods = tuple(replace(one, detail={"tried": tried}) if one is tuned else one for one in results.methods)
    build = {"train": {"rank": 16, "alpha": 16.0}}
    sentence = rank_sentence(replace(results, methods=methods, config=results.config | {"build": build}))
    assert (sentence is not None) == said
    if sentence is not None:
        assert "--rank 64 --set train.alpha=64 --learning-rate 0.001" in sentence
    assert rank_sentence(replace(results, methods=())) is None
