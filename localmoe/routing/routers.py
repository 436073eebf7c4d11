"""Routers: embedded prompts × the experts' centroids → one mix per prompt, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.config import RouteConfig
from localmoe.errors import ConfigError
from localmoe.registry import Registry
from localmoe.routing.centroids import Centroids, check_queries, mean_similarities, similarities
from localmoe.routing.mix import Mix
from localmoe.routing.weights import excess, fixed_sum, normalised, ranked, softmax, variance_reductions

# Routers choose experts, not how they are merged: who merges otherwise replaces it in the mix.
_METHOD = "linear"

Router = Callable[[Tensor, Centroids, RouteConfig], list[Mix]]
"""Unit queries [n, d] × centroids [K, d], K ≥ 1 → n mixes, each independent of the other queries."""

routers: Registry[Router] = Registry("router")

WITHOUT_BETA = ("nearest", "uniform", "sift")
"""Routers that do not read β."""

ON_MEANS = ("members",)
"""Routers whose softmax acts on φ*·μ_k, so that they need a β of their own."""


def route(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """One mix per prompt, by the router that `config` names; the base model if there are no experts.

    queries: [n, d] of length 1, any float dtype. Equal queries give bit-equal mixes, whatever else is in the
    batch. Raises PromptError (zero or non-finite query), UsageError (query not of length 1), BankError (other
    d; means that a router needs and that are not known), UnknownNameError (router), ConfigError (a β that is needed
    and None).
    """
    router = routers[config.router]
    check_queries(queries, centroids)
    if not centroids.experts:
        return [Mix((), (), _METHOD, centroids.bank, "no expert to use: the base model")] * len(queries)
    return router(queries, centroids, config)


def beta_scores(queries: Tensor, centroids: Centroids, router: str) -> Tensor:
    """The scores [n, K] that a router divides by β: φ*·μ_k for those on the means, else φ*·φ_k; for `find_beta`."""
    return (mean_similarities if router in ON_MEANS else similarities)(queries, centroids)


@routers.register("sparse_softmax")
def by_sparse_softmax(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The paper's weights: w ∝ ReLU(softmax(s/β) − τ)."""
    values, columns = ranked(similarities(queries, centroids))
    return _mixes(excess(values, _needed_beta(config), config.tau), columns, centroids, config)


@routers.register("threshold")
def by_threshold(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The weights of `ttmerge`: w ∝ p where p = softmax(s/β) > τ (its `beta` is √β: its 0.2 is 0.04 here)."""
    values, columns = ranked(similarities(queries, centroids))
    p = softmax(values, _needed_beta(config))
    return _mixes(fixed_sum(torch.where(p > config.tau, p, 0.0)), columns, centroids, config)


@routers.register("nearest")
def by_nearest(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The nearest expert alone, with weight 1."""
    values, columns = ranked(similarities(queries, centroids))
    return _mixes(torch.ones_like(values[:, :1]), columns, centroids, config)


@routers.register("uniform")
def by_uniform(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """The N = ⌊active⌋ nearest experts, at most `max_experts`, with weight 1/N each."""
    values, columns = ranked(similarities(queries, centroids))
    count = int(min(config.active, config.max_experts))
    return _mixes(torch.ones_like(values[:, :count]), columns, centroids, config)


@routers.register("members")
def by_members(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """By the mean squared distance to the expert's documents: w ∝ ReLU(softmax(φ*·μ/β) − τ).

    mean ‖φ* − φ(x)‖² = 2 − 2 φ*·μ_k with the un-normalised mean μ_k; half of it, negated, is the score.
    """
    values, columns = ranked(mean_similarities(queries, centroids))
    return _mixes(excess(values, _needed_beta(config), config.tau), columns, centroids, config)


@routers.register("sift")
def by_sift(queries: Tensor, centroids: Centroids, config: RouteConfig) -> list[Mix]:
    """w_n ∝ σ²_{n−1} − σ²_n, n = 1 … N, over the N = ⌊active⌋ nearest experts, at most `max_experts`.

    σ²_n = 1 − kᵀ(K + λI)⁻¹k is the variance at the prompt once the n nearest centroids are known (λ = `sift_lambda`):
    an expert like one that is nearer gets little.
    """
    values, columns = ranked(similarities(queries, centroids))
    count = int(min(config.active, config.max_experts, values.shape[1]))
    mass = torch.zeros(len(values), count, dtype=torch.float64)
    for row in range(len(values)):
        vectors = centroids.fixed_point[columns[row, :count]]
        mass[row] = variance_reductions(values[row, :count], vectors @ vectors.T, config.sift_lambda)
    why = "the prompt is at right angles to the nearest centroids: the nearest alone"
    return _mixes(fixed_sum(mass), columns, centroids, config, why)


def _mixes(
    mass: Tensor, columns: Tensor, centroids: Centroids, config: RouteConfig, fallback: str | None = None
) -> list[Mix]:
    """Mixes with weights ∝ `mass` [n, ≤ K]; columns: [n, K], the expert of each; fallback: why a row may be zero."""
    mass = mass[:, : config.max_experts]
    columns = columns[:, : mass.shape[1]]
    weights = normalised(mass).float()
    passed = (mass.sum(dim=1) > 0).tolist()
    if fallback is None:
        fallback = f"no expert's softmax weight is above tau = {config.tau}: the nearest alone"
    mixes = []
    for row, some, ranks in zip(weights.tolist(), passed, columns.tolist(), strict=True):
        chosen = sorted((centroids.experts[k], weight) for k, weight in zip(ranks, row, strict=True) if weight > 0)
        experts, kept = zip(*chosen, strict=True)
        mixes.append(Mix(experts, kept, _METHOD, centroids.bank, None if some else fallback))
    return mixes


def _needed_beta(config: RouteConfig) -> float:
    if config.beta is None:
        raise ConfigError(
            f"router {config.router!r} needs a β, and none is set",
            "a build finds it on the tune documents and records it in the bank; or set e.g. route.beta=0.05",
        )
    return config.beta
