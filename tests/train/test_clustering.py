"""Bisecting k-means against loops in fp64, exhaustive search, blobs whose answer is known, and awkward inputs."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.config import ClusterConfig
from localmoe.errors import LocalMoEError
from localmoe.train.clustering import Clustering, advised_clusters, bisect


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def noise(points: int, dim: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(points, dim)) + 0.5)


def blobs(sizes: list[int], dim: int = 16, spread: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around orthogonal directions, in random order, and which direction each is around."""
    random = np.random.default_rng(seed)
    blob = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit(np.eye(dim)[blob] + spread * random.normal(size=(len(blob), dim))), blob


def members(clustering: Clustering, index: int) -> np.ndarray:
    """Rows of the points under a node of the tree."""
    node = clustering.tree[index]
    if node.cluster >= 0:
        return np.flatnonzero(clustering.assignment == node.cluster)
    return np.union1d(members(clustering, node.left), members(clustering, node.right))


def leaves(clustering: Clustering, index: int = 0) -> list[int]:
    node = clustering.tree[index]
    return [node.cluster] if node.cluster >= 0 else leaves(clustering, node.left) + leaves(clustering, node.right)


def inertia(rows: np.ndarray) -> float:
    mean = [sum(float(row[j]) for row in rows) / len(rows) for j in range(rows.shape[1])]
    return sum((float(row[j]) - mean[j]) ** 2 for row in rows for j in range(rows.shape[1]))


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        len(set(zip(one.tolist(), other.tolist(), strict=True))) == len(set(one.tolist())) == len(set(other.tolist()))
    )


def test_nodes_means_and_curve_are_those_of_a_loop_in_double_precision() -> None:
    rows = noise(150, 6)
    clustering = bisect(rows, ClusterConfig(), 7)
    for index, node in enumerate(clustering.tree):
        part = rows[members(clustering, index)].astype(np.float64)
        assert node.points == len(part)
        assert node.inertia == pytest.approx(inertia(part), rel=1e-5)
        assert node.radius == pytest.approx(max(np.linalg.norm(row - part.mean(0)) for row in part), rel=1e-5)
        if node.cluster >= 0:
            np.testing.assert_allclose(clustering.means[node.cluster], part.mean(0), atol=1e-6)
            direction = part.mean(0) / np.linalg.norm(part.mean(0))
            np.testing.assert_allclose(clustering.centroids[node.cluster], direction, atol=1e-6)
    ends = [node for node in clustering.tree if node.cluster >= 0]
    assert clustering.curve[-1][0] == len(ends) == 7
    assert clustering.curve[-1][1] == pytest.approx(sum(node.inertia for node in ends))
    assert clustering.curve[-1][2] == pytest.approx(2 * max(node.radius for node in ends))


def test_two_clusters_of_nine_points_are_the_best_of_all_partitions() -> None:
    for seed in range(5):
        rows = noise(9, 3, seed)
        best = min(
            inertia(rows[side]) + inertia(rows[~side])
            for bits in range(1, 2**8)
            for side in [np.array([bits >> place & 1 for place in range(9)], dtype=bool)]
        )
        clustering = bisect(rows, ClusterConfig(restarts=30), 2)
        assert clustering.curve[-1][1] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("points", [700, 20_000])
def test_a_converged_split_leaves_every_point_with_its_nearer_mean(points: int) -> None:
    rows = unit(np.eye(5)[np.arange(points) % 2] + 0.4 * np.random.default_rng(0).normal(size=(points, 5)))
    clustering = bisect(rows, ClusterConfig(tolerance=0, max_iterations=1000), 2)
    exact = rows.astype(np.float64)
    means = [exact[clustering.assignment == k].mean(0) for k in (0, 1)]
    excess = np.square(exact - means[0]).sum(1) - np.square(exact - means[1]).sum(1)
    assert np.all(excess[clustering.assignment == 0] < 1e-5)
    assert np.all(excess[clustering.assignment == 1] > -1e-5)


@pytest.mark.parametrize("criterion", ["diameter", "inertia", "size"])
def test_separate_blobs_are_found_exactly(criterion: str) -> None:
    rows, blob = blobs([100, 90, 110, 95, 105])
    clustering = bisect(rows, ClusterConfig(criterion=criterion), 5)
    assert same_partition(clustering.assignment, blob)


