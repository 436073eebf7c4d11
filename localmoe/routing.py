"""Routing: embedded prompts × the experts' centroids → one mix per prompt; no files, no models."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from localmoe.config import RouteConfig
from localmoe.errors import BankError, ConfigError, PromptError, UsageError
from localmoe.registry import Registry

# fp16, the dtype of embeddings at rest, changes the length of a unit vector by up to 2⁻¹¹.
_LENGTH_TOLERANCE = 1e-3
# Routers choose experts, not how they are merged: who merges otherwise replaces it in the mix.
_METHOD = "linear"
# Beyond `_ALL` experts softmax and τ act on the `_NEAREST` nearest.
_ALL = 100_000
_NEAREST = 1_024
# What `find_beta` tries: ten β per decade.
_BETAS = tuple(10.0 ** (exponent / 10) for exponent in range(-40, 11))


@dataclass(frozen=True)
class Mix:
    """Which experts answer a prompt, and with which weights; no experts = the base model.

    Weights of routers are ≥ 0 and sum to 1; a Mix itself asks only for finite fp32 numbers.
    Raises UsageError if the experts are not sorted and distinct or the weights do not match them.
    """

    experts: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    """Merge method, a name in `localmoe.merging.mergers`."""
    bank: str
    """Digest of the bank that it was routed in."""
    fallback: str | None
    """Why nothing passed the threshold, if nothing did."""

    def __post_init__(self) -> None:
        if list(self.experts) != sorted(set(self.experts)):
            raise UsageError(f"the experts of a mix must be sorted and distinct: {', '.join(self.experts)}")
        if len(self.weights) != len(self.experts):
            raise UsageError(f"a mix of {len(self.experts)} experts has {len(self.weights)} weights")
        if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in self.weights):
            raise UsageError(f"the weights of a mix must be finite fp32 numbers, not {self.weights}")

    def key(self, base: str, hashes: Mapping[str, str]) -> str:
        """SHA-256 (hex) of what decides the merged weights: base, experts' contents, weights as fp32, method.

        base: fingerprint of the base model; hashes: expert id → content hash. Ids, bank and fallback do not
        enter. Raises BankError for an expert without a hash.
        """
        for expert in self.experts:
            if expert not in hashes:
                raise BankError(f"expert {expert!r} of the mix is not in the bank", "route the prompt again")
        weighted = [
            (hashes[expert], struct.pack("<f", weight).hex())
            for expert, weight in zip(self.experts, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps([base, weighted, self.method]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Centroids:
    """The experts that may be routed to, one unit vector each.

    vectors: [K, d] fp32, rows of length 1, in the order of `experts`; bank: digest of the bank.
    Raises BankError if they do not fit together.
    """

    experts: tuple[str, ...]
    vectors: Tensor
    bank: str

    def __post_init__(self) -> None:
        shape, dtype = list(self.vectors.shape), self.vectors.dtype
        if len(shape) != 2 or shape[0] != len(self.experts) or dtype != torch.float32:
            raise BankError(
                f"{len(self.experts)} experts need centroids [K, d] in fp32, not {shape} in {dtype}",
                "build the bank again: localmoe build",
            )
        if len(set(self.experts)) != len(self.experts):
            raise BankError("two experts have the same id", "build the bank again: localmoe build")
        row, length = _first_not_unit(self.vectors)
        if row is not None:
            raise BankError(
                f"the centroid of expert {self.experts[row]!r} has length {length:.4g}, not 1",
                "build the bank again: localmoe build",
            )

    @cached_property
    def fixed_point(self) -> Tensor:
        """The vectors as `similarities` multiplies them: [K, d] fp64 on the CPU, multiples of 2⁻²⁶."""
        return _fixed_point(self.vectors)


@dataclass(frozen=True)
class BetaSearch:
    """What `find_beta` found: β, the mean number of active experts it gives, and the curve of (β, mean)."""

    beta: float
    active: float
    curve: tuple[tuple[float, float], ...]


Router = Callable[[Tensor, Centroids, RouteConfig], list[Mix]]
"""Unit queries [n, d] × centroids [K, d], K ≥ 1 → n mixes, each independent of the other queries."""

routers: Registry[Router] = Registry("router")

WITHOUT_BETA = ("nearest", "uniform")
"""Routers that do not read β."""


def route(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """One mix per prompt, by the router that `config` names; the base model if there are no experts.

    queries: [n, d] of length 1, any float dtype. Equal queries give bit-equal mixes, whatever else is in the
    batch. Raises PromptError (zero or non-finite query), UsageError (query not of length 1), BankError (other
    d), UnknownNameError (router), ConfigError (a β that is needed and None).
    """
    router = routers[config.router]
    _check_queries(queries, centroids)
    if not centroids.experts:
        return [Mix((), (), _METHOD, centroids.bank, "no expert to use: the base model")] * len(queries)
    return router(queries, centroids, config)


def similarities(queries: Tensor, centroids: Centroids) -> Tensor:
    """s_k = φ_k·φ*: [n, d] × [K, d] → [n, K] fp64 on the CPU; bit-equal whatever the other rows of both are.

    Both sides are rounded to multiples of 2⁻²⁶. Products, and by Cauchy-Schwarz all their partial sums, are
    then multiples of 2⁻⁵² below 2, which fp64 holds exactly: no order of summation makes a difference.
    Raises PromptError, UsageError and BankError as `route` does.
    """
    _check_queries(queries, centroids)
    return _fixed_point(queries) @ centroids.fixed_point.T


def sparse_softmax(scores: Tensor, beta: float, tau: float) -> Tensor:
    """w ∝ ReLU(p − τ), p = softmax(s/β); if β = 0 or no p is above τ, the first of the nearest has weight 1.

    scores: [n, K ≥ 1] → weights [n, K] fp64, rows sum to 1. Beyond 10⁵ experts p is over the 1,024 nearest.
    Raises UsageError for scores that are not finite, ConfigError for β < 0 or τ outside [0, 1).
    """
    values, columns = _ranked(scores)
    weights = _normalised(_excess(values, beta, tau))
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
    values, _ = _ranked(scores)

    def mean_active(beta: float) -> float:
        passed = (_excess(values, beta, tau) > 0).sum(dim=1)
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


@routers.register("sparse_softmax")
def by_sparse_softmax(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The paper's weights: w ∝ ReLU(softmax(s/β) − τ)."""
    values, columns = _ranked(similarities(queries, centroids))
    return _mixes(_excess(values, _needed_beta(config), config.tau), columns, centroids, config)


