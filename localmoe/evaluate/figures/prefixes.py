"""Figures of prefixes: how many tokens the query needs, and what a longer prefix does (figure 10, table 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localmoe.evaluate.drawing import COLOURS, Series, draw_series
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import Material
from localmoe.runtime.engine import base_mix


@figures.register("10")
def query_prefix(material: Material) -> Figure:
    """Gain over the base against the tokens of the query, for several prefixes without loss."""
    prefixes, queries = sorted(material.config.prefixes), sorted(material.config.query_prefixes)
    held = material.source.held_out(prefixes[-1])
    base_mixes = [base_mix(held.engine.bank)] * len(held)
    rows: list[Row] = []
    for prefix in prefixes:
        base = held.nll(base_mixes, "figure 10: base", prefix)
        for query in queries:
            if query <= prefix:
                nll = held.nll(held.mixes(query=query), f"figure 10: query of {query} tokens", prefix)
                row: Row = {"prefix": prefix, "query": query}
                rows.append(row | held.measured(nll, base, prefix))

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = []
        for place, prefix in enumerate(prefixes):
            own = [row for row in rows if row["prefix"] == prefix]
            columns = {key: [row[key] * 100 for row in own] for key in ("gain", "low", "high")}
            x = [row["query"] for row in own]
            name = f"loss after {prefix} tokens"
            series.append(Series(name, x, columns["gain"], columns["low"], columns["high"], COLOURS[place]))
        draw_series(axes, series, "log", queries)
        axes.set(xlabel="tokens of the query", ylabel="gain over the base, %")

    caption = (
        f"The bank's own routing on {len(held)} documents of more than {prefixes[-1]} tokens. Bars: 95 % intervals. "
        "A query longer than the prefix would read what it is scored on, and is left out."
    )
    return Figure("Query prefix against evaluation prefix", caption, tuple(rows), held.settings(), draw)


@figures.register("prefix-length")
def prefix_length(material: Material) -> Figure:
    """One active expert and the shipped default against the base, for prefixes of several lengths."""
    prefixes = sorted(material.config.prefixes)
    held = material.source.held_out(prefixes[-1])
    nearest = replace(held.engine.config, router="nearest")
    rows: list[Row] = []
    for prefix in prefixes:
        base = held.nll([base_mix(held.engine.bank)] * len(held), "prefix length: base", prefix)
        row: Row = {"prefix": prefix, "base": held.measured(base, prefix=prefix)["perplexity"]}
        for name, config in (("nearest", nearest), ("merged", held.engine.config)):
            nll = held.nll(held.mixes(config, prefix), f"prefix length: {name}, {prefix} tokens", prefix)
            found = held.measured(nll, base, prefix)
            row |= {name: found["perplexity"]}
            row |= {f"{name}_{key}": found[key] for key in ("gain", "low", "high")}
        rows.append(row)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = [
            Series(
                name,
                prefixes,
                [row[f"{name}_gain"] * 100 for row in rows],
                [row[f"{name}_low"] * 100 for row in rows],
                [row[f"{name}_high"] * 100 for row in rows],
                COLOURS[place],
            )
            for place, name in enumerate(("nearest", "merged"))
        ]
        draw_series(axes, series, "linear", prefixes)
        axes.set(xlabel="prefix, tokens", ylabel="gain over the base, %")

    caption = (
        f"The prefix chooses the experts; loss is counted after it. The same {len(held)} documents throughout, all "
        f"of more than {prefixes[-1]} tokens. Bars: 95 % intervals."
    )
    return Figure("Prefix length", caption, tuple(rows), held.settings(), draw)


@figures.register("table-5")
def prefixes_used(material: Material) -> Figure:
    """The prefix of every evaluation."""
    rows = tuple(
        {
            "results": name,
            "prefix": results.corpus["prefix_tokens"],
            "query": results.corpus["query_tokens"],
            "documents": len(results.documents),
        }
        for name, results in material.some_results()
    )
    return Figure("Prefix lengths", "Tokens that carry no loss, and those of them that choose the experts.", rows)
