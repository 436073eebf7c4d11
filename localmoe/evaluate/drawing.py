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

# Shares of the axes: points closer than the first are one; the size of a point, of a letter, and of a line of text.
_SAME, _POINT, _LETTER, _LINE = 0.012, 0.02, 0.0125, 0.045

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


def label_points(
    axes: Any,
    points: Sequence[tuple[float, float, str]],
    bars: Sequence[tuple[float, float, float]] = (),
    lines: Sequence[float] = (),
) -> None:
    """Names beside points (x logarithmic), where they cover least: no point, no other name, bar or line if possible.

    bars: x, low and high of vertical ones; lines: heights of horizontal ones. Points that can hardly be told apart
    share one name.
    """
    (left, right), (low, high) = np.log(axes.get_xlim()), axes.get_ylim()

    def across(x: float) -> float:
        return float((np.log(x) - left) / (right - left))

    def up(y: float) -> float:
        return float((y - low) / (high - low))

    places = [(across(x), up(y), name) for x, y, name in points]
    taken = [(x - _POINT / 2, y - _POINT, x + _POINT / 2, y + _POINT) for x, y, _ in places]
    taken += [(across(x) - 0.003, up(bottom), across(x) + 0.003, up(top)) for x, bottom, top in bars]
    taken += [(0.0, up(y) - 0.002, 1.0, up(y) + 0.002) for y in lines]
    for group in _alike(places):
        x, y, _ = group[0]
        name = ", ".join(name for _, _, name in group)
        box = min(_beside(x, y, _LETTER * len(name)), key=lambda box: _covered(box, taken))
        taken.append(box)
        axes.annotate(name, (box[0], (box[1] + box[3]) / 2), xycoords="axes fraction", va="center", fontsize=8.5)


Box = tuple[float, float, float, float]
"""Left, bottom, right and top, as shares of the axes."""


def _alike(places: list[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Places, the highest first; those of points that can hardly be told apart together."""
    groups: list[list[tuple[float, float, str]]] = []
    for place in sorted(places, key=lambda place: -place[1]):
        same = (g for g in groups if abs(g[0][0] - place[0]) < _SAME and abs(g[0][1] - place[1]) < _SAME)
        group = next(same, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


def _beside(x: float, y: float, width: float) -> list[Box]:
    """Where the name of a point may stand, the best first: right, left, above, below, then farther up or down."""
    half = _LINE / 2
    found = []
    for level in (y, y + _LINE, y - _LINE, y + 1.6 * _LINE, y - 1.6 * _LINE):
        lefts = [x + 0.75 * _POINT, x - 0.75 * _POINT - width, *([] if level == y else [x - width / 2])]
        found += [(left, level - half, left + width, level + half) for left in lefts]
    return found


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of a box that others cover, or that is outside the axes, which counts more."""
    left, bottom, right, top = box
    area = (right - left) * (top - bottom)
    inside = max(0.0, min(right, 1) - max(left, 0)) * max(0.0, min(top, 1) - max(bottom, 0))
    others = (
        max(0.0, min(right, other[2]) - max(left, other[0])) * max(0.0, min(top, other[3]) - max(bottom, other[1]))
        for other in taken
    )
    return round(10 * (area - inside) + sum(others), 6)  # so that the first of equals is taken
