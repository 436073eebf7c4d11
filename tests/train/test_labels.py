"""Labels against the formula written out, and what a label must never be."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.train.labels import label_clusters


def test_words_are_ranked_by_the_formula() -> None:
    texts = [
        ["orange apple apple pear apple", "plum pear pear fig fig fig fig"],
        ["fig fig fig fig fig fig fig cherry cherry plum plum plum", "apple quince"],
        ["quince quince melon pear orange"],
    ]
    counts = [Counter(" ".join(group).split()) for group in texts]
    total = sum(counts, Counter())
    average = sum(total.values()) / len(counts)
    for k, label in enumerate(label_clusters(texts, words=3)):
        score = {word: count * math.log(1 + average / total[word]) for word, count in counts[k].items()}
        assert label.split() == sorted(score, key=lambda word: (-score[word], word))[:3]


def test_source_code_is_labelled_by_the_words_in_its_identifiers() -> None:
    server = "class HTTPServer(SocketServer):\n    def handle_request(self, client_socket2: int) -> None: return"
    parser = "static const char *parseExpression(XMLNode node) { if (node == NULL) return parse_error; }"
    labels = label_clusters([[server] * 3, [parser] * 3], words=6)
    assert set(labels[0].split()) == {"http", "server", "socket", "client", "handle", "request"}
    assert set(labels[1].split()) == {"node", "parse", "expression", "xml", "error"}


def test_stop_words_keywords_and_numbers_never_label() -> None:
    text = "The of and self def return import 2024 1e10 don't None static void it's a x harbour"
    assert label_clusters([[text], ["lighthouse"]]) == ["harbour", "lighthouse"]


def test_plural_and_singular_do_not_stand_side_by_side() -> None:
    text = "galaxies galaxies galaxy class classes box boxes boxes planets planet planet planet bus status"
    label = label_clusters([[text], ["other"]], words=9)[0].split()
    assert sorted(label) == ["boxes", "bus", "classes", "galaxies", "planet", "status"]


def test_labels_that_would_be_equal_get_the_next_word() -> None:
    first, second = "alpha " * 30 + "beta " * 20, "alpha " * 20 + "beta " * 30 + "gamma"
    assert label_clusters([[first], [second]], words=2) == ["alpha beta", "beta alpha gamma"]


def test_clusters_of_the_same_words_are_told_apart_by_their_number() -> None:
    assert label_clusters([["alpha beta"], ["beta alpha"], ["alpha beta"]]) == [
        "alpha beta",
        "alpha beta 1",
        "alpha beta 2",
    ]


def test_a_cluster_without_words_is_called_by_its_number() -> None:
    assert label_clusters([["harbour"], ["12 + 34"], [], ["the"]]) == ["harbour", "cluster 1", "cluster 2", "cluster 3"]
    assert label_clusters([["..."], []]) == ["cluster 0", "cluster 1"]
    assert label_clusters([]) == []


def test_long_clusters_are_read_evenly_but_not_whole() -> None:
    many = ["harbour"] * 3000 + ["lighthouse"] * 3000
    long = "anchor " + "harbour " * 100_000 + "buoy"
    labels = label_clusters([many, [long]])
    assert labels[0] == "lighthouse harbour"
    assert "anchor" in labels[1]
    assert "buoy" not in labels[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text(max_size=40), max_size=4), max_size=6), st.integers(1, 5))
def test_any_texts_give_different_labels_that_are_not_empty(texts: list[list[str]], words: int) -> None:
    labels = label_clusters(texts, words)
    assert len(labels) == len(set(labels)) == len(texts)
    assert all(label.strip() == label != "" for label in labels)
    assert label_clusters(texts, words) == labels
