"""Making figures: those asked for, one after the other, each written as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from localmoe.errors import UsageError
from localmoe.evaluate.figures import clusterings, examples, overheads, prefixes, scaling, weights  # noqa: F401
from localmoe.evaluate.figures.figure import Figure, figures, write_figure
from localmoe.evaluate.figures.material import Material

ALL = "all"

Made = Callable[[str, Figure, list[Path]], None]
"""Called with a figure's name, the figure, and its files."""


def make_figures(names: Sequence[str], material: Material, folder: Path, made: Made) -> dict[str, str]:
    """Write the figures that are named, or every one that can be made; name → why it could not, for the others.

    Raises UnknownNameError for an unknown name, and UsageError where one that was named cannot be made.
    """
    every = ALL in names
    wanted = list(figures) if every else list(dict.fromkeys(names))
    functions: dict[str, Callable[[Material], Figure]] = {}
    for name in wanted:
        if not (every and figures[name] in functions.values()):  # all: a figure of two names once
            functions[name] = figures[name]
    left_out = {}
    for name, function in functions.items():
        try:
            figure = function(material)
        except UsageError as error:
            if not every:
                raise
            left_out[name] = error.what
            continue
        made(name, figure, write_figure(folder, name, figure))
    return left_out
