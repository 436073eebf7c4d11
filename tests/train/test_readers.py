"""Readers: JSONL, Parquet, Arrow and text files, compressed or not."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from localmoe.config import CorpusConfig
from localmoe.train import readers, texts
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.documents import MAX_DOCUMENT_BYTES, NotRead
from localmoe.train.readers import kind_of, read_file, wanted_fields


def records(path: Path, report: ReportBuilder | None = None, **config: object) -> list[tuple[str, dict[str, object]]]:
    builder = ReportBuilder() if report is None else report
    found = read_file(path, path.name, CorpusConfig(**config), builder)  # type: ignore[arg-type]
    return [(record.source, dict(record.fields)) for record in found]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def skips(report: ReportBuilder) -> list[tuple[str, str]]:
    return [(skip.source, skip.reason) for skip in report.finish().examples]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/b.JSONL.gz", ("gzip", ".jsonl")),
        ("b.txt.zst", ("zstd", ".txt")),
        ("b.gz", ("gzip", "")),
        ("b.py", (None, ".py")),
        ("Makefile", (None, "")),
        (".gz", (None, "")),
    ],
)
def test_kind_and_compression_are_told_by_the_name(name, kind):
    assert kind_of(name) == kind


def test_jsonl_is_split_at_newlines_alone(tmp_path):
    strings = ["a\u2028b", "c\u2029d", "e\x85f", "g\u000bh"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in strings)
    path = write(tmp_path / "a.jsonl", lines.encode())
    assert records(path) == [(f"a.jsonl:{n}", {"text": text}) for n, text in enumerate(strings, 1)]


def test_jsonl_may_have_a_mark_carriage_returns_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    report = ReportBuilder()
    assert records(path, report) == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:4", {"text": "b"})]
    assert report.records == 2
    assert skips(report) == []


def test_malformed_lines_are_counted_with_their_number_and_the_others_read(tmp_path):
    lines = [
        b'{"text": "a"}',
        b'{"text": "b"',
        b'["c"]',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": ' + b"1" * 5000 + b"}",
        b"\0\0",
        b'{"text": "z"}',
    ]
    report = ReportBuilder()
    found = records(write(tmp_path / "a.jsonl", b"\n".join(lines)), report)
    assert found == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:8", {"text": "z"})]
    reasons = ["malformed", "malformed", "undecodable", "malformed", "malformed", "malformed"]
    assert skips(report) == [(f"a.jsonl:{n}", reason) for n, reason in enumerate(reasons, 2)]
    assert report.records == 8


def test_jsonl_in_utf16_is_undecodable_as_a_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(NotRead, match="utf-16"):
        records(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_s30_the_first_line_is_bounded_with_a_mark_and_without(tmp_path, monkeypatch, mark):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 20)
    report = ReportBuilder()
    path = write(tmp_path / "a.jsonl", mark + b'{"text": "aaaaaaaaaaaaaaaaaaaa"}\n{"text": "b"}\n')
    assert records(path, report) == [("a.jsonl:2", {"text": "b"})]
    assert skips(report) == [("a.jsonl:1", "too_large")]
    assert records(write(tmp_path / "b.jsonl", mark)) == []


def test_s30_a_line_beyond_the_bound_is_skipped_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(30):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "b"}\n')
    report = ReportBuilder()
    tracemalloc.start()
    found = records(path, report)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:3", {"text": "b"})]
    assert skips(report) == [("a.jsonl:2", "too_large")]
    assert peak < 3 * MAX_DOCUMENT_BYTES


def test_s30_a_huge_text_is_cut_into_documents_in_bounded_memory(tmp_path):
    line = b"0123456789abcde\n"
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(30):
            file.write(line * 2**16)
    lengths, sources = [], []
    tracemalloc.start()
    for record in read_file(path, "a.txt", CorpusConfig(), ReportBuilder()):
        text = str(record.fields["text"])
        assert text.startswith("0123") and text.endswith("cde\n")
        lengths.append(len(text))
        sources.append(record.source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == 30 * 2**20
    assert sources == ["a.txt#1", "a.txt#2", "a.txt#3", "a.txt#4"]
    assert peak < 5 * MAX_DOCUMENT_BYTES


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_compressed_files_read_as_what_they_hold(tmp_path, name):
    data = "".join(f'{{"text": "grün {n}"}}\n' for n in range(1000)).encode()
    plain = records(write(tmp_path / name, data))
    half = len(data) // 2
    zipped = gzip.compress(data[:half]) + gzip.compress(data[half:])
    strip = len(name)
    for ending, content in ((".gz", zipped), (".zst", pa.compress(data, codec="zstd", asbytes=True))):
        found = records(write(tmp_path / (name + ending), content))
        assert [fields for _, fields in found] == [fields for _, fields in plain]
        assert [source[strip:].removeprefix(ending) for source, _ in found] == [s[strip:] for s, _ in plain]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_archive_gives_what_comes_before_and_then_an_error(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(texts, "PIECE_BYTES", 1000)
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(200).hex().encode() for _ in range(2000))
    data = gzip.compress(lines) if ending == ".gz" else pa.compress(lines, codec="zstd", asbytes=True)
    path = write(tmp_path / f"a.jsonl{ending}", data[: len(data) // 2])
    found = read_file(path, path.name, CorpusConfig(), ReportBuilder())
    assert next(found).source == f"a.jsonl{ending}:1"
    with pytest.raises(OSError):
        list(found)


def table() -> pa.Table:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"text": f"t{n}", "who": ["hr"] if n % 2 else None, "pixels": [1.0] * 10} for n in range(200)]
    rows.append({"text": None, "messages": chat})
    return pa.Table.from_pylist(rows, schema=pa.schema({
        "text": pa.string(), "who": pa.list_(pa.string()), "pixels": pa.list_(pa.float32()),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    }))  # fmt: skip


def write_table(path: Path, content: pa.Table, form: str) -> Path:
    if form == "parquet":
        pq.write_table(content, path, row_group_size=90)
    else:
        new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with new(str(path), content.schema) as writer:
            writer.write_table(content, max_chunksize=90)
    return path


@pytest.mark.parametrize(
    ("form", "name"),
    [("parquet", "a.parquet"), ("file", "a.feather"), ("file", "a.arrow"), ("stream", "a.arrow")],
)
def test_tables_give_a_record_per_row_of_the_wanted_columns(tmp_path, form, name):
    report = ReportBuilder()
    found = records(write_table(tmp_path / name, table(), form), report, access_field="who")
    wanted = table().select(["text", "who", "messages"]).to_pylist()
    assert found == [(f"{name}:{n}", row) for n, row in enumerate(wanted, 1)]
    assert report.records == 201


@pytest.mark.parametrize(("form", "name"), [("parquet", "a.parquet"), ("file", "a.arrow"), ("stream", "a.arrow")])
def test_a_table_without_text_names_its_columns_and_which_hold_strings(tmp_path, form, name):
    content = pa.table({"number": [1, 2], "body": ["a", "b"]})
    report = ReportBuilder()
    with pytest.raises(NotRead, match="no_text"):
        records(write_table(tmp_path / name, content, form), report)
    assert report.fields == {"number": 0, "body": 1}


def test_a_parquet_string_that_is_not_utf8_costs_only_its_row(tmp_path):
    binary = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    report = ReportBuilder()
    found = records(write_table(tmp_path / "a.parquet", pa.table({"text": strings}), "parquet"), report)
    assert found == [("a.parquet:1", {"text": "a"}), ("a.parquet:3", {"text": "c"})]
    assert skips(report) == [("a.parquet:2", "undecodable")]


def test_an_arrow_file_with_offsets_out_of_its_memory_is_refused(tmp_path):
    path = write_table(tmp_path / "a.arrow", pa.table({"text": ["abc"]}), "stream")
    offsets = b"\0\0\0\0\3\0\0\0"
    data = path.read_bytes()
    assert data.count(offsets + b"abc") == 1
    path.write_bytes(data.replace(offsets + b"abc", b"\0\0\0\0\0\0\0\x40abc"))
    with pytest.raises(NotRead, match="damaged"):
        records(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"ARROW1\0\0", b"\xff" * 100, b"hello\n" * 50])
def test_what_is_no_table_is_unreadable(tmp_path, name, data):
    with pytest.raises(NotRead) as skip:
        records(write(tmp_path / name, data))
    assert skip.value.reason == "unreadable"


@pytest.mark.parametrize("form", ["file", "stream"])
def test_any_byte_of_an_arrow_file_may_be_wrong(tmp_path, form):
    data = write_table(tmp_path / "a.arrow", pa.table({"text": ["abc", "de"]}), form).read_bytes()
    refused = 0
    for place in range(len(data)):
        path = write(tmp_path / "b.arrow", data[:place] + b"\x7f" + data[place + 1 :])
        try:
            records(path)
        except NotRead:
            refused += 1
    assert 0 < refused < len(data)


def test_a_table_compressed_once_more_asks_to_be_unpacked(tmp_path):
    with pytest.raises(NotRead, match="unpack"):
        records(write(tmp_path / "a.parquet.gz", gzip.compress(b"PAR1")))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(NotRead, match="regular"):
        records(tmp_path / "pipe.txt")


def test_files_count_once_they_are_read_to_the_end(tmp_path):
    report = ReportBuilder()
    records(write(tmp_path / "a.txt", b"a"), report)
    with pytest.raises(NotRead):
        records(write(tmp_path / "b.txt", b"\0"), report)
    assert report.files == 1


def test_wanted_fields_are_none_where_no_document_can_be():
    config = CorpusConfig(text_field="body", access_field="who", tags_field="tags")
    assert wanted_fields(["x", "tags", "body", "who"], config) == ["tags", "body", "who"]
    assert wanted_fields(["who", "text", "prompt"], config) == []
    assert wanted_fields(["completion", "prompt", "text"], config) == ["completion", "prompt"]


def test_every_reader_is_found_by_its_suffix():
    assert {kind_of(f"a{suffix}")[1] for suffix in readers.READERS} == set(readers.READERS)
