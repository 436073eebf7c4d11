"""Plots of an evaluation: gain against added time, gains with intervals, gains document by document."""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.evaluate.drawing import COLOURS, FAINT, INK, Plot, label_points, percent_axis, seconds_axis
from localmoe.evaluate.results import ComparisonRow, MethodResult, Results
from localmoe.evaluate.statistics import outcome
from localmoe.evaluate.tables import headline, main_baseline, nll_on
from localmoe.evaluate.windows import Window, window
from localmoe.quantities import interval_text, percent

_TONES = {"better": COLOURS[2], "worse": COLOURS[6], "no difference shown": FAINT}
_FREE = ("base", "trunk", "fine-tuned", "fine-tuned-full")
"""Methods that are one model for all prompts, and so add no time."""


def plots(results: Results) -> list[Plot]:
    """The plots for which an evaluation has the data."""
    rows = [row for row in results.comparisons if row.baseline == main_baseline(results)]
    found = []
    if rows:
        shown = window(rows)
        found += [_gain_against_time(results, rows, shown), _forest(results, rows, shown)]
    row = headline(results)
    if row is not None:
        method, baseline = results.method(row.method), results.method(row.baseline)
        if method is not None and baseline is not None:
            found.append(_by_document(results, method, baseline))
    return found


def _gain_against_time(results: Results, rows: list[ComparisonRow], shown: Window) -> Plot:
    baseline = rows[0].baseline
    slow = [(row, method) for row in rows if (method := results.method(row.method)) and "added" in method.seconds]
    free = [row for row in rows if row.method in _FREE]
    untimed = {row.method for row in rows} - {method.name for _, method in slow} - set(_FREE)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.set_xscale("log")
        times = [method.seconds["added"].p50 for _, method in slow]
        left, right = min(times, default=1e-3), max(times, default=1.0)
        axes.set_xlim(left / 8, right * 12)
        axes.set_ylim(shown.low, shown.high)
        lines = [(0.0, baseline), *((row.gain, row.method) for row in free if shown.edge(row) is None)]
        axes.axhline(0, color=INK, linewidth=0.9)
        for gain, _ in lines[1:]:
            axes.axhline(gain, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        for seconds, (row, _) in zip(times, slow, strict=True):
            _draw_point(axes, seconds, row, shown, row.documents == len(results.documents))
        points = [(seconds, *_named(row, shown)) for seconds, (row, _) in zip(times, slow, strict=True)]
        bars = [(x, *row.interval) for x, (row, _) in zip(times, slow, strict=True) if shown.edge(row) is None]
        label_points(axes, points, bars, [gain for gain, _ in lines])
        _label_lines(axes, right * 11, [*lines, *(_named(row, shown) for row in free if shown.edge(row) is not None)])
        seconds_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        axes.set(xlabel="added time per prompt, median", ylabel=f"gain in perplexity over {baseline}")

    caption = (
        "What each method gains for the time that it adds to a prompt (logarithmic). Dashed lines add no time. Bars: "
        "95 % intervals. Orange: the shipped default. Hollow: scored on some of the documents only."
    )
    caption += shown.caption({row.method for row in rows} - untimed)
    if untimed:
        caption += f" Not timed, and so not here: {', '.join(sorted(untimed))}."
    return Plot("gain-against-time", "Gain against added time", caption, draw)


def _draw_point(axes: Any, seconds: float, row: ComparisonRow, shown: Window, everywhere: bool) -> None:
    """A method that takes time: its gain with a bar, or an arrow at the edge."""
    colour, edge = COLOURS[1] if row.default else COLOURS[0], shown.edge(row)
    face = colour if everywhere else "none"
    if edge is not None:
        axes.plot(seconds, edge, marker="v" if row in shown.below else "^", color=colour, mfc=face, clip_on=False)
        return
    low, high = row.interval
    bar = [[row.gain - low], [high - row.gain]]
    look = {"color": colour, "markerfacecolor": face, "elinewidth": 1.1, "capsize": 2.5}
    axes.errorbar(seconds, row.gain, bar, fmt="o", zorder=4 if row.default else 3, **look)


def _named(row: ComparisonRow, shown: Window) -> tuple[float, str]:
    """Where a method stands, and its name; with arrow and value if that is the edge of the picture."""
    edge = shown.edge(row)
    if edge is None:
        return row.gain, row.method
    return edge, f"{'↓' if row in shown.below else '↑'} {row.method} {percent(row.gain, signed=True)}"


def _label_lines(axes: Any, x: float, lines: list[tuple[float, str]]) -> None:
    """Names at the right end of horizontal lines, above them; those of lines close together share one place."""
    low, high = axes.get_ylim()
    step = (high - low) / 22
    lines = [(min(y, high - step), name) for y, name in lines]
    groups: list[list[tuple[float, str]]] = []
    for y, name in sorted(lines, reverse=True):
        if groups and groups[-1][0][0] - y < step:
            groups[-1].append((y, name))
        else:
            groups.append([(y, name)])
    for group in groups:
        names = ", ".join(name for _, name in group)
        place = (x, group[0][0])
        axes.annotate(names, place, (0, 1), textcoords="offset points", ha="right", va="bottom", fontsize=8.5)


def _forest(results: Results, rows: list[ComparisonRow], shown: Window) -> Plot:
    ordered = sorted(rows, key=lambda row: row.gain)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.set_xlim(shown.low, shown.high)
        axes.axvline(0, color=INK, linewidth=0.9)
        for place, row in enumerate(ordered):
            _draw_interval(axes, place, row, shown)
        axes.set_yticks(range(len(ordered)), [_forest_label(results, row) for row in ordered])
        for label, row in zip(axes.get_yticklabels(), ordered, strict=True):
            label.set_fontweight("bold" if row.default else "normal")
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.grid(axis="y", visible=False)
        percent_axis(axes.xaxis)
        axes.set_xlabel(f"gain in perplexity over {ordered[0].baseline}")

    caption = (
        f"Gain of every method over {ordered[0].baseline} with its 95 % interval: green where all of it is above zero, "
        "red where all of it is below, grey where no difference is shown. Diamond: the shipped default."
    )
    caption += shown.caption({row.method for row in rows})
    return Plot("gains", "Gains with their intervals", caption, draw, (7.0, 1.1 + 0.3 * len(ordered)))


def _draw_interval(axes: Any, place: int, row: ComparisonRow, shown: Window) -> None:
    """A gain with its interval, or an arrow at the edge with both in words."""
    low, high = row.interval
    colour, edge = _TONES[outcome(low, high)], shown.edge(row)
    if edge is None:
        bar = [[row.gain - low], [high - row.gain]]
        axes.errorbar(row.gain, place, xerr=bar, fmt="D" if row.default else "o", color=colour, elinewidth=2, capsize=3)
        return
    left = row in shown.below
    axes.plot(edge, place, marker="<" if left else ">", color=colour, markersize=7, clip_on=False)
    axes.annotate(
        interval_text(row.gain, low, high),
        (edge, place),
        (8 if left else -8, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        fontsize=8.5,
        color=colour,
    )


def _forest_label(results: Results, row: ComparisonRow) -> str:
    return row.method if row.documents == len(results.documents) else f"{row.method} ({row.documents} documents)"


def _by_document(results: Results, method: MethodResult, baseline: MethodResult) -> Plot:
    places = sorted(set(method.documents) & set(baseline.documents))
    ours, theirs = (np.array(nll_on(results, name.name, places)) for name in (method, baseline))
    tokens = np.array([results.tokens[place] for place in places])
    gains = (theirs - ours) / tokens
    against = [("suffix tokens", tokens.astype(float), True)]
    similarity = method.detail.get("similarity")
    if isinstance(similarity, list | tuple) and len(similarity) == len(method.documents):
        known = dict(zip(method.documents, similarity, strict=True))
        values = np.array([known[place] for place in places], dtype=float)
        against.insert(0, ("nearest centroid's similarity", values, False))
    against = [panel for panel in against if np.ptp(panel[1]) > 0]
    better = float((gains > 0).mean())

    def draw(canvas: Any) -> None:
        panels = canvas.subplots(1, len(against) + 1, sharey=True, squeeze=False)[0]
        panels[0].hist(gains, bins=30, orientation="horizontal", color=COLOURS[0], alpha=0.75)
        panels[0].set(xlabel="documents", ylabel="nats a token gained")
        panels[0].xaxis.get_major_locator().set_params(integer=True)
        for axes, (name, values, log) in zip(panels[1:], against, strict=True):
            axes.scatter(values, gains, s=12, color=COLOURS[0], alpha=0.55, linewidths=0)
            axes.set_xlabel(name)
            if log:
                axes.set_xscale("log")
        for axes in panels:
            axes.axhline(0, color=INK, linewidth=0.9)

    caption = (
        f"Every document: what {method.name} gains over {baseline.name}, in nats a token. {better:.0%} of "
        f"{len(places):,} documents gain."
    )
    return Plot("by-document", "Document by document", caption, draw, (7.0, 3.4))
