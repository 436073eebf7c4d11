"""The screen: consoles for results (stdout) and all else (stderr), errors, warnings, tables and bars."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from localmoe.errors import LocalMoEError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_PIPED_WIDTH = 120  # columns where no terminal says how many it has


def results() -> Console:
    """The console on stdout: results, and nothing else."""
    return _console(stderr=False)


def remarks() -> Console:
    """The console on stderr: progress, warnings, errors."""
    return _console(stderr=True)


def show_error(error: LocalMoEError, debug: bool = False) -> None:
    """What went wrong and what to do next, on stderr; with `debug` the traceback first."""
    if debug:
        traceback.print_exception(error)
    _say("error", "bold red", error.what)
    for line in error.remedy.splitlines():
        remarks().print(f"  → {line}", markup=False, highlight=False, soft_wrap=True)


def show_warning(text: str) -> None:
    """One sentence that the user should know, on stderr."""
    _say("warning", "bold yellow", text)


@contextmanager
def readable_warnings() -> Iterator[None]:
    """Python's warnings as one sentence each, without file and line."""
    before = warnings.showwarning
    warnings.showwarning = lambda message, *place: show_warning(str(message))
    try:
        yield
    finally:
        warnings.showwarning = before


def write_text(text: str) -> None:
    """Generated text to stdout at once; on a terminal without the control characters that could steer it."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(*columns: str, right: tuple[str, ...] = (), title: str = "") -> Table:
    """An empty table without rules; `right` names the columns of numbers."""
    from rich.table import Table

    new = Table(box=None, pad_edge=False, header_style="dim", title=title or None, title_justify="left")
    for column in columns:
        new.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return new


def facts(pairs: list[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    from rich.table import Table
    from rich.text import Text

    new = Table.grid(padding=(0, 2))
    for name, value in pairs:
        new.add_row(Text(name, style="dim"), plain(value))
    return new


def plain(text: str, style: str = "") -> Text:
    """Text in which brackets mean nothing and control characters of corpus and prompt are escaped."""
    from rich.text import Text

    return Text(text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text), style)


def bar(share: float, width: int = 20) -> str:
    """A bar of at most `width` cells for a share in [0, 1]; anything above nothing shows."""
    cells = round(share * width)
    return "█" * cells if cells > 0 or share <= 0 else "▏"


def _say(word: str, style: str, text: str) -> None:
    from rich.text import Text

    remarks().print(Text.assemble((f"{word}: ", style), text), soft_wrap=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False)
