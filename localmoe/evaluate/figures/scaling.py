"""Figures of scale: quality against the time of an answer and against the number of experts (figure 1, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localmoe.errors import UsageError
from localmoe.evaluate.drawing import (
    COLOURS,
    FAINT,
    Series,
    draw_series,
    label_points,
    ones_twos_fives,
    reference,
    ticks,
)
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import Material
from localmoe.evaluate.results import MethodResult, Results
from localmoe.evaluate.statistics import perplexity
from localmoe.evaluate.tables import nll_on
from localmoe.runtime.engine import base_mix

_TTT = ("ttt-trunk", "ttt")
_MERGED = ("merged-1", "merged-3", "merged-10")
_SHIPPED = "as shipped"
_GAIN = ("gain", "low", "high")


@figures.register("1-left")
def gain_against_time(material: Material) -> Figure:
    """Share of the way from the base to test-time training, against the time of an answer; from results."""
    new_tokens = material.config.new_tokens
    rows: list[Row] = []
    left_out = []
    for name, results in material.some_results():
        found = _normalised(name, results, new_tokens)
        rows += found
        left_out += [] if found else [name]
    if not rows:
        raise UsageError(
            f"{' and '.join(left_out)}: this figure needs the times and losses of base, and of ttt-trunk or ttt",
            "add them: localmoe eval BANK --methods base,fine-tuned,merged-1,merged-3,merged-10,ttt-trunk",
        )
    means = _means(rows)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        drawn = []
        for place, family in enumerate(("base", "trunk", "fine-tuned", "merged", "ensemble", "ttt")):
            points = [row for row in means if row["method"].startswith(family) and row["method"] != "fine-tuned-full"]
            drawn += points
            points.sort(key=lambda row: row["seconds"])
            if not points:
                continue
            x, y = [row["seconds"] for row in points], [row["share"] for row in points]
            axes.plot(x, y, "o-", color=COLOURS[place], label=family)
        axes.set_xscale("log")
        axes.margins(0.15)
        ticks(axes.xaxis, ones_twos_fives(*axes.get_xlim()))
        label_points(axes, [(row["seconds"], row["share"], row["method"]) for row in drawn])
        axes.set(xlabel=f"seconds for {new_tokens} tokens", ylabel="(ppl base − ppl) / (ppl base − ppl TTT)")

    drawn_from = list(dict.fromkeys(row["results"] for row in rows))
    goal = " or ".join(sorted({row["ttt"] for row in rows}))
    caption = (
        f"0 is the base, 1 is {goal}, on the documents that both were scored on; mean of the {len(drawn_from)} "
        "evaluations, for methods that all have. Time: routing and merging as measured, then "
        f"{new_tokens} tokens at the measured pace; an ensemble's tokens cost one forward for every active expert."
    )
    if left_out:
        caption += f" Left out, without test-time training: {', '.join(left_out)}."
    settings = {"results": drawn_from, "left_out": left_out, "new_tokens": new_tokens}
    return Figure("Gain against the time of an answer", caption, tuple(rows), settings, draw)


def _normalised(name: str, results: Results, new_tokens: int) -> list[Row]:
    """Rows of one evaluation; none where the base or test-time training was not scored or not timed."""
    base = results.method("base")
    goal = next((method for wanted in _TTT if (method := results.method(wanted)) is not None), None)
    if base is None or goal is None or "per_token" not in base.seconds:
        return []
    places = sorted(set(base.documents) & set(goal.documents))
    tokens = [results.tokens[place] for place in places]
    ends = {one.name: perplexity(nll_on(results, one.name, places) or [], tokens) for one in (base, goal)}
    rows = []
    for method in results.methods:
        nll = nll_on(results, method.name, places)
        if nll is None:
            continue
        value = perplexity(nll, tokens)
        share = (ends["base"] - value) / (ends["base"] - ends[goal.name])
        seconds = _answer_seconds(method, base, new_tokens)
        found: Row = {"results": name, "method": method.name, "perplexity": value, "share": share, "seconds": seconds}
        rows.append(found | {"documents": len(places), "ttt": goal.name})
    return rows


def _answer_seconds(method: MethodResult, base: MethodResult, new_tokens: int) -> float:
    """Median seconds of an answer: what the method adds, and the tokens at its pace or else the base's."""

    def pace(own: MethodResult) -> float:
        return own.seconds["first_token"].p50 + (new_tokens - 1) * own.seconds["per_token"].p50

    if method.name.startswith("ensemble"):
        before = sum(method.seconds[stage].p50 for stage in ("embed", "select") if stage in method.seconds)
        return before + (method.active_mean if method.active_mean is not None else 1.0) * pace(base)
    if "per_token" in method.seconds and "first_token" in method.seconds:  # loading and merging are in the first token
        before = sum(method.seconds[stage].p50 for stage in ("embed", "select") if stage in method.seconds)
        return before + pace(method)
    added = method.seconds.get("added")
    return pace(base) + (0.0 if added is None else added.p50)


