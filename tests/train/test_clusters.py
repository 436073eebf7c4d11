"""Clusters of a corpus: access sets never mix, and all is as it was after saving."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from localmoe.config import ClusterConfig
from localmoe.train.clustering import bisect
from localmoe.train.clusters import FIRST, Clusters, cluster, explained, load, nearest, save
from localmoe.train.work import Work

CONFIG = ClusterConfig(clusters=6, min_tokens=0)
ACCESS = [((), ("hr",), ("hr", "law"))[row % 3 if row % 2 else 0] for row in range(90)]


def _unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _found() -> tuple[Clusters, np.ndarray, np.ndarray]:
    embeddings, train = _unit(90), np.arange(90) % 5 != 0
    return cluster(embeddings, np.full(90, 10), train, ACCESS, CONFIG, 0), embeddings, train


def test_no_cluster_holds_documents_of_two_access_sets_and_public_ones_come_first() -> None:
    found, _, train = _found()
    assert (found.assignment[~train] == -1).all()
    assert (found.assignment[train] >= 0).all()
    for row in np.flatnonzero(train):
        assert found.access[found.assignment[row]] == ACCESS[row]
    assert list(found.access) == sorted(found.access)
    assert found.access[0] == ()
    assert sorted(set(found.assignment[train].tolist())) == list(range(len(found.access)))


def test_clusters_are_shared_out_by_tokens_and_every_access_set_has_one() -> None:
    found, _, train = _found()
    tokens = {names: sum(ACCESS[row] == names for row in np.flatnonzero(train)) for names in set(ACCESS)}
    for names, count in tokens.items():
        assert found.access.count(names) == max(1, round(6 * count / train.sum()))


def test_centroids_are_the_normalised_means_of_their_members() -> None:
    found, embeddings, _ = _found()
    for k in range(len(found.access)):
        mean = embeddings[found.rows(k)].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found.means[k], mean, atol=1e-6)
        np.testing.assert_allclose(found.centroids[k], mean / np.linalg.norm(mean), atol=1e-5)


def test_one_access_set_alone_and_its_clusters_do_not_depend_on_the_others() -> None:
    embeddings, tokens = _unit(40), np.full(40, 10)
    alone = cluster(embeddings, tokens, np.ones(40, bool), [("hr",)] * 40, CONFIG, 0)
    assert set(alone.access) == {("hr",)} and len(alone.access) == 6
    assert [tree["first"] for tree in alone.trees] == [0]


def test_what_clusters_explain_is_the_variance_that_is_not_left_within_them() -> None:
    embeddings = _unit(40)
    found = bisect(embeddings, CONFIG, FIRST)
    rows, within = embeddings.astype(np.float64), 0.0
    for k in range(FIRST):
        own = rows[found.assignment == k]
        within += float(((own - own.mean(axis=0)) ** 2).sum())
    whole = float(((rows - rows.mean(axis=0)) ** 2).sum())
    expected = 1 - (within / (40 - FIRST)) / (whole / 39)
    np.testing.assert_allclose(explained(embeddings, CONFIG), max(0.0, expected), rtol=1e-4, atol=1e-6)


def test_what_random_documents_explain_is_about_nothing_and_what_kinds_of_text_explain_is_much() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=(300, 64)).astype(np.float32)
    kinds = noise + 12 * np.eye(64, dtype=np.float32)[random.integers(0, 5, 300)]
    alike, unlike = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (noise, kinds))
    assert explained(alike, CONFIG) < 0.1
    assert explained(unlike, CONFIG) > 0.5
    assert explained(unlike, replace(CONFIG, clusters=2, min_tokens=10**6)) == explained(unlike, CONFIG)
    assert explained(alike[:1], CONFIG) == 0.0


def test_many_times_one_document_explains_nothing() -> None:
    assert explained(np.repeat(_unit(1), 30, axis=0), CONFIG) == 0.0


def test_saved_clusters_are_loaded_as_they_were(tmp_path: Path) -> None:
    found, _, _ = _found()
    work = Work(tmp_path, "key")
    save(work, found)
    again = load(work)
    for name in ("assignment", "centroids", "means"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.access == found.access
    assert again.trees == [tree | {"curve": [list(p) for p in tree["curve"]]} for tree in found.trees]


def test_the_nearest_cluster_is_of_the_documents_own_access_set() -> None:
    found, _, _ = _found()
    vectors = _unit(12, seed=1)
    access = [ACCESS[row] for row in range(11)] + [("nobody",)]
    best, similarity = nearest(found, vectors, access)
    for row in range(11):
        allowed = [k for k, names in enumerate(found.access) if names == access[row]]
        scores = [float(vectors[row] @ found.centroids[k]) for k in allowed]
        assert best[row] == allowed[int(np.argmax(scores))]
        np.testing.assert_allclose(similarity[row], max(scores), atol=1e-6)
    assert best[11] == -1


def test_without_vectors_nothing_is_nearest() -> None:
    found, _, _ = _found()
    best, similarity = nearest(found, np.zeros((0, 8), np.float32), [])
    assert best.shape == similarity.shape == (0,)
