"""Where experts pay: evaluations of recipe `joint`, by how unlike documents are and how full one adapter is.

    python experiments/map.py results/*/results.json -o docs/where-experts-pay.svg

A table goes to standard output. Colour and sign say what merging gains over the fine-tune of equal tokens; grey: no
difference shown; hollow: fewer than three ranks of the fine-tune were tried.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from localmoe.evaluate.results import Results, read_results
from localmoe.quantities import interval_text
from localmoe.train.plan import SCARCE, UNLIKE

TUNED = 3
"""Ranks that a fine-tune was tried at from which its rank counts as tuned."""
CLOSE = 6.0
"""Ratio of two points' tokens a parameter below which their labels would overlap."""
COLOURS = {1: "#1b7f5c", 0: "#8a8f98", -1: "#c0392b"}


class Point(NamedTuple):
    """One evaluation; gain and interval are relative, over `fine-tuned`."""

    name: str
    tokens_per_parameter: float
    explained: float
    gain: float
    low: float
    high: float
    experts: int
    tokens: int
    ranks: int
    """How many the fine-tune was tried at."""

    @property
    def interval(self) -> str:
        """The gain with its interval, in words."""
        return interval_text(self.gain, self.low, self.high)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is clear of zero."""
        return (self.low > 0) - (self.high < 0)


def point(name: str, results: Results) -> Point | None:
    """Where an evaluation lies; None for another recipe, or without a fine-tune."""
    rows = [row for row in results.comparisons if row.default and row.baseline == "fine-tuned"]
    if not rows or results.config["build"]["train"]["recipe"] != "joint":
        return None
    corpus, row = results.corpus, rows[0]
    place = (corpus["tokens_per_parameter"], corpus["explained"])
    tuned = results.method("fine-tuned")
    ranks = {one["rank"] for one in tuned.detail["tried"]} if tuned is not None else set()
    told = (results.config["experts"], corpus["bank_training_tokens"], len(ranks))
    return Point(name, *place, row.gain, *row.interval, *told)


def draw(points: list[Point], target: Path) -> None:
    """The map, as SVG or PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "map"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhspan(0, UNLIKE, color="#f4f4f2", zorder=0)
    axes.axvline(SCARCE, color="#8a8f98", lw=0.8, ls=":")
    axes.axhline(UNLIKE, color="#8a8f98", lw=0.8, ls=":")
    for one in points:
        face = COLOURS[one.sign] if one.ranks >= TUNED else "white"
        where = (one.tokens_per_parameter, one.explained)
        axes.scatter(*where, s=70, facecolor=face, edgecolor=COLOURS[one.sign], linewidth=1.8, zorder=3)
        near = [other for other in points if abs(other.explained - one.explained) < 0.03]
        right = any(1 < other.tokens_per_parameter / one.tokens_per_parameter < CLOSE for other in near)
        left = any(1 < one.tokens_per_parameter / other.tokens_per_parameter < CLOSE for other in near)
        apart, to, height = ((0, 8), "center", "bottom") if left and right else ((-7, 0), "right", "center")
        axes.annotate(
            f"{one.name}\n{one.interval}",
            where,
            xytext=apart if right else (7, 0),
            textcoords="offset points",
            ha=to if right else "left",
            va=height if right else "center",
            fontsize=7.5,
            color=COLOURS[one.sign],
        )
    axes.set(xscale="log", ylim=(0, None), xlabel="train tokens for every parameter of an adapter: how full it gets")
    axes.set(
        ylabel="variance between 16 clusters: how unlike documents are",
        xlim=(min(one.tokens_per_parameter for one in points) / 4, 200),
    )
    axes.spines[["top", "right"]].set_visible(False)
    note = "hollow: the fine-tune was tried at fewer than three ranks"
    axes.text(0.01, 0.02, note, transform=axes.transAxes, fontsize=8)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of `localmoe eval`, or their folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG or PNG")
    arguments = parser.parse_args()
    found = [(path.parent if path.is_file() else path).name for path in arguments.results]
    points = [point(name, read_results(path)) for name, path in zip(found, arguments.results, strict=True)]
    kept = sorted((one for one in points if one is not None), key=lambda one: -one.gain)
    print("| evaluation | experts | tokens | tokens a parameter | unlike | gain over the fine-tune |")
    print("|---|---|---|---|---|---|")
    for one in kept:
        place = f"{one.tokens_per_parameter:.2g} | {one.explained:.2f}"
        print(f"| {one.name} | {one.experts} | {one.tokens:,} | {place} | {one.interval} |")
    draw(kept, arguments.output)


if __name__ == "__main__":
    main()
