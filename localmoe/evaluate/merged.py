"""Methods that route: merged models, their ensembles, other routers, and the null control."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from localmoe.config import GenerateConfig, RouteConfig
from localmoe.evaluate.bench import Bench, NotPossibleError, Scores, methods, plain_mixes
from localmoe.evaluate.entropies import entropies
from localmoe.evaluate.protocol import Trial, query_tokens
from localmoe.models import packed
from localmoe.packing import token_nll
from localmoe.routing import ON_MEANS, Mix, beta_scores, find_beta, route, similarities, sparse_softmax
from localmoe.runtime.engine import base_mix

_NEW_TOKENS = 8  # generated per timed prompt: the first, and the mean of those after it


def routed(bench: Bench, config: RouteConfig) -> tuple[list[Mix], tuple[float, ...]]:
    """The mix of every query, and the seconds that each took."""
    centroids = bench.engine.router.centroids
    mixes, seconds = [], []
    for query in bench.queries:
        started = time.perf_counter()
        mixes += route(query[None], centroids, config)
        seconds.append(time.perf_counter() - started)
    return mixes, tuple(seconds)


def with_active(bench: Bench, active: float, router: str = "sparse_softmax") -> RouteConfig:
    """Routing with so many active experts on average: β found on the queries of the tune documents."""
    config = bench.engine.config
    scores = beta_scores(bench.tune_queries, bench.engine.router.centroids, router)
    beta = find_beta(scores, active, config.tau, config.max_experts).beta
    return replace(config, router=router, beta=beta, active=active)


def score_mixes(bench: Bench, mixes: Sequence[Mix], select: Sequence[float], title: str) -> Scores:
    """Every suffix under the model merged by its mix, with the seconds of each stage."""
    engine, totals = bench.engine, []
    load, merge = [], []
    for place, (trial, mix) in enumerate(zip(bench.trials, mixes, strict=True)):
        with engine.merged(mix) as (loaded, merged), packed(engine.model):
            totals.append(float(token_nll(engine.model, [trial.passage])[0].double().sum()))
        load.append(loaded)
        merge.append(merged)
        bench.watch(title, place + 1, len(mixes))
    embed = bench.embedded[1]
    stages = {"embed": embed, "select": tuple(select), "load": tuple(load), "merge": tuple(merge)}
    added = tuple(sum(parts) for parts in zip(*stages.values(), strict=True))
    return Scores(
        tuple(range(len(totals))),
        tuple(totals),
        bench.bank_tokens,
        plain_mixes(mixes),
        stages | {"added": added} | time_generation(bench, mixes),
    )


def time_generation(bench: Bench, mixes: Sequence[Mix]) -> dict[str, tuple[float, ...]]:
    """Seconds from prompt to first token, and of a token after it, of the first prompts."""
    first, each = [], []
    config = GenerateConfig(max_new_tokens=_NEW_TOKENS)
    for trial, mix in list(zip(bench.trials, mixes, strict=True))[: bench.config.timed]:
        pieces = bench.engine.start(trial.prefix, config, mix)
        answer = pieces.answer("".join(pieces))
        first.append(answer.seconds.first_token)
        if answer.new_tokens > 1:
            each.append((answer.seconds.total - answer.seconds.first_token) / (answer.new_tokens - 1))
    return {"first_token": tuple(first), "per_token": tuple(each)}


@methods.register("merged")
def merged(bench: Bench) -> Scores:
    """What the bank does as it is shipped."""
    mixes, select = routed(bench, bench.engine.config)
    scores = score_mixes(bench, mixes, select, "merged")
    nearest = similarities(bench.queries, bench.engine.router.centroids).amax(dim=1).tolist()
    config = bench.engine.config
    records = [record.adapter for record in bench.engine.bank.routable() if record.adapter is not None]
    size = sum(record.weights.bytes for record in records) / max(1, len(records))
    told = {"beta": config.beta, "router": config.router, "expert_bytes": round(size), "similarity": nearest}
    return replace(scores, detail=told)


def _merged_with(active: int) -> Callable[[Bench], Scores]:
    def method(bench: Bench) -> Scores:
        config = with_active(bench, active)
        mixes, select = routed(bench, config)
        return replace(score_mixes(bench, mixes, select, f"merged-{active}"), detail={"beta": config.beta})

    method.__doc__ = f"Merged, {active} experts active on average."
    return method


for _active in (1, 3, 10):
    methods.register(f"merged-{_active}")(_merged_with(_active))


def by_router(bench: Bench, name: str) -> RouteConfig:
    """Routing as the bank does, but by another router; one whose scores are not the bank's gets a β of its own."""
    own = bench.engine.config
    if name in ON_MEANS and own.router != name:
        return with_active(bench, own.active, name)
    return replace(own, router=name)


