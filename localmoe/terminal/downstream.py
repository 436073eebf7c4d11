"""Downstream results: what was asked, and every comparison with its interval, as tables and as plain data."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from localmoe.terminal.screen import plain, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from localmoe.bank.store import Bank
    from localmoe.config import LmEvalConfig
    from localmoe.evaluate.downstream import Comparison, Run

_COLOURS = {"better": "green", "worse": "red"}


def downstream_data(
    bank: Bank, config: LmEvalConfig, runs: Sequence[Run], compared: Sequence[Comparison]
) -> dict[str, Any]:
    """All that `localmoe lm-eval` knows, as plain data."""
    from localmoe.config import as_dict

    return {
        "bank": bank.manifest.digest,
        "config": as_dict(config),
        "runs": {
            run.name: {
                "results": run.results["results"],
                "documents": {task: count["effective"] for task, count in run.results["n-samples"].items()},
                "model": run.results["config"]["localmoe"],
            }
            for run in runs
        },
        "comparisons": [comparison.as_dict() for comparison in compared],
    }


def show_downstream(console: Console, runs: Sequence[Run], compared: Sequence[Comparison]) -> None:
    """A table for every pair of runs, or the values alone where nothing was compared; and how requests were routed."""
    if not compared:
        for run in runs:
            _show_values(console, run)
    for (method, baseline), rows in groupby(compared, key=lambda row: (row.method, row.baseline)):
        _show_pair(console, method, baseline, list(rows))
    for run in runs:
        model = run.results["config"]["localmoe"]
        if model["method"] == "merged":
            _show_routing(console, run.name, model["routing"])


def _show_pair(console: Console, method: str, baseline: str, rows: list[Comparison]) -> None:
    interval = "difference, 95 % interval"
    shown = table("task", "metric", method, baseline, interval, "documents", "", right=(interval, "documents"))
    for row in rows:
        metric = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
        better = "" if row.higher_is_better else " ↓"
        if row.found is None:
            shown.add_row(plain(row.task), f"{metric}{better}", "", "", "", "", row.verdict)
            continue
        found = row.found
        shown.add_row(
            plain(row.task),
            f"{metric}{better}",
            f"{found.method:.4f}",
            f"{found.baseline:.4f}",
            f"{found.difference:+.4f} \\[{found.low:+.4f}, {found.high:+.4f}]",
            f"{found.documents:,}",
            plain(row.verdict, _COLOURS.get(row.verdict, "dim")),
        )
    console.print(shown)
    console.print("↓ lower is better; paired bootstrap over documents, and McNemar for right or wrong", style="dim")
    console.print()


def _show_values(console: Console, run: Run) -> None:
    shown = table("task", "metric", run.name, "± standard error", "documents", right=("documents",))
    for task, found in run.results["results"].items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            shown.add_row(
                plain(task),
                metric if filtered == "none" else f"{metric}, {filtered}",
                f"{value:.4f}" if isinstance(value, float) else str(value),
                f"{error:.4f}" if isinstance(error, float) else "",
                f"{found['sample_len']:,}" if "sample_len" in found else "",
            )
    console.print(shown)
    console.print()


def _show_routing(console: Console, name: str, routing: dict[str, Any]) -> None:
    text = (
        f"{name}: routed on {routing['route_on'].replace('_', ' ')}, {routing['requests']:,} requests, "
        f"{routing['mixes']:,} mixes, {routing['active_mean']:.1f} experts a request"
    )
    if routing["fallbacks"]:
        text += f", {routing['fallbacks']:,} fall-backs to the nearest"
    if routing["without_text"]:
        text += f", {routing['without_text']:,} without text, answered by the base"
    console.print(text, style="dim")
