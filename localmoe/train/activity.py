"""Activity: how many experts a mix should have, by the loss of public tune documents under mixes of several sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from localmoe.bank.manifest import ExpertRecord
from localmoe.bank.peft import read_adapter
from localmoe.lora import Adapter, mixed
from localmoe.packing import Passage
from localmoe.routing import WITHOUT_BETA, Centroids, Mix, route
from localmoe.train.checks import ENOUGH, Nll, choose_beta, document_nll, mean_nll
from localmoe.train.experts import workplace
from localmoe.train.groundwork import Groundwork
from localmoe.train.progress import Event, Watch
from localmoe.train.prompts import suffix
from localmoe.train.rates import JUDGES


def search_active(
    ground: Groundwork,
    rows: Sequence[int],
    queries: np.ndarray,
    centroids: Centroids,
    experts: Sequence[ExpertRecord],
    watch: Watch,
) -> float:
    """The wanted mean number of active experts: `route.active`, or the best of `search.active` if there are any.

    rows, ascending, and queries [n, d]: public tune documents, and their embedded prefixes. What follows the prefix in
    the first passage of a document is judged under the mix of its prefix; the smallest number is taken that is not
    worse than the best by more than one standard error of their paired difference.
    """
    config, asked = ground.config.route, ground.config.search.active
    if not asked:
        return config.active
    if config.router == "nearest" or (config.beta is not None and config.router not in WITHOUT_BETA):
        watch(Event("route", 1, 1, "no number of active experts was tried: β and the router say how many are"))
        return config.active
    chosen = sorted(sorted(range(len(rows)), key=lambda place: ground.rows.ids[rows[place]])[:JUDGES])
    passages = ground.work.passages([rows[place] for place in chosen])  # in the order of their rows, whatever is asked
    judges = {place: suffix(parts[0]) for place, parts in zip(chosen, passages, strict=True) if parts}
    judges = {place: passage for place, passage in judges.items() if passage.predicted > 0}
    if len(judges) < ENOUGH or not centroids.experts:
        watch(Event("route", 1, 1, f"{config.active:g} active experts, others not tried: too few tune documents"))
        return config.active
    places = sorted(judges)
    found: dict[float, list[Nll]] = {}
    for number, active in enumerate(sorted(set(asked))):
        wanted = replace(config, active=active)
        record, _ = choose_beta(queries, centroids, wanted)
        mixes = route(torch.from_numpy(queries[places]), centroids, replace(wanted, beta=record.beta))
        found[active] = _losses(ground, [judges[place] for place in places], mixes, experts)
        watch(Event("route", number, len(set(asked)), ""))
    if not any(math.isfinite(mean_nll(losses)) for losses in found.values()):
        watch(Event("route", 1, 1, f"{config.active:g} active experts: no number tried has a finite loss"))
        return config.active
    best = fewest_of_the_best(found)
    told = ", ".join(f"{active:g} ({mean_nll(losses):.4f})" for active, losses in found.items())
    watch(Event("route", 1, 1, f"{best:g} active experts, by nats a token on {len(places)} tune documents: {told}"))
    return best


def fewest_of_the_best(found: Mapping[float, Sequence[Nll]]) -> float:
    """The smallest number whose loss is not above the least by more than one standard error of the paired difference.

    With d_i the difference of document i in nats, t_i its tokens and m = Σ d_i / Σ t_i, the standard error of m is
    √(Σ (d_i − m t_i)²) / Σ t_i. Losses that are not finite are passed over; raises ValueError if none is finite.
    """
    found = {active: losses for active, losses in found.items() if math.isfinite(mean_nll(losses))}
    best = min(found, key=lambda active: mean_nll(found[active]))
    tokens = np.array([nll.tokens for nll in found[best]], dtype=np.float64)
    least = np.array([nll.total for nll in found[best]])
    for active in sorted(found):
        difference = np.array([nll.total for nll in found[active]]) - least
        mean = difference.sum() / tokens.sum()
        error = math.sqrt(float(((difference - mean * tokens) ** 2).sum())) / tokens.sum()
        if mean <= error:
            return active
    return best


def _losses(
    ground: Groundwork, passages: Sequence[Passage], mixes: Sequence[Mix], experts: Sequence[ExpertRecord]
) -> list[Nll]:
    """The loss of every passage under its own mix."""
    model, _ = workplace(ground.config.base, ground.config.revision)
    folders = {expert.id: expert.adapter.folder for expert in experts if expert.adapter is not None}

    @cache
    def adapter(name: str) -> Adapter:
        return read_adapter(ground.path / folders[name])[0]

    found = []
    for passage, mix in zip(passages, mixes, strict=True):
        parts = [(adapter(name), weight) for name, weight in zip(mix.experts, mix.weights, strict=True)]
        found.append(document_nll(model, {0: (passage,)}, mixed(parts) if parts else None)[0])
    return found
