"""The page of an evaluation: one HTML file that needs no network, its verdict first."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from importlib.resources import files

from localmoe.evaluate.drawing import Plot, svg
from localmoe.evaluate.tables import Cell, Table

_LONG = 30  # letters; a longer text gets room to wrap in
_CLASSES = {"better": "better", "worse": "worse", "no difference shown": "open"}


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file around parts that are HTML already; its own script alone may run."""
    template = files("localmoe.evaluate").joinpath("page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    head, _, tail = template.replace("{{policy}}", html.escape(policy)).partition("{{body}}")
    return head.replace("{{title}}", html.escape(title)) + "\n".join(parts) + tail


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "facts") -> str:
    """A paragraph of one of the page's classes."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def verdict_part(text: str, outcome: str) -> str:
    """The verdict, in the colour of its outcome."""
    whole = re.sub(r"(?<=\d) (?=%|(?:ms|s|min|h)\b)", "\u00a0", text)
    return f'<p class="verdict {_CLASSES[outcome]}">{html.escape(whole)}</p>'


def table_part(table: Table) -> str:
    """A table whose rows can be sorted by every column."""
    heads = "".join(
        f"<th{_right(column.right)}{_tip(column.help)}><button>{html.escape(column.name)}</button></th>"
        for column in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell, column.right) for cell, column in zip(row, table.columns, strict=True)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(paragraph(note, "note") for note in table.notes)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        + notes
    )


def plot_part(plot: Plot) -> str:
    """A plot as inline SVG, with its caption."""
    drawing = svg(plot).replace("<svg ", f'<svg role="img" aria-label="{html.escape(plot.title)}" ', 1)
    return f'<figure><div class="wide">{drawing}</div><figcaption>{html.escape(plot.caption)}</figcaption></figure>'


def code_part(text: str) -> str:
    """Text as it is: a command, settings."""
    return f'<div class="wide"><pre>{html.escape(text)}</pre></div>'


def folded(summary: str, parts: Sequence[str]) -> str:
    """Parts that are shown when asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def _cell(cell: Cell, right: bool) -> str:
    long = len(cell.text) > _LONG and not right
    names = " ".join(name for name in ("r" if right else "", "long" if long else "", cell.tone) if name)
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    kind = f' class="{names}"' if names else ""
    return f"<td{kind}{value}>{html.escape(cell.text)}</td>"


def _right(right: bool) -> str:
    return ' class="r"' if right else ""


def _tip(text: str) -> str:
    return f' title="{html.escape(text)}"' if text else ""
