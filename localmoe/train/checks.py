"""Checks on tune documents: whether an adapter is better than what it starts from, and which β to route with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from localmoe.bank.manifest import Outcome, RouterRecord
from localmoe.config import RouteConfig
from localmoe.lora import Adapter, attached
from localmoe.models import packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import Centroids, beta_scores, find_beta, route

ENOUGH = 3
"""An adapter that fewer tune documents are near to is `unchecked`."""
AT_MOST = 16
"""Tune documents that one adapter is checked on; the nearest."""
UNTUNED_BETA = 0.05
"""β where no tune document could tell; measured as flat around its optimum (docs/lab-notes.md)."""

_BATCH = 8


@dataclass(frozen=True)
class Nll:
    """Summed negative log-likelihood (nats) and number of predicted tokens of one document."""

    total: float
    tokens: int


def document_nll(model: Any, documents: Mapping[int, Sequence[Passage]], adapter: Adapter | None) -> dict[int, Nll]:
    """Loss of every document (row → passages) under the base, or with an adapter beside it."""
    sums = {row: Nll(0.0, 0) for row in documents}
    work = [(row, passage) for row, passages in documents.items() for passage in passages]
    with attached(model, adapter) if adapter is not None else nullcontext(), packed(model):
        for start in range(0, len(work), _BATCH):
            part = work[start : start + _BATCH]
            for (row, _), nll in zip(part, token_nll(model, [passage for _, passage in part]), strict=True):
                before = sums[row]
                sums[row] = Nll(before.total + float(nll.double().sum()), before.tokens + len(nll))
    return sums


def outcome(own: Mapping[int, Nll], reference: Mapping[int, Nll]) -> Outcome:
    """good if the mean loss per token over the same documents is below the reference's, else harmful."""
    if len(own) < ENOUGH:
        return Outcome("unchecked", len(own), None, None, f"only {len(own)} tune documents are near to it")
    nll, other = mean_nll(own.values()), mean_nll([reference[row] for row in own])
    if not math.isfinite(nll):
        return Outcome("harmful", len(own), None, None, f"its loss on tune documents is {nll}")
    return Outcome("good" if nll < other else "harmful", len(own), nll, other, None)


def outcome_beyond_doubt(own: Mapping[int, Nll], reference: Mapping[int, Nll]) -> Outcome:
    """`outcome`, but harmful only where the loss is worse by more than the standard error of the paired difference.

    For experts that are trained to be merged: the mixes of all others lose what they were trained with if one is left
    out. One that is worse, but not by that much, is `unchecked`.
    """
    found = outcome(own, reference)
    if found.status != "harmful" or found.nll is None or found.reference_nll is None:
        return found
    worse = np.array([own[row].total - reference[row].total for row in own])
    tokens = np.array([own[row].tokens for row in own])
    rest = worse - worse.sum() / tokens.sum() * tokens  # of the ratio Σ worse / Σ tokens, by linearisation
    error = math.sqrt(float((rest**2).sum()) * len(own) / (len(own) - 1)) / float(tokens.sum())
    change = found.nll - found.reference_nll
    if change > error:
        return found
    reason = f"{change:+.4f} ± {error:.4f} nats a token against the trunk on {len(own)} tune documents tell nothing"
    return Outcome("unchecked", len(own), None, None, reason)


def nearest_rows(assignment: np.ndarray, similarity: np.ndarray, count: int, most: int = AT_MOST) -> list[list[int]]:
    """For each of `count` centroids the places of the points nearest to it alone, the most similar first.

    assignment [n]: the nearest centroid of every point; similarity [n]: how near it is.
    """
    order = np.argsort(-similarity, kind="stable")
    found: list[list[int]] = [[] for _ in range(count)]
    for place in order.tolist():
        if len(found[assignment[place]]) < most:
            found[assignment[place]].append(place)
    return found


def choose_beta(queries: np.ndarray, centroids: Centroids, config: RouteConfig) -> tuple[RouterRecord, str]:
    """The router's settings for a bank, and a sentence if β could not be found as asked.

    queries: [n, d] embedded prefixes of public tune documents; `active` is the mean number of experts in their mixes.
    Of K experts at most (K + 1) / 2 are wanted: with almost all of them active the weights are almost uniform, the
    worst weighting there is (paper, Figure 5).
    """
    count = len(centroids.experts)
    wanted = min(config.active, max(1.0, (count + 1) / 2))

    def record(beta: float, active: float) -> RouterRecord:
        return RouterRecord(config.router, beta, config.tau, config.max_experts, active, wanted, config.sift_lambda)

    if not centroids.experts:
        return record(0.0 if config.beta is None else config.beta, 0.0), "no expert may be routed to"
    if len(queries) < ENOUGH:
        beta = UNTUNED_BETA if config.beta is None else config.beta
        return record(beta, 0.0), f"β = {beta} was not tuned: there are only {len(queries)} public tune documents"
    prompts = torch.from_numpy(np.array(queries))  # a memory map may not be written to, of which torch would warn
    if config.beta is not None:
        beta = config.beta
    else:
        beta = find_beta(beta_scores(prompts, centroids, config.router), wanted, config.tau, config.max_experts).beta
    mixes = route(prompts, centroids, replace(config, beta=beta))
    note = ""
    if config.beta is None and wanted < config.active:
        note = f"{wanted:g} active experts are wanted instead of {config.active:g}: there are only {count}"
    return record(beta, sum(len(mix.experts) for mix in mixes) / len(mixes)), note


def mean_nll(parts: Iterable[Nll]) -> float:
    """Nats a token over all the documents."""
    parts = list(parts)
    return sum(part.total for part in parts) / max(1, sum(part.tokens for part in parts))