def _by_router(name: str) -> Callable[[Bench], Scores]:
    def method(bench: Bench) -> Scores:
        config = by_router(bench, name)
        mixes, select = routed(bench, config)
        detail = {"beta": config.beta, "active": config.active, "sift_lambda": config.sift_lambda}
        return replace(score_mixes(bench, mixes, select, name), detail=detail)

    method.__doc__ = f"Merged by the mixes of the router {name!r}."
    return method


for _name in ("nearest", "uniform", "sift", "members"):
    methods.register(_name)(_by_router(_name))


@methods.register("null")
def null(bench: Bench) -> Scores:
    """The shipped mixes, each expert exchanged for another one: the control that must lose."""
    names = list(bench.engine.router.centroids.experts)
    if len(names) < 2:
        raise NotPossibleError("one expert cannot be exchanged for another", "leave out null")
    shuffled = names[:]
    random.Random(bench.config.seed).shuffle(shuffled)  # noqa: S311 - a control, not secrets
    # each expert becomes the next one on a random circle, so that none stays what it was
    other = {name: shuffled[(place + 1) % len(names)] for place, name in enumerate(shuffled)}
    mixes, select = routed(bench, bench.engine.config)
    return score_mixes(bench, [exchanged(mix, other) for mix in mixes], select, "null")


def exchanged(mix: Mix, other: dict[str, str]) -> Mix:
    """The mix with every expert exchanged for another one, weights and all else as they are."""
    pairs = zip(mix.experts, mix.weights, strict=True)
    experts, weights = zip(*sorted((other.get(name, name), weight) for name, weight in pairs), strict=True)
    return replace(mix, experts=experts, weights=weights)


@methods.register("ensemble")
def ensemble(bench: Bench) -> Scores:
    """The shipped mixes in probability space: p = Σ_k w_k p_k, one forward an expert."""
    mixes, select = routed(bench, bench.engine.config)
    return _ensembled(bench, mixes, select, "ensemble")


def _ensemble_of(active: int) -> Callable[[Bench], Scores]:
    def method(bench: Bench) -> Scores:
        mixes, select = routed(bench, with_active(bench, active))
        return _ensembled(bench, mixes, select, f"ensemble-{active}")

    method.__doc__ = f"Ensembled in probability space, {active} experts active on average."
    return method


for _active in (3, 10):
    methods.register(f"ensemble-{_active}")(_ensemble_of(_active))


def _ensembled(bench: Bench, mixes: Sequence[Mix], select: Sequence[float], title: str) -> Scores:
    totals, forwards = [], []
    for place, (trial, mix) in enumerate(zip(bench.trials, mixes, strict=True)):
        started = time.perf_counter()
        totals.append(float(ensemble_nll(bench, trial, mix).sum()))
        forwards.append(time.perf_counter() - started)
        bench.watch(title, place + 1, len(mixes))
    stages = {"embed": bench.embedded[1], "select": tuple(select), "forwards": tuple(forwards)}
    stages["added"] = tuple(sum(parts) for parts in zip(*stages.values(), strict=True))
    return Scores(tuple(range(len(totals))), tuple(totals), bench.bank_tokens, plain_mixes(mixes), stages)


def ensemble_nll(bench: Bench, trial: Trial, mix: Mix) -> torch.Tensor:
    """−log Σ_k w_k p_k(token) of every labelled token [m], fp64."""
    if not mix.experts:
        return bench.engine.token_nll(trial.passage, mix).double()
    parts = [
        weight * (-bench.engine.token_nll(trial.passage, _alone(mix, name)).double()).exp()
        for name, weight in zip(mix.experts, mix.weights, strict=True)
    ]
    return -torch.stack(parts).sum(dim=0).log()


def _alone(mix: Mix, expert: str) -> Mix:
    return replace(mix, experts=(expert,), weights=(1.0,))


@methods.register("entropy")
def entropy(bench: Bench) -> Scores:
    """DaWin's weights: sparse-softmax(−H_k/β), H_k the mean entropy of expert k's predictions on the query."""
    engine, experts = bench.engine, bench.engine.router.centroids.experts
    if len(experts) < 2:
        raise NotPossibleError("entropies choose among several experts, and the bank has one", "leave out entropy")
    tune = torch.stack([entropies(bench.engine, query_tokens(trial, bench.cut)) for trial in bench.tune])
    config = engine.config
    beta = find_beta(-tune, config.active, config.tau, config.max_experts).beta
    mixes, seconds = [], []
    for place, trial in enumerate(bench.trials):
        started = time.perf_counter()
        weights = (
            sparse_softmax(-entropies(bench.engine, query_tokens(trial, bench.cut))[None], beta, config.tau)[0]
            .float()
            .tolist()
        )
        chosen = sorted((name, weight) for name, weight in zip(experts, weights, strict=True) if weight > 0)
        names, kept = zip(*chosen, strict=True)
        mixes.append(replace(base_mix(engine.bank), experts=names, weights=kept))
        seconds.append(time.perf_counter() - started)
        bench.watch("entropies", place + 1, len(bench.trials))
    return replace(score_mixes(bench, mixes, seconds, "entropy"), detail={"beta": beta})
