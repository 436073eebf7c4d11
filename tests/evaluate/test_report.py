"""The report: files, what stands first, that nothing is fetched, and plots that take the page's colours."""

import re
from html.parser import HTMLParser
from pathlib import Path

import made_results
import pytest

from localmoe.errors import UsageError
from localmoe.evaluate.drawing import require_matplotlib, svg
from localmoe.evaluate.gaps import gap_sentence
from localmoe.evaluate.page import page, table_part, verdict_part
from localmoe.evaluate.plots import plots
from localmoe.evaluate.report import report_markdown, report_page, write_report
from localmoe.evaluate.results import Results
from localmoe.evaluate.tables import Cell, Column, Table


@pytest.fixture(scope="module")
def results() -> Results:
    return made_results.results()


@pytest.fixture(scope="module")
def folder(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, results)
    return folder


def test_markdown_page_and_plots_are_written(results: Results, folder: Path) -> None:
    names = {"report.md", "report.html", "gain-against-time.png", "gains.png", "by-document.png"}
    assert {file.name for file in folder.iterdir()} == names
    for plot in plots(results):
        assert (folder / f"{plot.name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({plot.name}.png)" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_verdict_stands_before_the_table(folder: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8").replace("\u00a0", " ")
        found = re.search(r"Merging 3 experts beats the fine-tune by \d\.\d % \[\d\.\d, \d\.\d\] for \+31 ms", text)
        assert found is not None
        assert found.start() < text.index("merged-10")
        assert "localmoe eval bank -o out" in text


def test_the_gap_to_test_time_training_is_said_below_the_table(folder: Path, results: Results) -> None:
    sentence = gap_sentence(results)
    assert sentence is not None
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        said = text.index(sentence[1:])
        assert text.index("merged-10") < said < text.index("Comparisons" if name == "report.md" else "<figure>")


def test_a_failed_check_stands_before_the_verdict(results: Results) -> None:
    failing = made_results.failing(results)
    text = report_markdown(failing, [])
    assert text.index("near duplicates") < text.index("Merging 3 experts")
    html = report_page(failing, [])
    assert html.index("near duplicates") < html.index("Merging 3 experts")
    assert "<b>stand</b>" not in html
    assert "&lt;b&gt;stand" in html


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_fetches_nothing(folder: Path) -> None:
    links = _Links()
    links.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert links.found  # glyphs within the plots
    assert all(link.startswith("#") for link in links.found)


def test_a_plot_takes_the_colour_of_the_page(results: Results) -> None:
    drawing = svg(plots(results)[0])
    assert drawing.startswith("<svg")
    assert "currentColor" in drawing
    assert "#1f2328" not in drawing
    assert drawing == svg(plots(results)[0])


def test_a_method_that_was_not_timed_is_not_drawn_as_if_it_were_free() -> None:
    made = made_results.results(gains={"fine-tuned": 0.0, "trunk": -0.1, "merged": 0.02, "ensemble-9": 0.03})
    caption = plots(made)[0].caption
    assert caption.endswith("Not timed, and so not here: ensemble-9.")
    assert "Not timed" not in plots(made_results.results())[0].caption


def test_cells_are_escaped_and_carry_what_they_are_sorted_by() -> None:
    html = table_part(
        Table("t", (Column("a<", help='"'), Column("b", True)), ((Cell("<i>"), Cell("1 %", 0.01, "good")),))
    )
    assert "&lt;i&gt;" in html and "<i>" not in html
    assert '<td class="r good" data-value="0.01">1 %</td>' in html
    assert 'title="&quot;"' in html


def test_a_title_or_part_with_braces_is_not_a_place_to_fill() -> None:
    html = page("{{body}}", [verdict_part("{{title}}", "better")])
    assert "<title>{{body}}</title>" in html
    assert "{{title}}" in html.partition("<main>")[2]


def test_without_matplotlib_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"localmoe\[eval\]"):
        require_matplotlib()
