"""Figures of weights: number of experts, β, τ, SIFT, entropies, members (figures 4 right, 5, 8, 9, table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from localmoe.config import RouteConfig
from localmoe.evaluate.drawing import COLOURS, Series, draw_series, ones_twos_fives, reference, ticks
from localmoe.evaluate.entropies import entropies
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import HeldOut, Material
from localmoe.routing import Mix, similarities, sparse_softmax
from localmoe.runtime.engine import base_mix

_BARS = "Bars: 95 % interval of the difference to the bank's own mixes."


@figures.register("4-right")
def active_experts(material: Material) -> Figure:
    """Mean number of active experts against β, for every τ."""
    held = material.held_out()
    scores = similarities(held.queries(), held.engine.router.centroids)
    rows = tuple(
        {"tau": tau, "beta": beta, "active": _mean_active(scores, beta, tau)}
        for tau in material.config.taus
        for beta in material.config.betas
    )

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = [
            Series(f"τ = {tau:g}", *_points(rows, "beta", "active", tau=tau), colour=COLOURS[place])
            for place, tau in enumerate(material.config.taus)
        ]
        draw_series(axes, series, "symlog", material.config.betas)
        axes.set(xlabel="temperature β", ylabel="active experts, mean", ylim=(0, None))

    caption = f"Mean number of active experts on {len(held)} held-out prompts, of {scores.shape[1]} experts."
    return Figure("Active experts against β and τ", caption, rows, held.settings(), draw)


@figures.register("5")
def number_of_experts(material: Material) -> Figure:
    """Perplexity against the number of active experts: sparse softmax and uniform, merged and ensembled."""
    held = material.held_out()
    count = len(held.engine.router.centroids.experts)
    wanted = [active for active in material.config.active if active <= count]
    shipped = held.nll(held.mixes(), "figure 5: as shipped")
    rows: list[Row] = []
    for active in wanted:
        configs = {
            "sparse softmax": held.with_active(active),
            "uniform": replace(held.engine.config, router="uniform", active=float(active)),
        }
        for weights, config in configs.items():
            mixes = held.mixes(config)
            title = f"figure 5: {weights}, {active} experts"
            losses = {"merged": held.nll(mixes, title), "ensembled": held.ensemble_nll(mixes, title)}
            found = {"weights": weights, "active": active, "beta": config.beta if weights != "uniform" else None}
            found |= {"active_mean": sum(len(mix.experts) for mix in mixes) / len(mixes)}
            rows += [found | {"models": how} | held.measured(nll, shipped) for how, nll in losses.items()]
    base = held.nll([base_mix(held.engine.bank)] * len(held), "figure 5: base")
    rows.append({"weights": "none", "models": "base"} | held.measured(base, shipped))

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = [
            _measured_series(
                f"{weights}, {models}", rows, "active", colour=COLOURS[place], line=line, weights=weights, models=models
            )
            for place, models in enumerate(("merged", "ensembled"))
            for weights, line in (("sparse softmax", "-"), ("uniform", ":"))
        ]
        draw_series(axes, series, "log", wanted)
        axes.set(xlabel="active experts N, mean at most", ylabel="perplexity")

    alone = held.measured(base)["perplexity"]
    caption = f"β is found on the tune documents for every N. {_BARS} The base model: {alone:.3f}."
    return Figure("Weights of merged and ensembled experts", caption, tuple(rows), held.settings(), draw)


@figures.register("beta")
def temperatures(material: Material) -> Figure:
    """Perplexity against β from the nearest expert alone to all alike, for every τ."""
    held = material.held_out()
    shipped = held.nll(held.mixes(), "β: as shipped")
    rows: list[Row] = []
    for tau in material.config.taus:
        for beta in material.config.betas:
            config = replace(held.engine.config, router="sparse_softmax", beta=beta, tau=tau)
            rows.append(_routed(held, config, shipped, f"τ = {tau:g}, β = {beta:g}", {"tau": tau, "beta": beta}))

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = [
            _measured_series(f"τ = {tau:g}", rows, "beta", colour=COLOURS[place], tau=tau)
            for place, tau in enumerate(material.config.taus)
        ]
        draw_series(axes, series, "symlog", material.config.betas)
        axes.set(xlabel="temperature β (0: the nearest expert alone)", ylabel="perplexity, merged")

    caption = f"The bank's own β is {held.engine.config.beta:.3g} with τ = {held.engine.config.tau:g}. {_BARS}"
    return Figure("Perplexity against β and τ", caption, tuple(rows), held.settings(), draw)


@figures.register("8")
def sift(material: Material) -> Figure:
    """SIFT's weights against λ, beside the sparse softmax of as many experts."""
    held = material.held_out()
    count = len(held.engine.router.centroids.experts)
    wanted = [active for active in material.config.active if 1 < active <= count]
    shipped = held.nll(held.mixes(), "figure 8: as shipped")
    rows: list[Row] = []
    for active in wanted:
        for noise in material.config.lambdas:
            config = replace(held.engine.config, router="sift", active=float(active), sift_lambda=noise)
            found: Row = {"weights": "sift", "active": active, "lambda": noise}
            rows.append(_routed(held, config, shipped, f"figure 8: λ = {noise:g}, {active} experts", found))
        title = f"figure 8: sparse softmax, {active} experts"
        rows.append(
            _routed(held, held.with_active(active), shipped, title, {"weights": "sparse softmax", "active": active})
        )

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for place, active in enumerate(wanted):
            softmax = _chosen(rows, weights="sparse softmax", active=active)[0]
            reference(axes, softmax["perplexity"], f"sparse softmax, N = {active}", COLOURS[place])
        series = [
            _measured_series(
                f"SIFT, N = {active}", rows, "lambda", colour=COLOURS[place], weights="sift", active=active
            )
            for place, active in enumerate(wanted)
        ]
        draw_series(axes, series, "log", material.config.lambdas)
        axes.set(xlabel="SIFT's λ", ylabel="perplexity, merged")

    caption = f"SIFT weighs the N nearest experts by what each takes off the variance at the prompt. {_BARS}"
    return Figure("SIFT against λ", caption, tuple(rows), held.settings(), draw)


