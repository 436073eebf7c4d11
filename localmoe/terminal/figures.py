"""Figures: what `localmoe eval --figure` makes, one after the other, and what it says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.config import EvalConfig
from localmoe.evaluate.results import FILE, Results, read_results
from localmoe.terminal.evaluations import show_table
from localmoe.terminal.progress import Lines
from localmoe.terminal.screen import plain, print_json, remarks, results

if TYPE_CHECKING:
    from localmoe.evaluate.figures.figure import Figure
    from localmoe.runtime.engine import Engine

FOLDER = "figures"


def make(
    bank: Path,
    folder: Path,
    config: EvalConfig,
    options: dict[str, Any],
    opened: Callable[[Path], Engine],
    as_json: bool,
) -> None:
    """Make the figures that are asked for from a bank, those given --with it, and the results in `folder`.

    Token losses are kept in `folder`, so that another figure, or the same again, computes only what is new.
    """
    from localmoe.evaluate.drawing import require_matplotlib
    from localmoe.evaluate.figures.making import make_figures
    from localmoe.evaluate.figures.material import Material, Source
    from localmoe.evaluate.figures.options import figure_config
    from localmoe.evaluate.figures.token_losses import FILE as LOSSES
    from localmoe.evaluate.figures.token_losses import TokenLosses

    require_matplotlib()
    figure_settings = figure_config(options["settings"])
    banks, evaluations = _sorted(bank, folder, options["others"])
    console, made = results(), []

    def show(name: str, figure: Figure, files: list[Path]) -> None:
        made.append({"figure": name, "title": figure.title, "files": [str(file) for file in files]})
        if not as_json:
            _show(name, figure, files)

    losses = TokenLosses(folder / LOSSES)
    try:
        with _watching() as watch:
            sources = tuple(Source(path.name, _opener(opened, path), config, losses, watch) for path in banks)
            material = Material(figure_settings, config, sources, evaluations)
            left_out = make_figures(options["figures"], material, folder / FOLDER, show)
    finally:
        losses.close()
    if as_json:
        print_json({"figures": made, "left_out": left_out})
        return
    for name, why in left_out.items():
        console.print(plain(f"{name} was left out: {why}", "yellow"), soft_wrap=True)


def _sorted(bank: Path, folder: Path, others: Sequence[Path]) -> tuple[list[Path], tuple[tuple[str, Results], ...]]:
    """Banks, and results by the name of their folder: the bank's own, if it was evaluated there, first."""
    evaluations = [folder] if (folder / FILE).exists() else []
    banks = [bank]
    for other in others:
        (evaluations if other.suffix == ".json" or (other / FILE).exists() else banks).append(other)
    named = ((path.parent.name if path.suffix == ".json" else path.resolve().name, path) for path in evaluations)
    return banks, tuple((name, read_results(path)) for name, path in named)


def _opener(opened: Callable[[Path], Engine], path: Path) -> Callable[[], Engine]:
    return lambda: opened(path)


def _show(name: str, figure: Figure, files: list[Path]) -> None:
    from localmoe.evaluate.figures.figure import as_table

    console = results()
    if figure.draw is None:
        show_table(console, as_table(figure))
    console.print(plain(f"{name}: {figure.title}: {files[-1]}"), soft_wrap=True)


@contextmanager
def _watching() -> Iterator[Callable[[str, int, int], None]]:
    """One bar that says what is under way, or lines where there is no terminal; both on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = remarks()
    if not console.is_terminal:
        yield Lines(lambda line: console.print(plain(line), soft_wrap=True)).count
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def watch(title: str, done: int, total: int) -> None:
            bars.update(task, description=title, completed=done, total=total)

        yield watch
