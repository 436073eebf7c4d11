"""Bisecting k-means over unit embeddings: clusters, centroids, and the binary tree whose leaves they are."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from localmoe.config import ClusterConfig
from localmoe.errors import LocalMoEError

T = TypeVar("T")

_BLOCK = 2048
"""Rows that a thread holds in fp32 at a time (3 MiB at d = 384: they stay in its cache)."""

_SAMPLES = (1024, 8192)
"""Rows on which the starts of a 2-means are drawn and refined first (12 MiB of fp32 at d = 384)."""

_SAME = 1e-6
"""Two rows at a smaller squared distance are one point: keeping unit rows in fp16 moves them about as far."""


@dataclass(frozen=True)
class Node:
    """One cluster of the tree."""

    left: int
    """Place of the left child in `Clustering.tree`; -1 for a leaf."""
    right: int
    """Place of the right child; -1 for a leaf."""
    cluster: int
    """Number of a leaf's cluster; -1 for a node that was split."""
    points: int
    inertia: float
    """Σ‖x − μ‖² over the points."""
    radius: float
    """max‖x − μ‖ over the points: the diameter is at most twice this."""


@dataclass(frozen=True)
class Clustering:
    """K clusters of n points, numbered as the leaves of the tree stand from left to right."""

    assignment: np.ndarray
    """[n] int32: the cluster of every row, -1 for rows that were left out."""
    means: np.ndarray
    """[K, d] fp32: μ_k, the mean of the members."""
    centroids: np.ndarray
    """[K, d] fp32 unit rows: μ_k / ‖μ_k‖, or the first member where the members cancel out (‖μ_k‖ < 1e-6)."""
    tree: tuple[Node, ...]
    """The root, then a pair for every split."""
    curve: tuple[tuple[int, float, float], ...]
    """(clusters, total inertia, largest diameter bound 2·max‖x − μ‖): of one cluster, then after every split."""
    refused: int
    """Clusters left whole because a child would have held fewer than `min_tokens` tokens."""


@dataclass(frozen=True)
class _Cluster:
    rows: Tensor  # [m] int64, ascending; empty once it is split
    points: int
    mean: Tensor  # [d] fp64
    inertia: float
    radius: float
    children: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Data:
    values: Tensor  # [n, d]
    pool: ThreadPoolExecutor


