"""Duplicates against brute force over all pairs, with shingles written from their definition."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import tiny

from localmoe.errors import ConfigError
from localmoe.evaluate import duplicates
from localmoe.evaluate.duplicates import Duplicate, exact_duplicates, jaccard, near_duplicates, normalised, shingles

WORDS = [f"word{number}" for number in range(400)]


def article(seed: int, words: int = 150) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def changed(words: list[str], changes: int, seed: int) -> list[str]:
    """The same words but for `changes` of them."""
    draw = random.Random(seed)
    copy = list(words)
    for place in draw.sample(range(len(words)), changes):
        copy[place] = f"new{draw.randrange(10**9)}"
    return copy


def brute_force(texts: list[str], others: list[str], threshold: float) -> list[Duplicate]:
    def parts(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}

    pairs = []
    for other, theirs in enumerate(map(parts, others)):
        for place, ours in enumerate(map(parts, texts)):
            similarity = len(ours & theirs) / len(ours | theirs)
            if similarity >= threshold:
                pairs.append(Duplicate(place, other, similarity))
    return pairs


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9, 1.0])
def test_near_duplicates_are_those_of_brute_force(threshold: float) -> None:
    texts = [" ".join(article(seed)) for seed in range(20)]
    others = [" ".join(changed(article(seed % 30), seed % 11, seed)) for seed in range(110)]
    expected = brute_force(texts, others, threshold)
    assert near_duplicates(texts, others, threshold) == expected
    assert 5 < len(expected) < 110


def test_shingles_are_five_words_in_a_row_whatever_stands_between_them() -> None:
    assert shingles("One, two -- three (four) FIVE\nsix_6!") == {"one two three four five", "two three four five six_6"}
    assert shingles("one two") == {"one two"}


def test_a_script_without_spaces_is_cut_into_characters() -> None:
    assert shingles("吾輩は猫である") == {"吾 輩 は 猫 で", "輩 は 猫 で あ", "は 猫 で あ る"}


def test_a_text_without_words_is_its_own_shingle() -> None:
    assert shingles(" ?! ") == {"?!"}
    assert near_duplicates(["?!", ""], ["", "?!"], 0.7) == [Duplicate(1, 0, 1.0), Duplicate(0, 1, 1.0)]


def test_exact_duplicates_have_equal_content_but_for_case_white_space_and_form() -> None:
    texts = ["Straße  ﬁne\n", "two", "strasse fine"]
    assert normalised(texts[0]) == "strasse fine"
    found = exact_duplicates(texts, ["none", "STRASSE fine", "two."])
    assert found == [Duplicate(0, 1, 1.0), Duplicate(2, 1, 1.0)]


def test_exact_duplicates_are_near_duplicates_too() -> None:
    texts = [tiny.sentence(topic, 0) for topic in tiny.TOPICS]
    others = [text.upper() for text in texts[::-1]]
    assert near_duplicates(texts, others) == exact_duplicates(texts, others)


def test_others_are_read_once_and_none_is_kept() -> None:
    read: list[int] = []

    def others() -> Iterator[str]:
        for number in range(3):
            read.append(number)
            yield " ".join(article(number))

    assert near_duplicates([" ".join(article(2))], others()) == [Duplicate(0, 2, 1.0)]
    assert read == [0, 1, 2]


def test_a_text_of_many_blocks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    words = article(0, words=300)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    found = near_duplicates([" ".join(words)], [" ".join(changed(words, 2, 0))])
    assert [pair.similarity for pair in found] == [pytest.approx(0.93, abs=0.03)]


def test_half_of_a_surrogate_pair_can_be_compared() -> None:
    assert near_duplicates(["a \ud800"], ["a \ud800"]) == exact_duplicates(["a \ud800"], ["a \ud800"]) != []


def test_jaccard_is_shared_over_all() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d", "e"}) == 2 / 5


def test_a_pair_at_the_threshold_is_missed_once_in_a_thousand_times_at_most() -> None:
    for percent in range(10, 101):
        bands, rows = duplicates._bands(percent / 100)
        assert bands * rows <= duplicates.PERMUTATIONS
        assert (1 - (percent / 100) ** rows) ** bands <= 1e-3


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.01, float("nan")])
def test_a_threshold_that_cannot_be_kept_to_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0\.1 and 1"):
        near_duplicates([], [], threshold)