@routers.register("threshold")
def by_threshold(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The weights of `ttmerge`: w ∝ p where p = softmax(s/β) > τ (its `beta` is √β: its 0.2 is 0.04 here)."""
    values, columns = _ranked(similarities(queries, centroids))
    p = _softmax(values, _needed_beta(config))
    return _mixes(_fixed_sum(torch.where(p > config.tau, p, 0.0)), columns, centroids, config)


@routers.register("nearest")
def by_nearest(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The nearest expert alone, with weight 1."""
    values, columns = _ranked(similarities(queries, centroids))
    return _mixes(torch.ones_like(values[:, :1]), columns, centroids, config)


@routers.register("uniform")
def by_uniform(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The N = ⌊active⌋ nearest experts, at most `max_experts`, with weight 1/N each."""
    values, columns = _ranked(similarities(queries, centroids))
    count = int(min(config.active, config.max_experts))
    return _mixes(torch.ones_like(values[:, :count]), columns, centroids, config)


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n, K] in falling order, ties by column, with their columns; beyond 10⁵ the nearest only."""
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise UsageError(f"scores must be [queries, experts], at least one expert, not {list(scores.shape)}")
    if not scores.isfinite().all():
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise UsageError(f"score of query {row} and expert {column} is {scores[row, column].item()}, not a number")
    values, columns = scores.double().cpu().sort(dim=1, descending=True, stable=True)
    kept = _NEAREST if scores.shape[1] > _ALL else scores.shape[1]
    return values[:, :kept], columns[:, :kept]


def _softmax(values: Tensor, beta: float) -> Tensor:
    """p = softmax(s/β) of scores in falling order; its limit for β = 0."""
    if not beta >= 0:
        raise ConfigError(f"β must be at least 0, not {beta}", "set route.beta, e.g. route.beta=0.05")
    shifted = values - values[:, :1]  # before the division, so that no β overflows
    if beta == 0:
        return torch.eye(1, shifted.shape[1], dtype=torch.float64).expand_as(shifted)
    return (shifted / beta).softmax(dim=1)


def _excess(values: Tensor, beta: float, tau: float) -> Tensor:
    """ReLU(p − τ) [n, K] of scores in falling order."""
    if not 0 <= tau < 1:
        raise ConfigError(f"τ must be at least 0 and below 1, not {tau}", "set route.tau, e.g. route.tau=0.01")
    return _fixed_sum((_softmax(values, beta) - tau).relu())


def _fixed_sum(parts: Tensor) -> Tensor:
    """Numbers ≥ 0 that sum to at most 1, as multiples of 2⁻⁵², so that their sum is exact in any order."""
    return (parts * 2.0**52).round() * 2.0**-52


def _normalised(mass: Tensor) -> Tensor:
    """Rows of `mass` [n, K], in falling order, over their sums; in a row of zeros the first column gets 1."""
    mass = mass.clone()
    mass[mass[:, 0] == 0, 0] = 1.0
    return mass / mass.sum(dim=1, keepdim=True)


def _mixes(mass: Tensor, columns: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """Mixes with weights ∝ `mass` [n, ≤ K], rows in falling order; columns: [n, K], the expert of each."""
    mass = mass[:, : config.max_experts]
    columns = columns[:, : mass.shape[1]]
    weights = _normalised(mass).float()
    why = f"no expert's softmax weight is above tau = {config.tau}: the nearest alone"
    mixes = []
    for row, passed, ranks in zip(weights.tolist(), (mass[:, 0] > 0).tolist(), columns.tolist(), strict=True):
        chosen = sorted((centroids.experts[k], weight) for k, weight in zip(ranks, row, strict=True) if weight > 0)
        experts, kept = zip(*chosen, strict=True)
        mixes.append(Mix(experts, kept, _METHOD, centroids.bank, None if passed else why))
    return mixes


def _needed_beta(config: RouteConfig) -> float:
    if config.beta is None:
        raise ConfigError(
            f"router {config.router!r} needs a β, and none is set",
            "a build finds it on the tune documents and records it in the bank; or set e.g. route.beta=0.05",
        )
    return config.beta


def _fixed_point(vectors: Tensor) -> Tensor:
    return (vectors.cpu().double() * 2.0**26).round() * 2.0**-26


def _check_queries(queries: Tensor, centroids: Centroids) -> None:
    if queries.ndim != 2 or queries.shape[1] != centroids.vectors.shape[1]:
        raise BankError(
            f"embedded prompts {list(queries.shape)} do not fit centroids {list(centroids.vectors.shape)}",
            "embed prompts with the encoder that the bank was built with",
        )
    row, length = _first_not_unit(queries)
    if row is None:
        return
    if length == 0 or not length < float("inf"):
        kind = "zero" if length == 0 else "not finite"
        raise PromptError(f"the embedding of prompt {row} is {kind}", "give a prompt with text the encoder can read")
    raise UsageError(f"the embedding of prompt {row} has length {length:.4g}, not 1", "encoders return unit vectors")


def _first_not_unit(vectors: Tensor) -> tuple[int | None, float]:
    """Row and length of the first row that is not of length 1 (NaN is not); (None, 1) if all are."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    wrong = ~((lengths - 1).abs() <= _LENGTH_TOLERANCE)
    if not wrong.any():
        return None, 1.0
    row = int(wrong.nonzero()[0])
    return row, lengths[row].item()
