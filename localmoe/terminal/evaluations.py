"""Evaluations: what `localmoe eval` shows at the end, its verdict first."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from localmoe.config import EvalConfig
from localmoe.evaluate.gaps import closing_sentences
from localmoe.evaluate.statistics import outcome
from localmoe.evaluate.tables import Table, headline, methods_table, subset_tables
from localmoe.evaluate.verdicts import verdict
from localmoe.terminal.progress import Lines
from localmoe.terminal.screen import plain, remarks, table

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.evaluate.results import Results
    from localmoe.runtime.engine import Engine

LEFT_OUT = "was left out"
"""How the name of a check ends that says why a method was not run."""

_STYLES = {"good": "green", "bad": "red", "strong": "bold"}
_OUTCOMES = {"better": "bold green", "worse": "bold red", "no difference shown": "bold yellow"}


def run(engine: Engine, folder: Path, config: EvalConfig) -> Results:
    """Evaluate with bars on stderr (lines where there is no terminal), and leave results and report in the folder."""
    from localmoe.evaluate.evaluation import evaluate
    from localmoe.evaluate.report import write_report

    with stages() as watch:
        results = evaluate(engine, folder, config, watch, command=shlex.join(["localmoe", *sys.argv[1:]]))
    write_report(folder, results)
    return results


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """What to hand to `evaluate` as `watch`: a bar a stage, or lines where there is no terminal."""
    console = remarks()
    if not console.is_terminal:
        yield Lines(lambda line: console.print(plain(line), soft_wrap=True)).count
        return
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield watch


def show_results(console: Console, results: Results) -> None:
    """An evaluation: what failed, the verdict, the table, and all methods where some saw fewer documents."""
    left_out = [check for check in results.checks if check.name.endswith(LEFT_OUT)]
    failed = [check for check in results.checks if not check.passed]
    for check in failed:
        console.print(plain(f"the leak check {check.name!r} failed: {check.found}", "bold red"), soft_wrap=True)
    row = headline(results)
    if row is not None:
        console.print(plain(verdict(row, results), _OUTCOMES[outcome(*row.interval)]), soft_wrap=True)
        console.print()
    show_table(console, methods_table(results))
    for sentence in closing_sentences(results):
        console.print(plain(sentence), soft_wrap=True)
    for part in subset_tables(results):
        console.print()
        show_table(console, part)
    console.print()
    for check in left_out:
        console.print(plain(f"{check.name}: {check.found}", "yellow"), soft_wrap=True)
    if results.checks and not failed:
        console.print(plain(f"all {len(results.checks) - len(left_out)} leak checks passed", "dim"))


def show_table(console: Console, shown: Table) -> None:
    """A table for people, without the columns that hold nothing; its title above, its notes below."""
    kept = [place for place in range(len(shown.columns)) if any(row[place].text for row in shown.rows)]
    names = [shown.columns[place].name for place in kept]
    right = tuple(shown.columns[place].name for place in kept if shown.columns[place].right)
    rows = table(*names, right=right, title=shown.title)
    for row in shown.rows:
        rows.add_row(*(plain(row[place].text, _STYLES.get(row[place].tone, "")) for place in kept))
    console.print(rows)
    for note in shown.notes:
        console.print(plain(note, "dim"), soft_wrap=True)
