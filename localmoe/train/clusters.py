"""Clusters of a whole corpus: every access set is clustered on its own, so that no expert mixes what few may see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localmoe.config import ClusterConfig
from localmoe.train.clustering import advised_clusters, bisect
from localmoe.train.work import Work

Access = tuple[str, ...]

FIRST = 16
"""Clusters by which corpora are compared; how much any clusters explain grows with their number."""


@dataclass(frozen=True)
class Clusters:
    """All clusters, numbered through the access sets, public first.

    assignment: [n] int32, cluster of every train document, -1 for the others; centroids, means: [K, d] fp32;
    access: access set of every cluster; trees: per access set the tree, the elbow curve and the refused splits.
    """

    assignment: np.ndarray
    centroids: np.ndarray
    means: np.ndarray
    access: tuple[Access, ...]
    trees: list[dict[str, Any]]

    def rows(self, number: int) -> list[int]:
        """The train documents of a cluster, ascending."""
        return np.flatnonzero(self.assignment == number).tolist()


def cluster(
    embeddings: np.ndarray,
    tokens: np.ndarray,
    train: np.ndarray,
    access: Sequence[Access],
    config: ClusterConfig,
    seed: int,
) -> Clusters:
    """Bisecting k-means within every access set, K shared out by tokens, at least one each.

    embeddings: [n, d] unit rows; tokens: [n]; train: [n] bool; access: n access sets.
    """
    assignment = np.full(len(embeddings), -1, dtype=np.int32)
    wanted = advised_clusters(int(tokens[train].sum()), config)
    parts, trees = [], []
    sets: list[Access] = []
    chosen = np.flatnonzero(train).tolist()
    for names in sorted({access[row] for row in chosen}):
        rows = np.array([row for row in chosen if access[row] == names])
        share = tokens[rows].sum() / max(1, tokens[train].sum())
        part = bisect(embeddings, config, max(1, round(wanted * share)), tokens, seed, rows)
        assignment[rows] = part.assignment[rows] + len(sets)
        trees.append(
            {
                "access": list(names),
                "first": len(sets),
                "tree": [dataclasses.asdict(node) for node in part.tree],
                "curve": [list(point) for point in part.curve],
                "refused": part.refused,
            }
        )
        parts.append(part)
        sets += [names] * len(part.centroids)
    return Clusters(
        assignment,
        np.concatenate([part.centroids for part in parts]),
        np.concatenate([part.means for part in parts]),
        tuple(sets),
        trees,
    )


def explained(embeddings: np.ndarray, config: ClusterConfig) -> float:
    """1 − (I_k / (n − k)) / (I₁ / (n − 1)), at least 0: the variance that k = `FIRST` clusters explain beyond chance.

    How unlike documents are to each other: 0 where all are alike. embeddings: [n, d] unit rows of train documents. The
    clusters are made for this number alone, however many experts there are and whatever they need of tokens.
    """
    curve = bisect(embeddings, config, FIRST).curve
    n, k = len(embeddings), len(curve)
    whole, within = curve[0][1], curve[-1][1]
    if n <= k or whole <= 0:
        return 0.0
    return max(0.0, 1 - (within / (n - k)) / (whole / (n - 1)))


def save(work: Work, clusters: Clusters) -> None:
    """Leave the clusters in the work folder; the JSON comes last, so that its presence means all of it."""
    work.write_array("assignment.npy", clusters.assignment)
    work.write_array("centroids.npy", clusters.centroids)
    work.write_array("means.npy", clusters.means)
    work.write_json("clusters.json", {"access": clusters.access, "trees": clusters.trees})


def load(work: Work) -> Clusters:
    """What `save` left."""
    plain = work.read_json("clusters.json")
    assignment, centroids, means = (
        np.array(work.read_array(f"{name}.npy")) for name in ("assignment", "centroids", "means")
    )
    return Clusters(assignment, centroids, means, tuple(tuple(names) for names in plain["access"]), plain["trees"])


def nearest(clusters: Clusters, vectors: np.ndarray, access: Sequence[Access]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest cluster of the same access set and its similarity, for vectors [m, d]; -1 where there is none."""
    similarity = vectors @ clusters.centroids.T
    allowed = np.array([[own == theirs for theirs in clusters.access] for own in access], dtype=bool)
    similarity = np.where(allowed.reshape(similarity.shape), similarity, -np.inf)
    best = similarity.argmax(axis=1)
    top = similarity[np.arange(len(best)), best]
    return np.where(np.isfinite(top), best, -1), top
