"""Figures of cost: time against tokens and against active experts, and the run times of everything (figure 4)."""

from __future__ import annotations

import json
import re
from typing import Any

from localmoe.errors import UsageError
from localmoe.evaluate.bench import known_tokens
from localmoe.evaluate.drawing import COLOURS, INK, Series, draw_series
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import Material

STAGES = ("embed", "select", "load", "merge")
_LENGTHS = (1, 10, 30, 100, 300, 1000)


@figures.register("4-left")
def cost_of_tokens(material: Material) -> Figure:
    """Seconds against generated tokens: base, merged, and an ensemble of as many experts."""
    report, rank = _report(material)
    base = _pace(report, rank, "base")
    rows: list[Row] = []
    for active, (first, each) in _pace(report, rank, "localmoe").items():
        base_first, base_each = base[active]
        for tokens in _LENGTHS:
            alone = base_first + (tokens - 1) * base_each
            merged = first + (tokens - 1) * each
            rows.append(
                {"active": active, "tokens": tokens, "base": alone, "merged": merged, "ensemble": active * alone}
            )

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        series = []
        for place, active in enumerate(sorted({row["active"] for row in rows}, reverse=True)):
            own = [row for row in rows if row["active"] == active]
            shade = 1.0 if place == 0 else 0.5
            x = [row["tokens"] for row in own]
            for colour, model in ((COLOURS[1], "merged"), (COLOURS[3], "ensemble")):
                name = f"{model}, {active} expert{'' if active == 1 else 's'}"
                series.append(Series(name, x, [row[model] for row in own], colour=colour, alpha=shade))
            if place == 0:
                series.append(Series("base", x, [row["base"] for row in own], colour=INK, line="--"))
        draw_series(axes, series, "log", _LENGTHS)
        axes.set(xlabel="generated tokens", ylabel="seconds", yscale="log")

    caption = (
        f"Measured first token and pace ({_where(report)}, r = {rank}); "
        "an ensemble is counted as one base model for every active expert."
    )
    return Figure("Cost of generated tokens", caption, tuple(rows), _settings(report, rank), draw)


@figures.register("4-middle")
def overhead(material: Material) -> Figure:
    """What a prompt waits for beside the base model, stage by stage, against the number of active experts."""
    report, rank = _report(material)
    rows = tuple(
        {"active": active} | {stage: medians["localmoe"].get(stage, 0.0) for stage in STAGES}
        for active, medians in _first(report, rank).items()
    )

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        places = range(len(rows))
        bottom = [0.0] * len(rows)
        for colour, stage in zip(COLOURS, STAGES, strict=False):
            heights = [row[stage] * 1e3 for row in rows]
            if any(heights):
                axes.bar(places, heights, 0.6, bottom=bottom, color=colour, label=stage)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xticks(places, [str(row["active"]) for row in rows])
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="active experts", ylabel="ms a prompt, median", ylim=(0, 1.2 * max(bottom)))
        axes.legend(ncols=len(STAGES), loc="upper center")

    caption = f"Medians ({_where(report)}, r = {rank}). The encoder is counted in the part `encoder` of the benchmark."
    return Figure("Overhead of a prompt", caption, rows, _settings(report, rank), draw)


@figures.register("run-times")
def run_times(material: Material) -> Figure:
    """How long builds and evaluations took as a whole."""
    rows: list[Row] = []
    for source in material.sources:
        manifest = source.engine.bank.manifest
        rows.append(
            {
                "run": f"build of {source.name}",
                "seconds": float(manifest.created.get("seconds", 0.0)),
                "experts": len(manifest.experts),
                "training_tokens": known_tokens(manifest),
                "documents": None,
            }
        )
    for name, results in material.results:
        row: Row = {"run": f"evaluation {name}", "seconds": results.seconds, "documents": len(results.documents)}
        rows.append(row)
        for method in results.methods:
            added = method.seconds.get("added")
            if added is not None:
                rows.append({"run": f"one prompt by {method.name}, {name}", "seconds": added.p50, "documents": None})
    if not rows:
        raise UsageError(
            "run times are of banks and results, and none was given", "localmoe eval BANK --figure run-times"
        )
    caption = (
        "Wall time. Of a bank: its last build, which may have gone on from an interrupted one. Of a prompt: what it "
        "adds to the base model's own work, median."
    )
    return Figure("Run times", caption, tuple(rows))


def _report(material: Material) -> tuple[dict[str, Any], int]:
    """What the benchmark wrote, and the largest rank in it."""
    path = material.config.overhead
    if path is None:
        raise UsageError(
            "this figure is made from the overhead benchmark, and its JSON was not given",
            "python benchmarks/overhead.py --json overhead.json, then --set figure.overhead=overhead.json",
        )
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ranks = [int(match[1]) for name in report["first"] if (match := re.search(r"r=(\d+)", name))]
        return report, max(ranks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not what benchmarks/overhead.py writes: {error}", "make it again with --json"
        ) from error


def _first(report: dict[str, Any], rank: int) -> dict[int, dict[str, dict[str, float]]]:
    """N → side → stage → median seconds."""
    found = {}
    for name, part in report["first"].items():
        match = re.fullmatch(rf"N=(\d+) r={rank}", name)
        if match is not None:
            found[int(match[1])] = part["medians"]
    return dict(sorted(found.items()))


def _pace(report: dict[str, Any], rank: int, side: str) -> dict[int, tuple[float, float]]:
    """N → seconds of the first token and of each after it, of the longest answers there are."""
    found: dict[int, tuple[float, float]] = {}
    longest: dict[int, int] = {}
    for name, part in report.get("answers", {}).items():
        match = re.fullmatch(rf"N=(\d+) r={rank} (\d+) tokens", name)
        if match is None:
            continue
        active, tokens, row = int(match[1]), int(match[2]), part["medians"][side]
        if tokens > longest.get(active, 1):
            longest[active] = tokens
            found[active] = (row["first_token"], (row["total"] - row["first_token"]) / (tokens - 1))
    if not found:
        raise UsageError(
            "the overhead benchmark ran without its part `answers`", "run it again with --parts first answers"
        )
    return dict(sorted(found.items()))


def _where(report: dict[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    return f"{settings.get('shape') or settings['base']} on {machine.get('gpu', machine.get('cpu', 'this machine'))}"


def _settings(report: dict[str, Any], rank: int) -> dict[str, Any]:
    return {"rank": rank, "command": report["command"], "machine": report["machine"], "dtype": report["dtype"]}
