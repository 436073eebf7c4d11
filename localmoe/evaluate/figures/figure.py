"""Figure: data in rows, how it is drawn, and which settings made it; on disk as CSV, JSON and PNG or Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localmoe.evaluate.drawing import FAINT, Draw, Plot, write_png
from localmoe.evaluate.figures.material import Material
from localmoe.evaluate.tables import Cell, Column, Table, markdown
from localmoe.registry import Registry

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure, or a table where there is nothing to draw; `settings`: documents, values and banks that were used."""

    title: str
    caption: str
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    draw: Draw | None = None
    size: tuple[float, float] = (7.0, 4.2)


Make = Callable[[Material], Figure]
"""Raises UsageError where what is needed was not given."""

figures: Registry[Make] = Registry("figure")


def write_figure(folder: Path, name: str, figure: Figure) -> list[Path]:
    """NAME.csv and NAME.json, and NAME.png or, of a table, NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = columns_of(figure.rows)
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    with paths[0].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(figure.rows)
    data = {
        "figure": name,
        "title": figure.title,
        "caption": figure.caption,
        "settings": figure.settings,
        "rows": list(figure.rows),
    }
    paths[1].write_text(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    if figure.draw is not None:
        plot = Plot(name, figure.title, figure.caption, _with_sizes(figure.draw, figure.settings), figure.size)
        return [*paths, write_png(plot, folder / f"{name}.png")]
    text = f"# {figure.title}\n\n{figure.caption}\n\n{markdown(as_table(figure))}"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return [*paths, folder / f"{name}.md"]


def _with_sizes(draw: Draw, settings: Mapping[str, Any]) -> Draw:
    """The same picture with a line below it that says what it was made of."""
    words = [f"{settings[name]} {name}" for name in ("documents", "experts", "clusters") if name in settings]
    named = [str(settings[name]) for name in ("bank", "base") if name in settings]

    def drawn(canvas: Any) -> None:
        draw(canvas)
        if named or words:
            canvas.supxlabel(", ".join(named + words), x=0.995, ha="right", fontsize=7, color=FAINT)

    return drawn


def as_table(figure: Figure) -> Table:
    """The rows of a figure as a table for people."""
    names = columns_of(figure.rows)
    numbers = {name: all(isinstance(row.get(name), int | float | None) for row in figure.rows) for name in names}
    return Table(
        figure.title,
        tuple(Column(name.replace("_", " "), numbers[name]) for name in names),
        tuple(tuple(_cell(row.get(name)) for name in names) for row in figure.rows),
    )


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All keys, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell(f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Cell(f"{value:,}", value)
    return Cell("" if value is None else str(value))
