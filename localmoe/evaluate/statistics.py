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
        """ "better", "worse", or "no difference shown" where the interval holds zero."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


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
    draw = np.random.default_rng(seed)
    gains = []
    for _ in range(0, RESAMPLES, 1000):
        times = draw.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=1000)
        gains.append(1 - np.exp((times @ (ours - theirs)) / (times @ counts)))
    low, high = np.quantile(np.concatenate(gains), [0.025, 0.975])
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
    draw = np.random.default_rng(seed)
    times = draw.multinomial(len(ours), np.full(len(ours), 1 / len(ours)), size=RESAMPLES)
    gaps = times @ (start - goal)
    if np.quantile(gaps, 0.025) <= 0:
        return None
    low, high = np.quantile((times @ (start - ours)) / gaps, [0.025, 0.975])
    return Share(float((start - ours).sum() / (start - goal).sum()), float(low), float(high), len(ours))
