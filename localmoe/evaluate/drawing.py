"""Drawing: matplotlib, in one style, to PNG and to SVG that takes the colours of the page around it."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import UsageError

COLOURS = ("#2f7ebc", "#d9731a", "#1f9e77", "#c0519e", "#8d7b14", "#7567c4", "#b5493f", "#5b8f3a")
"""Of lines and points; each can be told from white and from near black."""

INK = "#1f2328"
"""Of text and axes; the page's own colour in SVG."""

FAINT = "#8b949e"
"""Of grids and of what is there for reference."""

MAP = "viridis"

_DPI = 160
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "localmoe",
}

# Shares of the axes: points closer than this are one, a label's width and height.
_POINT, _LABEL, _LINE = 0.02, 0.16, 0.045

Draw = Callable[[Any], None]
"""Fills a matplotlib Figure."""


@dataclass(frozen=True)
class Plot:
    """A picture: what it is called, what it shows, how large it is (inches), and how it is drawn."""

    name: str
    title: str
    caption: str
    draw: Draw
    size: tuple[float, float] = (7.0, 4.2)


def write_png(plot: Plot, path: Path) -> Path:
    """The plot on white. Raises UsageError without matplotlib."""
    with _drawn(plot) as canvas:
        canvas.savefig(path, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return path


def svg(plot: Plot) -> str:
    """The plot as an inline SVG without ground; text and axes in the colour of the page's text."""
    target = io.StringIO()
    with _drawn(plot) as canvas:
        canvas.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    body = target.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(INK, "currentColor", body, flags=re.IGNORECASE)


def require_matplotlib() -> None:
    """Raises UsageError without matplotlib: before an evaluation of hours, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib, which is not installed", "pip install 'localmoe[eval]'")


@contextmanager
def _drawn(plot: Plot) -> Iterator[Any]:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=plot.size, layout="constrained")
        plot.draw(canvas)
        yield canvas


def percent_axis(axis: Any) -> None:
    """Ticks of a share as signed percent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:+.3g} %" if value else "0"))


def seconds_axis(axis: Any) -> None:
    """Decades of a logarithmic axis as "10 ms", "1 s", "100 s"."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:g} ms" if value < 1 else f"{value:g} s"))


@dataclass(frozen=True)
class Series:
    """One line: its points, their intervals if there are any, and how it looks."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = COLOURS[0]
    line: str = "-"
    alpha: float = 1.0


def draw_series(axes: Any, series: Sequence[Series], scale: str = "linear", places: Sequence[float] = ()) -> None:
    """Lines with points, bars where there are intervals, and a legend; `places`: where the x axis has ticks."""
    for one in series:
        bars = None
        if one.low is not None and one.high is not None:
            below = [max(0.0, y - low) for y, low in zip(one.y, one.low, strict=True)]
            bars = [below, [max(0.0, high - y) for y, high in zip(one.y, one.high, strict=True)]]
        axes.errorbar(
            one.x,
            one.y,
            bars,
            label=one.name,
            color=one.colour,
            linestyle=one.line,
            alpha=one.alpha,
            marker="o",
            elinewidth=1,
            capsize=2,
        )
    if scale == "symlog":
        smallest = min(place for place in places if place > 0)
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    else:
        axes.set_xscale(scale)
    if places:
        ticks(axes.xaxis, places)
    if len(series) > 1:
        axes.legend()


def ones_twos_fives(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … from `low` to `high`: ticks of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5) if low <= digit * 10.0**decade <= high]


def ticks(axis: Any, places: Sequence[float]) -> None:
    """Ticks at these places alone, as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def reference(axes: Any, y: float, name: str, colour: str = FAINT) -> None:
    """A dashed horizontal line with its name at the right end."""
    axes.axhline(y, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        name, (0.995, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5, color=colour
    )


def label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points (x logarithmic): right of them, left where another point is in the way; none on another.

    Points that can hardly be told apart share one label.
    """
    (left, right), (low, high) = np.log(axes.get_xlim()), axes.get_ylim()
    places = [((np.log(x) - left) / (right - left), (y - low) / (high - low), name) for x, y, name in points]
    groups: list[list[tuple[float, float, str]]] = []
    for place in sorted(places, key=lambda place: -place[1]):
        same = (g for g in groups if abs(g[0][0] - place[0]) < _POINT and abs(g[0][1] - place[1]) < _POINT)
        group = next(same, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for group in groups:
        x, y, _ = group[0]
        blocked = any(_POINT < other - x < _LABEL and abs(level - y) < _LINE for other, level, _ in places)
        while any(abs(x - other) < _LABEL and abs(y - level) < _LINE for other, level in taken[blocked]):
            y -= _LINE / 2
        taken[blocked].append((x, y))
        axes.annotate(
            ", ".join(name for _, _, name in group),
            (x + (-0.015 if blocked else 0.015), y),
            xycoords="axes fraction",
            va="center",
            ha="right" if blocked else "left",
            fontsize=8.5,
        )
