"""Statistics against loops written from the formulas."""

from __future__ import annotations

import math
import random

import pytest

from localmoe.evaluate.statistics import compare, difference, perplexity


def test_perplexity_is_the_exponential_of_nats_per_token_over_all_documents() -> None:
    assert perplexity([2.0, 6.0], [1, 3]) == pytest.approx(math.exp(8.0 / 4))


def test_the_gain_is_relative_perplexity_and_positive_when_the_method_is_better() -> None:
    found = compare([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [10, 10, 10])
    assert found.gain == pytest.approx(1 - math.exp(6 / 30) / math.exp(9 / 30))
    assert found.gain > 0 and found.documents == 3


def test_a_constant_difference_per_token_has_an_interval_without_width() -> None:
    tokens = [5, 10, 20, 40]
    found = compare([1.0 * n for n in tokens], [1.1 * n for n in tokens], tokens)
    assert found.low == pytest.approx(found.gain) and found.high == pytest.approx(found.gain)
    assert found.verdict == "better"


def test_the_interval_is_that_of_a_bootstrap_written_as_a_loop() -> None:
    draw = random.Random(0)
    tokens = [draw.randint(20, 60) for _ in range(30)]
    ours = [n * draw.gauss(2.0, 0.2) for n in tokens]
    theirs = [n * draw.gauss(2.05, 0.2) for n in tokens]
    gains = []
    for _ in range(4000):
        rows = [draw.randrange(30) for _ in range(30)]
        count = sum(tokens[row] for row in rows)
        gains.append(1 - math.exp(sum(ours[r] for r in rows) / count) / math.exp(sum(theirs[r] for r in rows) / count))
    gains.sort()
    found = compare(ours, theirs, tokens)
    assert found.low == pytest.approx(gains[100], abs=0.012)
    assert found.high == pytest.approx(gains[3900], abs=0.012)


def test_swapping_the_methods_turns_the_verdict_around() -> None:
    tokens = [10] * 20
    worse, better = [21.0] * 20, [20.0] * 20
    assert compare(worse, better, tokens).verdict == "worse"
    assert compare(better, better, tokens).verdict == "no difference shown"


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare([1.0], [1.0, 2.0], [1, 1])
    with pytest.raises(ValueError, match="cannot be paired"):
        compare([], [], [])


# differences of means


def test_a_difference_is_of_weighted_means_and_its_interval_that_of_a_bootstrap_written_as_a_loop() -> None:
    draw = random.Random(1)
    weights = [draw.uniform(1, 9) for _ in range(40)]
    ours = [w * draw.gauss(1.0, 0.3) for w in weights]
    theirs = [w * draw.gauss(1.1, 0.3) for w in weights]
    found = difference(ours, theirs, weights)
    assert found.method == pytest.approx(sum(ours) / sum(weights))
    assert found.difference == pytest.approx(found.method - found.baseline)
    samples = []
    for _ in range(4000):
        rows = [draw.randrange(40) for _ in range(40)]
        samples.append(sum(ours[row] - theirs[row] for row in rows) / sum(weights[row] for row in rows))
    samples.sort()
    assert found.low == pytest.approx(samples[100], abs=0.02)
    assert found.high == pytest.approx(samples[3900], abs=0.02)
    assert (found.documents, found.changed, found.mcnemar) == (40, 40, None)


def test_pairing_makes_the_interval_narrow_where_documents_differ_more_than_methods() -> None:
    hard = [float(n) for n in range(50)]
    found = difference([value + 0.1 for value in hard], hard)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.verdict == "higher"
    assert difference(hard, [value + 0.1 for value in hard]).verdict == "lower"


def test_few_changed_answers_show_nothing_however_sure_the_bootstrap_is() -> None:
    right = [1.0] * 5 + [0.0] * 95
    found = difference(right, [0.0] * 100)
    assert found.low > 0 and found.changed == 5
    assert found.mcnemar == pytest.approx(2 / 2**5)
    assert found.verdict == "no difference shown"
    more = difference([1.0] * 8 + [0.0] * 92, [0.0] * 100)
    assert more.mcnemar == pytest.approx(2 / 2**8) and more.verdict == "higher"


def test_mcnemar_counts_both_directions_and_never_passes_one() -> None:
    assert difference([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]).mcnemar == 1.0
    assert difference([1.0] * 9 + [0.0], [0.0] * 9 + [1.0]).mcnemar == pytest.approx(2 * 11 / 2**10)
    assert difference([1.0, 0.0], [1.0, 0.0]).mcnemar == 1.0


def test_values_that_cannot_be_paired_are_refused() -> None:
    for values in (([1.0], [1.0, 2.0], None), ([], [], None), ([1.0], [1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="cannot be paired"):
            difference(*values)
