"""The report of an evaluation: Markdown, plots as PNG, and one HTML page, all from its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from localmoe.evaluate.drawing import Plot, write_png
from localmoe.evaluate.gaps import closing_sentences
from localmoe.evaluate.page import (
    code_part,
    folded,
    heading,
    page,
    paragraph,
    plot_part,
    table_part,
    verdict_part,
)
from localmoe.evaluate.plots import plots
from localmoe.evaluate.results import Results
from localmoe.evaluate.statistics import outcome
from localmoe.evaluate.tables import (
    Table,
    checks_table,
    comparisons_table,
    costs_table,
    experts_table,
    headline,
    markdown,
    methods_table,
    subset_tables,
)
from localmoe.evaluate.verdicts import verdict
from localmoe.quantities import duration_text

MARKDOWN = "report.md"
PAGE = "report.html"


def write_report(folder: Path, results: Results) -> list[Path]:
    """`report.md`, one PNG a plot, `report.html`: what was written. Raises UsageError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = plots(results)
    pictures = [write_png(plot, folder / f"{plot.name}.png") for plot in shown]
    texts = {MARKDOWN: report_markdown(results, shown), PAGE: report_page(results, shown)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), *pictures]


def report_markdown(results: Results, shown: list[Plot]) -> str:
    """The report in Markdown; plots are linked as the PNG files beside it."""
    lines = ["# Evaluation\n", *(f"**{text}**\n" for text in _failures(results))]
    row = headline(results)
    if row is not None:
        lines.append(f"**{_sentence(verdict(row, results))}**\n")
    lines.append(" · ".join(_facts(results)) + "\n")
    first, *others = _tables(results)
    lines += [f"## {first.title}\n", markdown(first), *(f"{_sentence(text)}\n" for text in closing_sentences(results))]
    for table in others:
        lines += [f"## {table.title}\n", markdown(table)]
    for plot in shown:
        lines += [f"## {plot.title}\n", f"![{plot.title}]({plot.name}.png)\n", f"{plot.caption}\n"]
    if command(results):
        lines += ["## Command\n", f"```sh\n{command(results)}\n```\n"]
    for name, values in _settings(results):
        lines += [f"## {name}\n", f"```yaml\n{values}```\n"]
    return "\n".join(lines)


def report_page(results: Results, shown: list[Plot]) -> str:
    """The report as one HTML file."""
    parts = ["<h1>Evaluation of a LocalMoE bank</h1>", *(paragraph(text, "failed") for text in _failures(results))]
    row = headline(results)
    if row is not None:
        parts.append(verdict_part(_sentence(verdict(row, results)), outcome(*row.interval)))
    parts.append(paragraph(" · ".join(_facts(results))))
    first, *others = _tables(results)
    parts += [
        heading(first.title),
        table_part(first),
        *(paragraph(_sentence(text), "said") for text in closing_sentences(results)),
    ]
    for plot in shown:
        parts += [heading(plot.title), plot_part(plot)]
    for table in others:
        parts += [heading(table.title), table_part(table)]
    if command(results):
        parts += [heading("Command"), code_part(command(results))]
    parts.append(heading("Settings and machine"))
    parts += [folded(name, [code_part(values)]) for name, values in _settings(results)]
    return page("Evaluation of a LocalMoE bank", parts)


def command(results: Results) -> str:
    """The command line that made the results, if they say it."""
    return str(results.config.get("command", ""))


def _tables(results: Results) -> list[Table]:
    optional = [experts_table(results)]
    tables = [methods_table(results), costs_table(results), comparisons_table(results)]
    tables += [*subset_tables(results), checks_table(results)]
    return [table for table in [*tables, *optional] if table is not None and table.rows]


def _failures(results: Results) -> list[str]:
    return [f"The leak check {check.name!r} failed: {check.found}" for check in results.checks if not check.passed]


def _facts(results: Results) -> list[str]:
    facts = [f"{len(results.documents):,} held-out documents", f"{sum(results.tokens):,} tokens scored"]
    prefix = results.corpus.get("prefix_tokens")
    if prefix is not None:
        facts.append(f"prefix {prefix} tokens")
    return [*facts, f"took {duration_text(results.seconds)}"]


def _settings(results: Results) -> list[tuple[str, str]]:
    corpus, config = json.loads(json.dumps([results.corpus, results.config], default=str))
    groups: list[tuple[str, Any]] = [("Corpus", corpus)]
    plain = {name: value for name, value in config.items() if name != "command"}
    loose = {name: value for name, value in plain.items() if not isinstance(value, dict)}
    groups += [(name.replace("_", " ").capitalize(), value) for name, value in plain.items() if isinstance(value, dict)]
    groups += [("Other settings", loose)] if loose else []
    return [(name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)) for name, value in groups]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
