"""What README and docs/choosing.md say of `results/` lies there; reports and figures belong to their results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from localmoe.evaluate.report import report_markdown
from localmoe.evaluate.results import ComparisonRow, Results, read_results
from localmoe.quantities import interval_text

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(file.parent for file in (ROOT / "results").glob("*/results.json"))
ROW = re.compile(r"^\|.*\]\([./]*results/([\w-]+)/report\.md\).*\|$", re.MULTILINE)


def _rows(page: str) -> list[tuple[str, list[str]]]:
    """Rows of a page's tables that link to a report: the evaluation's name, and the cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(match[1], [cell.strip(" *") for cell in match[0].strip("|").split("|")]) for match in ROW.finditer(text)]


def _over_fine_tune(results: Results) -> ComparisonRow:
    row = results.comparison("merged", "fine-tuned")
    assert row is not None and row.default
    return row


def _plain(text: str) -> str:
    """Minus signs, spaces and signs within brackets as everyone may write them."""
    return re.sub(r"(?<=[\[ ])\+", "", text.replace("\u2212", "-").replace("\u00a0", " ").replace("*", "")).lstrip("+")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_report_is_that_of_the_results_beside_it(folder: Path) -> None:
    results = read_results(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    made, told = (
        [line for line in page.splitlines() if line.startswith("| ")] for page in (report_markdown(results, []), text)
    )
    assert made == told and "![" in text


@pytest.mark.parametrize(("name", "cells"), _rows("README.md"))
def test_the_readme_says_what_was_found(name: str, cells: list[str]) -> None:
    results = read_results(ROOT / "results" / name)
    tokens, *told = cells[2:6]
    assert tokens.startswith(f"{results.corpus['bank_training_tokens']:,}")
    for method, cell in zip(("base", "fine-tuned", "merged"), told, strict=True):
        found = results.method(method)
        assert found is not None
        number = cell.split()[0].strip("*")
        digits = len(number.partition(".")[2])
        assert number == f"{found.perplexity:.{digits}f}", method
    row = _over_fine_tune(results)
    assert _plain(cells[6]).startswith(_plain(interval_text(row.gain, *row.interval)))


@pytest.mark.parametrize(("name", "cells"), _rows("docs/choosing.md"))
def test_the_page_on_choosing_says_what_was_found(name: str, cells: list[str]) -> None:
    results = read_results(ROOT / "results" / name)
    assert cells[2] == f"{results.corpus['explained']:.2f}"
    assert float(cells[3]) == pytest.approx(results.corpus["tokens_per_parameter"], rel=0.1)
    row = _over_fine_tune(results)
    assert _plain(cells[4]).startswith(_plain(interval_text(row.gain, *row.interval)))


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_both_pages_say_what_more_documents_of_wikipedia_told(page: str) -> None:
    found = json.loads((ROOT / "results/wikipedia/more-documents.json").read_text(encoding="utf-8"))
    row, text = found["gain"], (ROOT / page).read_text(encoding="utf-8")
    assert f"{found['documents']:,}" in text
    gain, low, high = (100 * row[name] for name in ("gain", "low", "high"))
    assert f"+{gain:.2f} % [{low:.2f}, {high:.2f}]" in text


def test_both_pages_have_all_of_them() -> None:
    names = {folder.name for folder in FOLDERS}
    assert {name for name, _ in _rows("README.md")} == {name for name, _ in _rows("docs/choosing.md")} == names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_figures_are_of_the_bank_whose_results_lie_beside_them(folder: Path) -> None:
    bank = read_results(folder).corpus["bank"]
    for file in (folder / "figures").glob("*.json"):
        assert json.loads(file.read_text(encoding="utf-8"))["settings"].get("digest") in (None, bank), file
