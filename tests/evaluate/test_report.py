"""The report: files, what stands first, that nothing is fetched, and plots that take the page's colours."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import made_results
import pytest
from matplotlib.figure import Figure

from localmoe.errors import UsageError
from localmoe.evaluate.drawing import label_points, require_matplotlib, svg
from localmoe.evaluate.gaps import gap_sentences
from localmoe.evaluate.page import page, table_part, verdict_part
from localmoe.evaluate.plots import plots
from localmoe.evaluate.report import report_markdown, report_page, write_report
from localmoe.evaluate.results import Results
from localmoe.evaluate.tables import Cell, Column, Table
from localmoe.quantities import percent


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
    sentence = gap_sentences(results)[-1]
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


def test_a_method_far_off_is_an_arrow_with_its_value_and_the_caption_says_so() -> None:
    made = made_results.results(gains=made_results.GAINS | {"base": -2.0, "null": -1.5})
    time, forest = plots(made)[:2]
    rows = {row.method: row for row in made.comparisons if row.baseline == "fine-tuned"}
    for plot in (time, forest):
        assert "Far outside the picture, and so an arrow at its edge with the value: base, null." in plot.caption
        canvas = Figure()
        plot.draw(canvas)
        texts = " ".join(text.get_text() for text in canvas.axes[0].texts)
        assert percent(rows["base"].gain, signed=True) in texts and percent(rows["null"].gain, signed=True) in texts
        limits = canvas.axes[0].get_ylim() if plot is time else canvas.axes[0].get_xlim()
        assert -0.2 < limits[0] < rows["trunk"].gain and rows["merged"].gain < limits[1] < 0.2
    assert "Far outside" not in plots(made_results.results())[0].caption


def test_names_stand_on_no_point_and_on_no_other_name() -> None:
    axes = Figure(figsize=(7, 4.2)).subplots()
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 10)
    axes.set_ylim(0, 1)
    points = [(0.01, 0.5, "merged"), (0.012, 0.52, "merged-1"), (0.013, 0.47, "merged-10"), (0.02, 0.5, "uniform")]
    label_points(axes, points, [(0.0128, 0.4, 0.6)], [0.5])
    places = [(math.log(x / 1e-3) / math.log(1e4), y) for x, y, _ in points]
    boxes = [(*text.xy, 0.0125 * len(text.get_text())) for text in axes.texts]
    assert len(boxes) == 4
    for left, middle, width in boxes:
        assert not any(left < x < left + width and abs(y - middle) < 0.0225 for x, y in places)
        others = [box for box in boxes if box != (left, middle, width)]
        assert not any(x < left + width and left < x + w and abs(y - middle) < 0.0449 for x, y, w in others)


def test_points_that_cannot_be_told_apart_share_a_name() -> None:
    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 10)
    label_points(axes, [(0.01, 0.5, "merged"), (0.0101, 0.501, "uniform"), (1.0, 0.5, "ttt")])
    assert sorted(text.get_text() for text in axes.texts) == ["ttt", "uniform, merged"]


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