def _means(rows: Sequence[Row]) -> list[Row]:
    """Share and time averaged over evaluations, of the methods that every one of them has: others' means lie apart."""
    found, evaluations = [], len({row["results"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        if len(own) < evaluations:
            continue
        means = {key: sum(row[key] for row in own) / len(own) for key in ("share", "seconds")}
        found.append({"method": method} | means)
    return found


@figures.register("1-right")
def number_of_clusters(material: Material) -> Figure:
    """Perplexity against the number of experts K, as shipped and for several N; banks hold out the same documents."""
    rows: list[Row] = []
    first: list[float] | None = None
    settings: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    digests = []
    for held in material.every_held_out():
        source = held.source
        names = tuple(trial.document for trial in held.trials)
        digests.append(held.engine.bank.manifest.digest)
        settings = settings or held.settings()
        count = len(held.engine.router.centroids.experts)
        base = held.nll([base_mix(held.engine.bank)] * len(held), f"{source.name}: base")
        shipped = held.nll(held.mixes(), f"{source.name}: {_SHIPPED}")
        first = shipped if first is None else first
        compared = {f"over_first_{key}": value for key, value in held.measured(shipped, first).items() if key in _GAIN}
        row = {"bank": source.name, "method": _SHIPPED, "experts": count, "active": None, "documents": len(held)}
        rows.append(row | held.measured(shipped, base) | compared)
        for active in material.config.active:
            if active <= max(1, count):
                mixes = held.mixes(held.with_active(active))
                nll = held.nll(mixes, f"{source.name}: {active} experts active")
                row = {"bank": source.name, "method": "merged", "experts": count, "active": active}
                rows.append(row | {"documents": len(held)} | held.measured(nll, base))
    others, left_out = _from_results(material, digests, names)
    rows += others
    if len({row["experts"] for row in rows if row["experts"] is not None}) < 2:
        raise UsageError(
            "this figure compares numbers of experts, and there is one", "give more banks: --with BANK, may be repeated"
        )
    settings |= {
        "left_out": left_out,
        "banks": [source.name for source in material.sources],
        "results": [name for name, _ in material.results],
    }

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        actives = sorted({row["active"] for row in rows if row["active"] is not None})
        lines = [(f"{active} active", [row for row in rows if row["active"] == active]) for active in actives]
        lines.append((_SHIPPED, [row for row in rows if row["method"] == _SHIPPED]))
        series = []
        for place, (title, drawn) in enumerate(line for line in lines if line[1]):
            x, y = zip(*sorted((row["experts"], row["perplexity"]) for row in drawn), strict=True)
            series.append(Series(title, x, y, colour=COLOURS[place % len(COLOURS)]))
        for row in rows:
            if row["experts"] is None:
                reference(axes, row["perplexity"], f"{row['method']}, {row['bank']}", FAINT)
        draw_series(axes, series, "log", sorted({row["experts"] for row in rows if row["experts"] is not None}))
        axes.legend()
        axes.set(xlabel="experts K", ylabel="perplexity")

    caption = (
        "Merged models; β is found on each bank's tune documents for every N. Gains in the data are over the base, and "
        "those as shipped over the first bank too."
    )
    if left_out:
        caption += f" Left out: {'; '.join(left_out)}."
    return Figure("Perplexity against the number of experts", caption, tuple(rows), settings, draw)


def _from_results(material: Material, banks: Sequence[str], documents: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Points of evaluations of other banks, the fine-tunes and TTT of all as lines, and what was left out, and why.

    documents: those of the banks that are compared, none if there is no bank.
    """
    rows: list[Row] = []
    left_out = []
    for name, results in material.results:
        documents = documents or results.documents
        if set(results.documents) != set(documents):
            left_out.append(f"{name}: scored on other documents")
            continue
        for method in results.methods:
            row: Row = {"bank": name, "method": method.name, "documents": len(method.documents)}
            row |= {"perplexity": method.perplexity}
            known = method.name in _MERGED and results.corpus.get("bank") in banks
            if method.name not in (*_MERGED, "fine-tuned", *_TTT) or known:
                continue
            if len(method.documents) < len(results.documents):
                left_out.append(f"{name}: {method.name} was scored on {len(method.documents)} documents only")
            elif method.name in _MERGED:
                rows.append(row | {"experts": results.config["routable"], "active": int(method.name.partition("-")[2])})
            else:
                rows.append(row | {"experts": None, "active": None})
    return rows, left_out


@figures.register("table-1")
def perplexities(material: Material) -> Figure:
    """Perplexities of base, fine-tune, merged, ensembled and test-time trained models, a column for each evaluation."""
    names = ["base", "trunk", "fine-tuned", *_MERGED, "ensemble-3", "ensemble-10", "ttt", "ttt-trunk"]
    rows: list[Row] = []
    for name in names:
        row: Row = {"model": name}
        for place, results in material.some_results():
            method = results.method(name)
            if method is not None:
                few = "" if len(method.documents) == len(results.documents) else f" ({len(method.documents)} documents)"
                row |= {place: f"{method.perplexity:.3f}{few}"}
        if len(row) > 1:
            rows.append(row)
    documents = {name: len(results.documents) for name, results in material.results}
    caption = "Perplexity of the suffix, lower is better. A column is one evaluation: its bank, base and corpus."
    return Figure("Perplexities", caption, tuple(rows), {"documents": documents})