@pytest.mark.parametrize("criterion", ["diameter", "inertia", "size"])
def test_the_cluster_that_the_criterion_puts_first_is_split_next(criterion: str) -> None:
    clustering = bisect(noise(200, 4), ClusterConfig(criterion=criterion), 12)
    key = {"diameter": "radius", "inertia": "inertia", "size": "points"}[criterion]
    value = [getattr(node, key) for node in clustering.tree]
    parent = {child: index for index, node in enumerate(clustering.tree) for child in (node.left, node.right)}
    alive = {0}
    for child in range(1, len(clustering.tree), 2):
        assert value[parent[child]] == max(value[index] for index in alive)
        alive = alive - {parent[child]} | {child, child + 1}


def test_clusters_are_numbered_as_the_leaves_stand_and_the_tree_is_json() -> None:
    clustering = bisect(noise(300, 8), ClusterConfig(), 20)
    assert leaves(clustering) == list(range(20))
    assert clustering.assignment.dtype == np.int32
    assert json.loads(json.dumps([asdict(node) for node in clustering.tree]))[0]["points"] == 300
    json.dumps(clustering.curve)


def test_of_two_children_the_one_nearer_to_the_leaf_before_them_stands_left() -> None:
    rows = noise(400, 3)
    clustering = bisect(rows, ClusterConfig(), 24)
    for index, node in enumerate(clustering.tree):
        first = leaves(clustering, index)[0]
        if node.cluster >= 0 or first == 0:
            continue
        before = clustering.means[first - 1]
        left, right = (rows[members(clustering, child)].mean(0) for child in (node.left, node.right))
        assert np.linalg.norm(left - before) < np.linalg.norm(right - before)


def test_copies_that_only_rounding_tells_apart_are_one_point() -> None:
    copies = unit(noise(1, 8) + 1e-5 * np.random.default_rng(0).normal(size=(300, 8)))
    assert len(bisect(copies, ClusterConfig(), 4).means) == 1
    assert len(bisect(np.concatenate([copies, -copies]), ClusterConfig(), 4).means) == 2


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.integers(0, 11), min_size=1, max_size=30),
    clusters=st.integers(1, 14),
    half=st.booleans(),
    seed=st.integers(0, 3),
)
def test_repeated_points_give_as_many_clusters_as_there_are_different_ones(
    picks: list[int], clusters: int, half: bool, seed: int
) -> None:
    rows = noise(12, 5)[picks].astype(np.float16 if half else np.float32)
    clustering = bisect(rows, ClusterConfig(), clusters, seed=seed)
    K = min(clusters, len(set(picks)))
    assert sorted(set(clustering.assignment.tolist())) == list(range(K))
    assert clustering.means.shape == clustering.centroids.shape == (K, 5)
    assert np.isfinite(clustering.means).all()
    np.testing.assert_allclose(np.linalg.norm(clustering.centroids, axis=1), 1, atol=1e-6)
    assert all(len(set(clustering.assignment[np.array(picks) == pick])) == 1 for pick in set(picks))


def test_a_few_other_points_are_found_that_a_sample_would_miss() -> None:
    rows = np.repeat(np.eye(3, dtype=np.float32)[:1], 20_000, axis=0)
    rows[[17, 12_345]] = [0, 1, 0]
    clustering = bisect(rows, ClusterConfig(), 5)
    assert sorted(np.bincount(clustering.assignment)) == [2, 19_998]
    assert np.flatnonzero(clustering.assignment == clustering.assignment[17]).tolist() == [17, 12_345]


def test_one_point_and_points_that_cancel_out_still_have_unit_centroids() -> None:
    one = bisect(np.array([[0.6, 0.8]], dtype=np.float32), ClusterConfig(), 3)
    np.testing.assert_allclose(one.centroids, [[0.6, 0.8]], atol=1e-6)
    opposite = bisect(np.array([[0, 1], [0, -1]], dtype=np.float32), ClusterConfig(), 1)
    assert opposite.centroids.tolist() == [[0, 1]]
    assert opposite.means.tolist() == [[0, 0]]


def test_a_read_only_memory_map_in_half_precision_gives_the_clusters_of_single_precision(tmp_path: Path) -> None:
    rows, _ = blobs([9000, 500, 1500, 80])
    path = tmp_path / "embeddings"
    rows.astype(np.float16).tofile(path)
    mapped = np.memmap(path, dtype=np.float16, mode="r", shape=rows.shape)
    half, single = bisect(mapped, ClusterConfig(), 4), bisect(rows, ClusterConfig(), 4)
    assert same_partition(half.assignment, single.assignment)
    np.testing.assert_allclose(half.means[half.assignment[0]], single.means[single.assignment[0]], atol=1e-4)