@figures.register("9")
def entropy(material: Material) -> Figure:
    """Ensembles weighted by the inner product, and by the entropy of the experts' predictions (DaWin)."""
    held = material.held_out()
    experts = held.engine.router.centroids.experts
    found = []
    for place, trial in enumerate(held.trials):
        found.append(entropies(held.engine, trial.passage.tokens[: held.prefix]))
        held.source.watch("figure 9: entropies", place + 1, len(held))
    scores = {
        "inner product": similarities(held.queries(), held.engine.router.centroids),
        "entropy": -torch.stack(found),
    }
    shipped = held.ensemble_nll(held.mixes(), "figure 9: as shipped")
    rows: list[Row] = []
    for weights, values in scores.items():
        for tau in material.config.taus:
            for beta in material.config.betas:
                mixes = _mixes(held, experts, sparse_softmax(values, beta, tau))
                nll = held.ensemble_nll(mixes, f"figure 9: {weights}, β = {beta:g}")
                row: Row = {"weights": weights, "tau": tau, "beta": beta, "active_mean": _mean_count(mixes)}
                rows.append(row | held.measured(nll, shipped))

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        shades = [
            1.0 - 0.65 * place / max(1, len(material.config.taus) - 1) for place in range(len(material.config.taus))
        ]
        for colour, weights in zip(COLOURS, scores, strict=False):
            for shade, tau in zip(shades, sorted(material.config.taus, reverse=True), strict=True):
                chosen = sorted(_chosen(rows, weights=weights, tau=tau), key=lambda row: row["active_mean"])
                name = f"{weights}, τ = {tau:g}"
                points = [row["active_mean"] for row in chosen], [row["perplexity"] for row in chosen]
                axes.plot(*points, "o-", color=colour, alpha=shade, label=name)
        axes.set(xlabel="active experts, mean", ylabel="perplexity, ensembled", xscale="log")
        ticks(axes.xaxis, ones_twos_fives(1, len(experts)))
        axes.legend()

    caption = (
        "Every point is one β. The entropy is the mean of an expert's predictions on the prefix; it costs one forward "
        "for every expert of the bank."
    )
    return Figure("Inner product against entropy", caption, tuple(rows), held.settings(), draw)


@figures.register("table-2")
def members(material: Material) -> Figure:
    """One expert, chosen by its centroid or by the mean squared distance to its documents."""
    held = material.held_out()
    rows: list[Row] = []
    by_centroid: list[float] | None = None
    for router, criterion in (
        ("nearest", "‖φ* − φ_k‖², its centroid"),
        ("members", "mean ‖φ* − φ(x)‖², its documents"),
    ):
        mixes = held.mixes(replace(held.engine.config, router=router, beta=0.0))
        nll = held.nll(mixes, f"table 2: {router}")
        rows.append({"experts are chosen by": criterion} | held.measured(nll, by_centroid))
        by_centroid = nll
    caption = "Perplexity with one active expert. The gain is over the choice by centroid."
    return Figure("Centroid against members", caption, tuple(rows), held.settings())


def _routed(held: HeldOut, config: RouteConfig, shipped: Sequence[float], title: str, row: Row) -> Row:
    mixes = held.mixes(config)
    return row | {"active_mean": _mean_count(mixes)} | held.measured(held.nll(mixes, title), shipped)


def _mixes(held: HeldOut, experts: Sequence[str], weights: torch.Tensor) -> list[Mix]:
    """Mixes of weights [n, K]."""
    mixes = []
    for row in weights.float().tolist():
        chosen = sorted((name, weight) for name, weight in zip(experts, row, strict=True) if weight > 0)
        names, kept = zip(*chosen, strict=True)
        mixes.append(replace(base_mix(held.engine.bank), experts=names, weights=kept))
    return mixes


def _mean_count(mixes: Sequence[Mix]) -> float:
    return sum(len(mix.experts) for mix in mixes) / len(mixes)


def _mean_active(scores: torch.Tensor, beta: float, tau: float) -> float:
    return float((sparse_softmax(scores, beta, tau) > 0).sum(dim=1).double().mean())


def _chosen(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def _points(rows: Sequence[Row], x: str, y: str, **values: Any) -> tuple[list[float], list[float]]:
    chosen = _chosen(rows, **values)
    return [row[x] for row in chosen], [row[y] for row in chosen]


def _measured_series(name: str, rows: Sequence[Row], x: str, colour: str, line: str = "-", **values: Any) -> Series:
    """Perplexities with the interval of their difference to the reference: ppl(reference) · (1 − high, 1 − low)."""
    chosen = _chosen(rows, **values)
    reference = [row["perplexity"] / (1 - row["gain"]) for row in chosen]
    return Series(
        name,
        [row[x] for row in chosen],
        [row["perplexity"] for row in chosen],
        [ppl * (1 - row["high"]) for ppl, row in zip(reference, chosen, strict=True)],
        [ppl * (1 - row["low"]) for ppl, row in zip(reference, chosen, strict=True)],
        colour,
        line,
    )
