"""Statistics of paired comparisons: perplexity, and by how much one method beats another on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Of the paired bootstrap (specification, "Evaluation protocol")."""


@dataclass(frozen=True)
class Comparison:
    """Relative gain in perplexity of a method over a baseline, with its 95 % interval; positive = better."""

    gain: float
    low: float
    high: float
    documents: int

    @property
    def verdict(self) -> str:
        """`outcome` of the interval."""
        return outcome(self.low, self.high)


def outcome(low: float, high: float) -> str:
    """ "better", "worse", or "no difference shown" where the 95 % interval holds zero."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp(Σ nll / Σ tokens) over documents; nll in nats, summed per document."""
    return math.exp(sum(nll) / sum(tokens))


def compare(method: Sequence[float], baseline: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Comparison:
    """gain = 1 − ppl(method) / ppl(baseline), its interval by resampling documents, both methods on the same draw.

    method, baseline: summed nll [n] of the same documents; tokens [n]. Raises ValueError for unequal lengths or none.
    """
    ours, theirs, counts = (np.asarray(values, dtype=np.float64) for values in (method, baseline, tokens))
    if not len(ours) == len(theirs) == len(counts) > 0:
        raise ValueError(f"{len(ours)}, {len(theirs)} and {len(counts)} values cannot be paired")
    above, below = _resampled(ours - theirs, counts, seed)
    low, high = np.quantile(1 - np.exp(above / below), [0.025, 0.975])
    gain = 1 - math.exp((ours - theirs).sum() / counts.sum())
    return Comparison(float(gain), float(low), float(high), len(counts))


@dataclass(frozen=True)
class Share:
    """Which share of the way from one method to another a third one goes, with its 95 % interval; 1 = all of it."""

    share: float
    low: float
    high: float
    documents: int


def gap_share(method: Sequence[float], near: Sequence[float], far: Sequence[float], seed: int = 0) -> Share | None:
    """(nll(near) − nll(method)) / (nll(near) − nll(far)), all three on the same draws of documents.

    None where `far` is not better than `near` in at least 97.5 % of the draws: there is no gap to close.
    """
    ours, start, goal = (np.asarray(values, dtype=np.float64) for values in (method, near, far))
    closed, gaps = _resampled(start - ours, start - goal, seed)
    if np.quantile(gaps, 0.025) <= 0:
        return None
    low, high = np.quantile(closed / gaps, [0.025, 0.975])
    return Share(float((start - ours).sum() / (start - goal).sum()), float(low), float(high), len(ours))


@dataclass(frozen=True)
class Difference:
    """Means of a method and a baseline over the same documents, and the 95 % interval of method − baseline."""

    method: float
    baseline: float
    difference: float
    low: float
    high: float
    documents: int
    changed: int
    """Documents whose values differ."""
    mcnemar: float | None
    """Exact two-sided p of as many of the changed ones going one way by chance; for right-or-wrong values only."""

    @property
    def verdict(self) -> str:
        """ "higher", "lower", or "no difference shown": the interval holds zero, or McNemar's p is above 0.05.

        The bootstrap alone is too sure of itself where few right-or-wrong answers changed.
        """
        if self.low <= 0 <= self.high or (self.mcnemar is not None and self.mcnemar > 0.05):
            return "no difference shown"
        return "higher" if self.low > 0 else "lower"


def difference(
    method: Sequence[float], baseline: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Difference:
    """Σ method / Σ weights − Σ baseline / Σ weights, its interval by resampling documents, both on the same draw.

    method, baseline: [n] values of the same documents; weights [n], e.g. bytes of summed losses; none = 1 each.
    Raises ValueError for unequal lengths or none.
    """
    ours, theirs = np.asarray(method, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    counts = np.ones(len(ours)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(ours) == len(theirs) == len(counts) > 0:
        raise ValueError(f"{len(ours)}, {len(theirs)} and {len(counts)} values cannot be paired")
    above, below = _resampled(ours - theirs, counts, seed)
    low, high = np.quantile(above / below, [0.025, 0.975])
    total = counts.sum()
    binary = weights is None and bool(np.isin([ours, theirs], [0, 1]).all())
    return Difference(
        float(ours.sum() / total),
        float(theirs.sum() / total),
        float((ours - theirs).sum() / total),
        float(low),
        float(high),
        len(counts),
        int((ours != theirs).sum()),
        _mcnemar(int((ours > theirs).sum()), int((ours < theirs).sum())) if binary else None,
    )


def _resampled(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of two columns [n] over the same draws of n documents with replacement: two arrays [RESAMPLES]."""
    draw, block = np.random.default_rng(seed), 1000
    columns, sums = np.stack([a, b], axis=1), []
    for _ in range(0, RESAMPLES, block):
        sums.append(draw.multinomial(len(a), np.full(len(a), 1 / len(a)), size=block) @ columns)
    first, second = np.concatenate(sums).T
    return first, second


def _mcnemar(up: int, down: int) -> float:
    """min(1, 2 · P[X ≤ min(up, down)]), X ~ Binomial(up + down, ½)."""
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1))
    return min(1.0, float(2 * tail / 2 ** (up + down)))