def test_some_rows_of_an_array_give_the_clusters_that_they_give_alone() -> None:
    rows = np.sort(np.random.default_rng(1).choice(12_000, 10_000, replace=False))
    others = np.setdiff1d(np.arange(12_000), rows)
    points, tokens = noise(12_000, 8), np.arange(12_000) % 100
    points[others] = np.nan
    config = ClusterConfig(min_tokens=10_000)
    part, alone = bisect(points, config, 12, tokens, 3, rows), bisect(points[rows], config, 12, tokens[rows], 3)
    assert (part.assignment[others] == -1).all()
    np.testing.assert_array_equal(part.assignment[rows], alone.assignment)
    np.testing.assert_array_equal(part.centroids, alone.centroids)
    assert (part.tree, part.curve, part.refused) == (alone.tree, alone.curve, alone.refused)
    with pytest.raises(LocalMoEError, match=f"document {others[0]} has length nan"):
        bisect(points, config, 2, rows=np.arange(12_000))


def test_the_number_of_threads_changes_no_bit_and_is_put_back() -> None:
    rows = noise(12_000, 8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(bisect(rows, ClusterConfig(), 6, seed=5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, three = results
    assert one.tree == three.tree
    assert one.curve == three.curve
    assert one.means.tobytes() == three.means.tobytes()
    assert one.assignment.tobytes() == three.assignment.tobytes()


def test_seeds_draw_different_starts() -> None:
    rows = noise(300, 8)
    assert len({bisect(rows, ClusterConfig(restarts=1), 8, seed=seed).curve[-1][1] for seed in range(4)}) > 1


@settings(max_examples=25, deadline=None)
@given(tokens=st.lists(st.integers(1, 100), min_size=20, max_size=60), minimum=st.integers(1, 800))
def test_no_cluster_has_fewer_tokens_than_the_minimum_unless_all_together_do(tokens: list[int], minimum: int) -> None:
    counts = np.array(tokens)
    clustering = bisect(noise(len(tokens), 4), ClusterConfig(min_tokens=minimum), 10, tokens=counts)
    held = [counts[clustering.assignment == k].sum() for k in range(len(clustering.means))]
    assert min(held) >= min(minimum, counts.sum())
    assert clustering.refused > 0 or len(held) == 10


def test_where_the_widest_cluster_is_refused_the_next_is_split() -> None:
    degrees = np.repeat([0, 40, 146, 154], [50, 2, 25, 25]) + np.linspace(-1, 1, 102)
    rows = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)
    refusing = bisect(rows, ClusterConfig(min_tokens=100), 3, tokens=np.full(102, 10))
    assert refusing.refused == 1
    assert same_partition(refusing.assignment, np.repeat([0, 1, 2], [52, 25, 25]))
    free = bisect(rows, ClusterConfig(min_tokens=100), 3)
    assert free.refused == 0
    assert same_partition(free.assignment, np.repeat([0, 1, 2], [50, 2, 50]))


@pytest.mark.parametrize(("value", "length"), [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf"), (0.0, "0")])
def test_a_row_that_is_not_of_length_one_is_refused_by_its_number(value: float, length: str) -> None:
    rows = np.tile(np.array([[1, 0]], dtype=np.float32), (3000, 1))
    rows[2500] = [value, 0]
    with pytest.raises(LocalMoEError, match=f"document 2500 has length {length}, not 1"):
        bisect(rows, ClusterConfig(), 2)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    rows = noise(10, 3)
    with pytest.raises(ValueError, match="tokens of shape"):
        bisect(rows, ClusterConfig(), 2, tokens=np.ones(9))
    for wrong, clusters in ((rows, 0), (rows[:0], 2), (rows[0], 2), (rows.astype(np.float64), 2)):
        with pytest.raises(ValueError, match="cannot make"):
            bisect(wrong, ClusterConfig(), clusters)


def test_the_advised_number_of_clusters_follows_the_tokens() -> None:
    assert advised_clusters(10**6, ClusterConfig(clusters=7)) == 7
    assert advised_clusters(1_000_000, ClusterConfig(min_tokens=20_000)) == 25
    assert advised_clusters(39_999, ClusterConfig(min_tokens=20_000)) == 1
    assert advised_clusters(0, ClusterConfig()) == 1
    assert advised_clusters(5, ClusterConfig(min_tokens=0)) == 5