def advised_clusters(tokens: int, config: ClusterConfig) -> int:
    """K: `config.clusters` if given, else one for every 2 · min_tokens of the train tokens, at least one."""
    if config.clusters is not None:
        return config.clusters
    return max(1, tokens // max(1, 2 * config.min_tokens))


def bisect(
    embeddings: np.ndarray,
    config: ClusterConfig,
    clusters: int,
    tokens: np.ndarray | None = None,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> Clustering:
    """Bisecting k-means: 2-means of the cluster that `config.criterion` puts first, until there are `clusters`.

    embeddings: [n, d] unit rows, fp32 or fp16, a memory map too; tokens: [n] of each document, none = no minimum;
    rows: [m] ascending, those to cluster, none = all.
    A start of 2-means has converged when Σ‖Δc‖² ≤ tolerance · (mean variance of the columns of `embeddings`).
    K falls below `clusters` when every cluster left is refused, or one point, perhaps many times.
    Held beside `embeddings`: 8192 rows in fp32, a few blocks of 2048 for every thread, and about
    80 + 5 · restarts bytes a point. Equal inputs and seed give equal clusters, however many threads there are.
    Raises LocalMoEError for a row that is not of length one, ValueError for arguments that do not go together.
    """
    n = len(embeddings)
    if embeddings.ndim != 2 or embeddings.dtype not in (np.float32, np.float16) or n == 0 or clusters < 1:
        raise ValueError(f"cannot make {clusters} clusters of {embeddings.dtype} {embeddings.shape}")
    if tokens is not None and tokens.shape != (n,):
        raise ValueError(f"{n} embeddings, but tokens of shape {tokens.shape}")
    if rows is not None and (len(rows) == 0 or (np.diff(rows) <= 0).any()):
        raise ValueError("the rows to cluster must ascend, and be at least one")
    chosen = torch.arange(n) if rows is None else torch.from_numpy(rows.astype(np.int64))
    weights = None if tokens is None else torch.from_numpy(tokens.astype(np.int64))
    with _threads() as pool:
        data = _Data(_as_tensor(embeddings), pool)
        found, refused = _grow(data, chosen, config, min(clusters, len(chosen)), weights, seed)
    return _described(data, found, refused)


def _grow(
    data: _Data, rows: Tensor, config: ClusterConfig, clusters: int, tokens: Tensor | None, seed: int
) -> tuple[list[_Cluster], int]:
    """The root and a pair of children for every split, and how many splits were refused."""
    found = [_measure(data, rows, _checked_mean(data, rows))]
    tolerance = config.tolerance * found[0].inertia / (len(rows) * data.values.shape[1])
    queue = [(-_priority(found[0], config), 0)]
    refused = 0
    while queue and len(found) < 2 * clusters - 1:
        index = heapq.heappop(queue)[1]
        parent = found[index]
        if tokens is not None and int(tokens[parent.rows].sum()) < 2 * config.min_tokens:
            refused += 1
            continue
        pair = _split(data, parent, config, tolerance, np.random.default_rng([seed, index]))
        if pair is None:
            continue
        if tokens is not None and min(int(tokens[child.rows].sum()) for child in pair) < config.min_tokens:
            refused += 1
            continue
        found[index] = replace(parent, rows=parent.rows[:0], children=(len(found), len(found) + 1))
        for child in pair:
            heapq.heappush(queue, (-_priority(child, config), len(found)))
            found.append(child)
    return found, refused


def _priority(cluster: _Cluster, config: ClusterConfig) -> float:
    return {"diameter": cluster.radius, "inertia": cluster.inertia, "size": cluster.points}[config.criterion]


def _split(
    data: _Data, parent: _Cluster, config: ClusterConfig, tolerance: float, random: np.random.Generator
) -> tuple[_Cluster, _Cluster] | None:
    """The two halves that 2-means finds, or None if the cluster is one point.

    Starts are drawn from a small sample and refined on it, then all of them on a larger one, then on all rows.
    """
    centres = torch.empty(2, 0, len(parent.mean))
    for size in (*(size for size in _SAMPLES if size < parent.points), parent.points):
        part, drawn = _drawn(data, parent, size, random)
        if centres.shape[1] == 0:
            centres = _seeds(part, drawn.rows, config.restarts, random)
        if centres.shape[1] > 0:
            side, centres, gain = _lloyd(part, drawn, centres, config.max_iterations, tolerance)
    if centres.shape[1] == 0 or gain.max() <= 0:
        return None
    best = int(gain.argmax())
    right = side[:, best]
    return (
        _measure(data, parent.rows[~right], centres[0, best]),
        _measure(data, parent.rows[right], centres[1, best]),
    )


def _drawn(data: _Data, parent: _Cluster, size: int, random: np.random.Generator) -> tuple[_Data, _Cluster]:
    """`size` rows of a cluster, gathered as data of their own unless they are too many, and the cluster they are."""
    if size > _SAMPLES[-1]:
        return data, parent
    rows = parent.rows
    if size < parent.points:
        rows = rows[torch.from_numpy(np.sort(random.choice(parent.points, size, replace=False)))]
    values = _load(data.values, rows)
    mean = values.sum(0).double() / size
    radius = parent.radius + float((mean - parent.mean).norm())
    return _Data(values, data.pool), replace(parent, rows=torch.arange(size), points=size, mean=mean, radius=radius)


def _seeds(data: _Data, rows: Tensor, restarts: int, random: np.random.Generator) -> Tensor:
    """k-means++ for two centres: x uniformly, y with probability ∝ ‖y − x‖²; [2, ≤ restarts, d] fp64."""
    chosen = data.values[rows[torch.from_numpy(random.integers(len(rows), size=restarts))]].float()
    lengths = chosen.square().sum(1)

    def distances(place: slice, x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True) + lengths - 2 * linear(x, chosen)

    squares = torch.cat(list(_over(data, rows, distances)))
    squares[squares < _SAME] = 0
    pairs = []
    for start in range(restarts):
        cumulative = squares[:, start].double().cumsum(0)
        second = int(torch.searchsorted(cumulative, random.random() * cumulative[-1], right=True))
        if second < len(rows):
            pairs.append(torch.stack([chosen[start], data.values[rows[second]].float()]))
    return torch.stack(pairs, dim=1).double() if pairs else torch.empty(2, 0, data.values.shape[1])


def _lloyd(
    data: _Data, cluster: _Cluster, centres: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """2-means from all starts at once: sides [m, R], centres [2, R, d], and by how much inertia falls [R].

    centres: [2, R, d] fp64. x is on side 1 if s = x·w − t > 0, where w = c1 − c0 and t = (‖c1‖² − ‖c0‖²)/2.
    As w and t move, s changes by at most max‖x − μ‖·‖Δw‖ + |μ·Δw − Δt|: only rows whose |s| these bounds have
    used up since they were last read are read again (Hamerly), and only rows that change sides move the sums.
    """
    points, restarts = cluster.points, centres.shape[1]
    side = torch.zeros(points, restarts, dtype=torch.bool)
    margin = torch.full((points, restarts), -1.0)
    sums, counts = torch.zeros_like(centres[1]), torch.zeros(restarts, dtype=torch.float64)
    live = torch.ones(restarts, dtype=torch.bool)
    w, t = _plane(centres)
    for _ in range(iterations):
        for more, joined in _assigned(data, cluster.rows, w, t, side, margin):
            sums += more
            counts += joined
        others = (points - counts).clamp(min=1)[:, None]
        moved = torch.stack([(cluster.mean * points - sums) / others, sums / counts.clamp(min=1)[:, None]])
        live &= (counts > 0) & (counts < points) & ((moved - centres).square().sum((0, 2)) > tolerance)
        centres = moved
        if not live.any():
            break
        new_w, new_t = _plane(centres)
        dw, dt = (new_w - w) * live[:, None], (new_t - t) * live
        margin -= (cluster.radius * dw.norm(dim=1) + (dw @ cluster.mean - dt).abs()).float()
        w, t = w + dw, t + dt
    gain = counts * (points - counts) / points * (centres[1] - centres[0]).square().sum(1)
    return side, centres, gain


def _plane(centres: Tensor) -> tuple[Tensor, Tensor]:
    """The plane halfway between two centres, x·w = t, for every start: w [R, d], t [R]."""
    return centres[1] - centres[0], (centres[1].square().sum(1) - centres[0].square().sum(1)) / 2


def _assigned(
    data: _Data, rows: Tensor, w: Tensor, t: Tensor, side: Tensor, margin: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Renew `side` and `margin` where the margin is used up; yields what side 1 gains: sums [R, d], counts [R]."""
    stale = (margin.amin(1) < 0).nonzero()[:, 0]
    normal, offset = w.float(), t.float()

    def assign(place: slice, x: Tensor) -> tuple[Tensor, Tensor]:
        here = stale[place]
        score = linear(x, normal).sub_(offset)
        now = score > 0
        change = now.float() - side[here].float()
        side[here], margin[here] = now, score.abs_()
        movers = change.any(1).nonzero()[:, 0]
        if len(movers) < len(x) // 2:
            x, change = x[movers], change[movers]
        return (change.T @ x).double(), change.sum(0).double()

    return _over(data, rows[stale], assign)


def _measure(data: _Data, rows: Tensor, centre: Tensor) -> _Cluster:
    """Mean, inertia and radius from the differences to a `centre` [d], the mean up to rounding."""
    near = centre.float()

    def differences(place: slice, x: Tensor) -> tuple[Tensor, float, float]:
        difference = x - near
        lengths = torch.linalg.vector_norm(difference, dim=1)
        return difference.sum(0).double(), float(lengths.square().sum()), float(lengths.max())

    rest, inertia, radius = torch.zeros_like(centre), 0.0, 0.0
    for more, squares, largest in _over(data, rows, differences):
        rest += more
        inertia += squares
        radius = max(radius, largest)
    rest /= len(rows)
    inertia = max(0.0, inertia - len(rows) * float(rest.square().sum()))
    return _Cluster(rows, len(rows), near.double() + rest, inertia, radius)


def _checked_mean(data: _Data, rows: Tensor) -> Tensor:
    """The mean [d] of these rows in fp64; raises LocalMoEError unless all of them are of length one."""

    def add(place: slice, x: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=1)
        wrong = (~((lengths - 1).abs() < 0.01)).nonzero()[:, 0]
        if len(wrong) > 0:
            row = int(wrong[0])
            raise LocalMoEError(
                f"the embedding of document {int(rows[place][row])} has length {float(lengths[row]):.3g}, not 1",
                "use an encoder that returns finite, normalised embeddings, and build again",
            )
        return x.sum(0).double()

    total = torch.zeros(data.values.shape[1], dtype=torch.float64)
    for more in _over(data, rows, add):
        total += more
    return total / len(rows)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each computing alone: sums then come in one order, whatever their number.

    Blocks are small, so torch's own threads would wait for each other more than they compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _over(data: _Data, rows: Tensor, work: Callable[[slice, Tensor], T]) -> Iterator[T]:
    """`work(place, x)` of every block, in order: its place in `rows`, and those rows of the data in fp32."""

    def block(start: int) -> T:
        place = slice(start, start + _BLOCK)
        return work(place, _load(data.values, rows[place]))

    return data.pool.map(block, range(0, len(rows), _BLOCK))


def _load(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of the data in fp32; as they ascend, rows without a gap need no gathering."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return values[first : last + 1].float()
    return values.index_select(0, rows).float()


def _as_tensor(embeddings: np.ndarray) -> Tensor:
    """The same memory as a tensor; it is never written, so a read-only map will do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(embeddings)


def _described(data: _Data, found: list[_Cluster], refused: int) -> Clustering:
    """Number the leaves from left to right: of two children, the one more like the leaf before comes first."""
    nodes = [Node(-1, -1, -1, cluster.points, cluster.inertia, cluster.radius) for cluster in found]
    leaves: list[_Cluster] = []
    assignment = torch.full((len(data.values),), -1, dtype=torch.int32)
    stack = [0]
    while stack:
        index = stack.pop()
        cluster = found[index]
        if cluster.children is None:
            nodes[index] = replace(nodes[index], cluster=len(leaves))
            assignment[cluster.rows] = len(leaves)
            leaves.append(cluster)
            continue
        left, right = cluster.children
        before = leaves[-1].mean if leaves else found[left].mean
        if (found[right].mean - before).norm() < (found[left].mean - before).norm():
            left, right = right, left
        nodes[index] = replace(nodes[index], left=left, right=right)
        stack += [right, left]
    means = torch.stack([leaf.mean for leaf in leaves])
    directions = [leaf.mean if leaf.mean.norm() > 1e-6 else data.values[leaf.rows[0]].double() for leaf in leaves]
    return Clustering(
        assignment=assignment.numpy(),
        means=means.float().numpy(),
        centroids=normalize(torch.stack(directions)).float().numpy(),
        tree=tuple(nodes),
        curve=_curve(found),
        refused=refused,
    )


def _curve(found: list[_Cluster]) -> tuple[tuple[int, float, float], ...]:
    """The elbow, from the splits in the order in which they were made."""
    inertia, radius = np.zeros(len(found)), np.zeros(len(found))
    inertia[0], radius[0] = found[0].inertia, found[0].radius
    curve = [(1, found[0].inertia, 2 * found[0].radius)]
    splits = sorted((cluster.children, index) for index, cluster in enumerate(found) if cluster.children is not None)
    for children, parent in splits:
        inertia[parent] = radius[parent] = 0
        for child in children:
            inertia[child], radius[child] = found[child].inertia, found[child].radius
        curve.append((len(curve) + 1, float(inertia.sum()), 2 * float(radius.max())))
    return tuple(curve)
