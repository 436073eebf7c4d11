"""Extraction: PDF, HTML and notebooks, with their packages and without."""

from __future__ import annotations

import gzip
import io
import json
import sys

import pytest

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.corpus import ReportBuilder, read_corpus
from localmoe.train.documents import NotRead
from localmoe.train.extraction import EXTRACTORS, extract

PAGE = "<html><head>{head}</head><body><nav><a href='/'>Home</a></nav><article>{body}</article></body></html>"
PARAGRAPH = "<p>The größte boat lay at the quay all summer, and nobody in the village knew whose it was any more.</p>"


def text_of(suffix: str, data: bytes) -> str:
    return "".join(extract(suffix, io.BytesIO(data)))


def reason_of(suffix: str, data: bytes) -> str:
    with pytest.raises(NotRead) as skip:
        text_of(suffix, data)
    return skip.value.reason


def pdf(*pages: str) -> bytes:
    """A PDF of text pages, written by hand; its cross-reference table is left to be rebuilt."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, page in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    body = "".join(f"{number} 0 obj\n{content}\nendobj\n" for number, content in enumerate(objects, 1))
    return f"%PDF-1.4\n{body}trailer\n<< /Root 1 0 R /Size {len(objects) + 1} >>\nstartxref\n0\n%%EOF\n".encode()


def notebook(*cells: tuple[str, str]) -> bytes:
    made = [{"cell_type": kind, "source": source, "metadata": {}} for kind, source in cells]
    for cell in made:
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "printed"}]
            cell["execution_count"] = None
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}).encode()


@pytest.mark.parametrize(("suffix", "package"), [(".pdf", "pypdf"), (".html", "trafilatura"), (".ipynb", "nbformat")])
def test_a_missing_package_is_a_reason_and_not_an_error(monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert reason_of(suffix, b"") == "missing_package"


def test_without_packages_other_files_are_read_and_the_rest_is_fatal_only_if_nothing_is_left(tmp_path, monkeypatch):
    for package in ("pypdf", "trafilatura", "nbformat"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("a.pdf", "b.html", "c.ipynb"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CorpusError, match="0 documents") as error:
        list(read_corpus(tmp_path, CorpusConfig(), ReportBuilder()))
    assert error.value.remedy == "pip install 'localmoe[documents]'"
    (tmp_path / "d.txt").write_text("text")
    report = ReportBuilder()
    assert [document.text for document in read_corpus(tmp_path, CorpusConfig(), report)] == ["text"]
    assert report.finish().skipped == {"missing_package": 3}
    assert "pip install 'localmoe[documents]'" in "\n".join(report.finish().lines())


def test_a_pdf_gives_the_text_of_its_pages():
    pytest.importorskip("pypdf")
    assert text_of(".pdf", pdf("First page", "Second page")).split("\n\n") == [
        "First page",
        "Second page",
        "",
    ]


def test_an_html_page_gives_its_main_text():
    pytest.importorskip("trafilatura")
    page = PAGE.format(head="", body=PARAGRAPH * 5)
    for data in (page.encode(), page.encode("utf-16")):
        text = text_of(".html", data)
        assert "The größte boat lay" in text
        assert "Home" not in text


def test_an_html_page_may_declare_its_charset_and_none_is_guessed():
    pytest.importorskip("trafilatura")
    declared = PAGE.format(head='<meta charset="iso-8859-1">', body=PARAGRAPH * 5).encode("latin-1")
    assert "größte" in text_of(".html", declared)
    assert reason_of(".html", PAGE.format(head="", body=PARAGRAPH).encode("latin-1")) == "undecodable"
    for charset in (b"utf-16", b"zlib", b"nonsense"):
        assert reason_of(".html", declared.replace(b"iso-8859-1", charset)) == "undecodable"


def test_a_notebook_gives_its_cells_and_not_their_outputs():
    pytest.importorskip("nbformat")
    text = text_of(".ipynb", notebook(("markdown", "# Title"), ("code", "print('x')")))
    assert text == "# Title\n\nprint('x')\n\n"


def test_a_page_without_main_text_gives_all_of_its_text():
    pytest.importorskip("trafilatura")
    assert "hello" in text_of(".html", b"<html><body><div class='comments'>hello</div></body></html>")


@pytest.mark.parametrize(("suffix", "package"), [(".pdf", "pypdf"), (".ipynb", "nbformat")])
@pytest.mark.parametrize("data", [b"", b"junk", b"%PDF-1.4 junk", b"{", b'{"cells": 3}'])
def test_damaged_files_are_unreadable(suffix, package, data):
    pytest.importorskip(package)
    assert reason_of(suffix, data) == "unreadable"


def test_binary_and_large_pages_are_not_read(monkeypatch):
    pytest.importorskip("trafilatura")
    assert reason_of(".html", b"<html>\0") == "binary"
    assert reason_of(".html", b"<html>\0\xff") == "binary"
    monkeypatch.setattr("localmoe.train.extraction.MAX_DOCUMENT_BYTES", 20)
    assert reason_of(".html", b"x" * 21) == "too_large"


def test_extracted_text_is_free_of_nul_and_lone_surrogates(monkeypatch):
    monkeypatch.setitem(EXTRACTORS, ".pdf", lambda stream: iter(["a\0b", "c\ud800d"]))  # type: ignore[arg-type]
    assert text_of(".pdf", b"") == "abcd"


def test_extracted_files_become_documents_compressed_or_not(tmp_path):
    pytest.importorskip("nbformat")
    (tmp_path / "a.ipynb").write_bytes(notebook(("markdown", "one")))
    (tmp_path / "b.ipynb.gz").write_bytes(gzip.compress(notebook(("markdown", "two"))))
    found = list(read_corpus(tmp_path, CorpusConfig(), ReportBuilder()))
    assert [(document.source, document.text) for document in found] == [
        ("a.ipynb", "one\n\n"),
        ("b.ipynb.gz", "two\n\n"),
    ]
