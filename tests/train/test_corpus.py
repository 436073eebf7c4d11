"""The corpus: from a path to documents."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.corpus import Document, ReportBuilder, SeenKeys, read_corpus


def read(source: str | Path, report: ReportBuilder | None = None, **config: object) -> list[Document]:
    builder = ReportBuilder() if report is None else report
    return list(read_corpus(source, CorpusConfig(**config), builder))  # type: ignore[arg-type]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_a_folder_of_all_kinds_is_read_in_a_fixed_order(tmp_path):
    (tmp_path / "b.py").write_text("print('b')\n")
    write_jsonl(tmp_path / "c.jsonl", {"text": "c1"}, {"prompt": "p", "completion": "q"})
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": ["d1", "d2"]}), tmp_path / "a" / "d.parquet")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\0")
    report = ReportBuilder()
    found = read(tmp_path, report)
    assert [document.source for document in found] == [
        "b.py", "c.jsonl:1", "c.jsonl:2", "z.txt.gz", "a/d.parquet:1", "a/d.parquet:2",
    ]  # fmt: skip
    assert [document.query for document in found] == ["print('b')\n", "c1", "p", "zipped", "d1", "d2"]
    account = report.finish()
    assert (account.files, account.records, account.documents) == (4, 4, 6)
    assert account.skipped == {"binary": 1}
    assert account.characters == sum(len(document.content) for document in found)
    assert read(str(tmp_path)) == found


def test_a_single_file_is_a_corpus_and_no_source_is_an_absolute_path(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"})
    assert [document.source for document in read(path)] == ["c.jsonl:1", "c.jsonl:2"]


def test_s31_empty_and_repeated_documents_are_dropped_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"text": "same"}, {"text": " \n"}, {"text": "other"}, {"text": "same"})
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("")
    report = ReportBuilder()
    assert [document.text for document in read(tmp_path, report)] == ["same", "other"]
    assert report.finish().skipped == {"empty": 2, "duplicate": 2}


def test_documents_are_partitioned_by_access_set_before_duplicates_are_dropped(tmp_path):
    rows = [
        {"text": "t"},
        {"text": "t", "who": "hr"},
        {"text": "t", "who": ["b", "hr"]},
        {"text": "t", "who": ["hr", "b"]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", *rows, {"text": "t", "who": []})
    report = ReportBuilder()
    found = read(path, report, access_field="who")
    assert [document.access for document in found] == [(), ("hr",), ("b", "hr")]
    assert len({document.id for document in found}) == 1
    assert report.finish().skipped == {"duplicate": 2}
    assert report.finish().restricted == 2


def test_access_and_tags_come_from_paths_and_records(tmp_path):
    (tmp_path / "hr").mkdir()
    (tmp_path / "open.txt").write_text("open")
    (tmp_path / "hr" / "a.txt").write_text("closed")
    write_jsonl(tmp_path / "hr" / "b.jsonl", {"text": "both", "who": "legal"})
    report = ReportBuilder()
    found = read(
        tmp_path,
        report,
        access_field="who",
        access_paths={"hr/*": ("hr",), "finance/*": ("finance",)},
        tags_paths={"*.txt": ("plain",), "hr": ("people",)},
    )
    assert [(document.text, document.access, document.tags) for document in found] == [
        ("open", (), ("plain",)),
        ("closed", ("hr",), ("people", "plain")),
        ("both", ("hr", "legal"), ("people",)),
    ]
    assert report.finish().unmatched == ("finance/*",)
    assert any("'finance/*'" in line for line in report.finish().lines())


def test_an_access_value_of_a_wrong_type_stops_the_reading(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "who": "hr"}, {"text": "b", "who": 7})
    with pytest.raises(CorpusError, match=r"a\.jsonl:2"):
        read(path, access_field="who")


def test_an_access_field_that_no_record_has_is_an_error_for_all_would_be_public(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "who": "hr"})
    with pytest.raises(CorpusError, match=r"'whom'.*public"):
        read(path, access_field="whom")


def test_a_missing_path_suggests_the_nearest_name(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", {"text": "a"})
    with pytest.raises(CorpusError, match=r"did you mean 'corpus\.jsonl'"):
        read_corpus(tmp_path / "corpsu.jsonl", CorpusConfig(), ReportBuilder())
    with pytest.raises(CorpusError, match="nor the folder"):
        read(tmp_path / "none" / "at all")


@pytest.mark.parametrize("source", ["", "a\0b", "~no-such-user-here/corpus", "x" * 5000 + "/y/z"])
def test_a_path_that_cannot_be_is_an_error_at_once(source):
    with pytest.raises(CorpusError):
        read_corpus(source, CorpusConfig(), ReportBuilder())


def test_s25_an_empty_corpus_says_what_was_looked_for_and_what_left_out(tmp_path):
    with pytest.raises(CorpusError, match=r"0 documents found in .*looked for text.*left out: nothing"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\0")
    with pytest.raises(CorpusError, match=r"1 left out by corpus\.include.*1 binary|1 binary.*1 left out") as error:
        read(tmp_path, exclude=("*.txt",))
    assert "corpus.exclude" in error.value.remedy


def test_a_text_field_that_no_record_has_lists_the_fields_and_suggests_the_longest(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"id": "17", "body": "long text"}, {"id": "18", "score": 2})
    report = ReportBuilder()
    with pytest.raises(CorpusError, match="'id', 'body', 'score'") as error:
        read(path, report)
    assert error.value.remedy.endswith("corpus.text_field=body")
    assert report.finish().skipped == {"no_text": 2}
    assert [document.text for document in read(path, text_field="body")] == ["long text"]


def test_a_file_that_cannot_be_read_is_counted_and_alone_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone")
    opened = Path.open

    def guarded(self, *arguments):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", guarded)
    report = ReportBuilder()
    assert [document.text for document in read(tmp_path, report)] == ["b"]
    assert report.finish().skipped == {"unreadable": 2}
    with pytest.raises(CorpusError, match=r"a\.txt \(Permission denied\)"):
        read(tmp_path / "a.txt")


def test_one_json_value_is_refused_with_the_command_that_makes_jsonl(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(CorpusError) as error:
        read(tmp_path / "a.json")
    assert error.value.remedy == "jq -c '.[]' a.json > a.jsonl"


def test_documents_are_given_out_while_the_corpus_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    report = ReportBuilder()
    documents = read_corpus(path, CorpusConfig(), report)
    assert next(documents).text == "a"
    assert report.records == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60).map(str), max_size=120))
def test_seen_keys_are_a_set(keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeenKeys, "MERGE_AT", 3)
        seen = SeenKeys()
        assert [seen.add(key) for key in keys] == [key not in keys[:n] for n, key in enumerate(keys)]


def test_seen_keys_take_at_most_sixteen_bytes_each(monkeypatch):
    monkeypatch.setattr(SeenKeys, "MERGE_AT", 500)
    n, seen = 32_000, SeenKeys()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    new = sum(seen.add(str(number)) for number in range(n))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    constant = 100_000  # the keys not merged yet
    assert new == n
    assert len(seen._runs) <= 8  # of 500 · 2^k keys each, so that a look-up is fast
    assert current - before < 8 * n + constant
    assert peak - before < 16 * n + constant


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["abc", "defg"] * 20, "who": [["hr"], None] * 20}), sink)
    return sink.getvalue()


def arrow_bytes(new: object) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": ["abc", "defg"] * 20, "who": [["hr"], None] * 20})
    with new(sink, table.schema) as writer:  # type: ignore[operator]
        writer.write_table(table)
    return sink.getvalue()


JSONL = b'{"text": "abc", "who": "hr"}\n{"prompt": "p", "completion": "q"}\n' * 3
VALID = {
    "parquet": parquet_bytes(),
    "arrow": arrow_bytes(pa.ipc.new_file),
    "feather": arrow_bytes(pa.ipc.new_stream),
    "jsonl": JSONL,
    "jsonl.gz": gzip.compress(JSONL, mtime=0),
    "txt.zst": pa.compress(JSONL, codec="zstd", asbytes=True),
    "txt": "grün".encode("utf-16"),
    "py": JSONL,
    "html": b"<html><meta charset=latin-1><body><article><p>Some text.</p></article></body></html>",
    "pdf": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF",
    "ipynb": b'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}',
}


@st.composite
def damaged(draw):
    """(suffix, bytes): junk, or a valid file with a few bytes changed or its end cut off."""
    suffix = draw(st.sampled_from(sorted(VALID)))
    if draw(st.booleans()):
        return suffix, draw(st.binary(max_size=60))
    data = bytearray(VALID[suffix])
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = value
    return suffix, bytes(data[: draw(st.integers(0, len(data)))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(damaged(), min_size=1, max_size=6))
def test_s29_junk_raises_corpus_errors_alone_and_gives_nothing_undecodable(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("junk")
    for number, (suffix, data) in enumerate(files):
        (folder / f"{number}.{suffix}").write_bytes(data)
    report = ReportBuilder()
    try:
        found = read(folder, report, access_field="who")
    except CorpusError:
        found = []
    for document in found:
        assert document.query.strip()
        for text in (document.query, document.content, document.source):
            assert "\0" not in text
            text.encode()
    "\n".join(report.finish().lines()).encode()


@pytest.mark.parametrize("seed", range(3))
def test_s29_random_bytes_of_any_length_are_counted(tmp_path, seed):
    random = np.random.default_rng(seed)
    for number in range(20):
        data = random.integers(0, 256, int(random.integers(200, 3000)), dtype=np.uint8).tobytes()
        (tmp_path / f"{number}.bin").write_bytes(data)
    (tmp_path / "z.txt").write_text("text")
    report = ReportBuilder()
    assert [document.text for document in read(tmp_path, report)] == ["text"]
    skipped = report.finish().skipped
    assert skipped["binary"] + skipped.get("undecodable", 0) == 20
