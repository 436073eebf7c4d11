"""Weights: from scores over experts to the sparse softmax, β for a wanted number of experts, SIFT's reductions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.errors import ConfigError, UsageError

# Beyond `_ALL` experts softmax and τ act on the `_NEAREST` nearest.
_ALL = 100_000
_NEAREST = 1_024
# What `find_beta` tries: ten β per decade.
_BETAS = tuple(10.0 ** (exponent / 10) for exponent in range(-40, 11))


@dataclass(frozen=True)
class BetaSearch:
    """What `find_beta` found: β, the mean number of active experts it gives, and the curve of (β, mean)."""

    beta: float
    active: float
    curve: tuple[tuple[float, float], ...]


def sparse_softmax(scores: Tensor, beta: float, tau: float) -> Tensor:
    """w ∝ ReLU(p − τ), p = softmax(s/β); if β = 0 or no p is above τ, the first of the nearest has weight 1.

    scores: [n, K ≥ 1] → weights [n, K] fp64, rows sum to 1. Beyond 10⁵ experts p is over the 1,024 nearest.
    Raises UsageError for scores that are not finite, ConfigError for β < 0 or τ outside [0, 1).
    """
    values, columns = ranked(scores)
    weights = normalised(excess(values, beta, tau))
    return torch.zeros(scores.shape, dtype=torch.float64).scatter_(1, columns, weights)


def find_beta(scores: Tensor, active: float, tau: float, max_experts: int) -> BetaSearch:
    """The largest β on the rising branch whose mean number of active experts is at most `active`.

    scores: [n, K] of tune queries. A query's active experts are those of its mix: p > τ, at least 1, at most
    `max_experts`. As β grows from 0 the mean rises from 1 to a peak and may then fall, because with K·τ ≥ 1 a
    flat p is nowhere above τ: the peak is found on a log grid, and bisection stays below it.
    β = 0 if `active` is 1 or the mean never rises. Raises UsageError for scores that are not finite,
    ConfigError if there are none or `active` is below 1.
    """
    if scores.numel() == 0:
        raise ConfigError(
            f"β cannot be found from {list(scores.shape)} scores [tune prompts, experts]",
            "set route.beta, or raise corpus.tune_fraction",
        )
    if not active >= 1:
        raise ConfigError(f"no β gives {active} active experts", "set route.active to 1 or more")
    values, _ = ranked(scores)

    def mean_active(beta: float) -> float:
        passed = (excess(values, beta, tau) > 0).sum(dim=1)
        return passed.clamp(1, max_experts).double().mean().item()

    curve = tuple((beta, mean_active(beta)) for beta in _BETAS)
    means = [mean for _, mean in curve]
    peak = means.index(max(means))
    fitting = [index for index in range(peak + 1) if means[index] <= active]
    if active == 1 or means[peak] <= 1 or not fitting:
        return BetaSearch(0.0, mean_active(0.0), curve)
    low = _BETAS[fitting[-1]]
    if fitting[-1] < peak:
        high = _BETAS[fitting[-1] + 1]
        for _ in range(12):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if mean_active(middle) <= active else (low, middle)
    return BetaSearch(low, mean_active(low), curve)


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n, K] in falling order, ties by column, with their columns; beyond 10⁵ the nearest only."""
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise UsageError(f"scores must be [queries, experts], at least one expert, not {list(scores.shape)}")
    if not scores.isfinite().all():
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise UsageError(f"score of query {row} and expert {column} is {scores[row, column].item()}, not a number")
    values, columns = scores.double().cpu().sort(dim=1, descending=True, stable=True)
    kept = _NEAREST if scores.shape[1] > _ALL else scores.shape[1]
    return values[:, :kept], columns[:, :kept]


def softmax(values: Tensor, beta: float) -> Tensor:
    """p = softmax(s/β) of scores in falling order; its limit for β = 0."""
    if not beta >= 0:
        raise ConfigError(f"β must be at least 0, not {beta}", "set route.beta, e.g. route.beta=0.05")
    shifted = values - values[:, :1]  # before the division, so that no β overflows
    if beta == 0:
        return torch.eye(1, shifted.shape[1], dtype=torch.float64).expand_as(shifted)
    return (shifted / beta).softmax(dim=1)


def excess(values: Tensor, beta: float, tau: float) -> Tensor:
    """ReLU(p − τ) [n, K] of scores in falling order."""
    if not 0 <= tau < 1:
        raise ConfigError(f"τ must be at least 0 and below 1, not {tau}", "set route.tau, e.g. route.tau=0.01")
    return fixed_sum((softmax(values, beta) - tau).relu())


def fixed_sum(parts: Tensor) -> Tensor:
    """Numbers ≥ 0 that sum to at most 1, as multiples of 2⁻⁵², so that their sum is exact in any order."""
    return (parts * 2.0**52).round() * 2.0**-52


def normalised(mass: Tensor) -> Tensor:
    """Rows of `mass` [n, K] ≥ 0 over their sums; in a row of zeros the first column gets 1."""
    total = mass.sum(dim=1, keepdim=True)
    empty = total == 0
    mass = mass.clone()
    mass[:, :1] += empty
    return mass / (total + empty)


def variance_reductions(near: Tensor, gram: Tensor, noise: float) -> Tensor:
    """What each centroid, one after the other, takes off the variance at the prompt: σ²_{n−1} − σ²_n, n = 1 … N.

    σ²_n = 1 − kᵀ(K + λI)⁻¹k over the first n of them; σ²_0 = 1. near: k = (φ_n·φ*) [N]; gram: K = (φ_m·φ_n) [N, N];
    both fp64; noise: λ > 0. One pivot of K + λI is eliminated at a time, element by element: no sum whose order
    could change.
    """
    left, covariance = near, gram + noise * torch.eye(len(near), dtype=torch.float64)
    reductions = []
    for n in range(len(near)):
        pivot = covariance[n, n]
        reductions.append(left[n] * left[n] / pivot)
        factors = covariance[:, n] / pivot
        left = left - factors * left[n]
        covariance = covariance - factors[:, None] * covariance[n]
    return torch.stack(reductions)
