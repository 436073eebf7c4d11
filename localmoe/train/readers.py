"""Readers: the records in one file, by what its name says it is, compressed or not."""

from __future__ import annotations

import codecs
import io
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from localmoe.config import CorpusConfig
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.documents import MAX_DOCUMENT_BYTES, NotRead, Record
from localmoe.train.extraction import EXTRACTORS, extract
from localmoe.train.texts import PIECE_BYTES, decoded, encoding_of, parts

Reader = Callable[[BinaryIO, str, CorpusConfig, ReportBuilder], Iterator[Record]]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS = 64
"""Rows of a table that are turned into Python objects at once."""


def read_file(path: Path, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """The records of one file, called `file` in their sources; records that cannot be read are counted.

    JSONL, Parquet, Arrow, PDF, HTML and notebooks are told by the name's ending, everything else is text.
    Raises NotRead or OSError where the file, or the rest of it, cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRead("unreadable", "not a regular file")
    compression, suffix = kind_of(file)
    with path.open("rb") as stream:
        if compression is None:
            yield from READERS.get(suffix, read_text)(stream, file, config, report)
        elif suffix in SEEKING:
            raise NotRead("unreadable", f"a {suffix} file that is compressed as a whole: unpack it first")
        else:
            with io.BufferedReader(pa.CompressedInputStream(stream, compression)) as unpacked:
                yield from READERS.get(suffix, read_text)(unpacked, file, config, report)
    report.files += 1


def kind_of(file: str) -> tuple[str | None, str]:
    """(compression, suffix) of a file's name: "a.JSONL.gz" → ("gzip", ".jsonl"), "a.py" → (None, ".py")."""
    name = PurePosixPath(file.lower())
    compression = COMPRESSIONS.get(name.suffix)
    return compression, (name if compression is None else name.with_suffix("")).suffix


def read_text(stream: BinaryIO, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """A text file as one record, or as several where it is longer than MAX_DOCUMENT_BYTES characters."""
    for mark, text in parts(decoded(stream)):
        yield Record(file, file + mark, {config.text_field: text})


def read_jsonl(stream: BinaryIO, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """One record per line that is not blank; lines end at b"\\n" alone, for U+2028 may stand in a string."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        source = f"{file}:{number}"
        if number == 1 and encoding_of(line) not in ("utf-8", "utf-8-sig"):
            raise NotRead("undecodable", f"{encoding_of(line)}, but JSONL is UTF-8")
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(PIECE_BYTES)
            report.records += 1
            report.skip(source, "too_large", f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            report.records += 1
            try:
                yield Record(file, source, _json_object(line))
            except NotRead as skip:
                report.skip(source, skip.reason, skip.detail)


def read_parquet(stream: BinaryIO, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """One record per row, read by small batches; raises NotRead for a table without a column of text."""
    try:
        with pq.ParquetFile(stream, pre_buffer=False) as table:
            columns = _columns(table.schema_arrow, config, report)
            yield from _rows(table.iter_batches(ROWS, columns=columns), file, report)
    except TABLE_ERRORS as error:
        raise NotRead("unreadable", f"not Parquet, or damaged ({type(error).__name__}: {error})") from error


def read_arrow(stream: BinaryIO, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """One record per row of an Arrow file (Feather) or an Arrow stream; raises NotRead as `read_parquet`."""
    try:
        table = _open_arrow(stream)
        columns = _columns(table.schema, config, report)
        yield from _rows((batch.select(columns) for batch in _arrow_batches(table)), file, report)
    except TABLE_ERRORS as error:
        raise NotRead("unreadable", f"not Arrow, or damaged ({type(error).__name__}: {error})") from error


def _read_extracted(stream: BinaryIO, file: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    for mark, text in parts(extract(kind_of(file)[1], stream)):
        yield Record(file, file + mark, {config.text_field: text})


READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    **dict.fromkeys(EXTRACTORS, _read_extracted),
}
SEEKING = (".parquet", ".arrow", ".feather", ".pdf")
"""Kinds that cannot be read from front to back."""
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError)
"""What a damaged table raises: one of its lengths may ask for more memory than there is."""


def _json_object(line: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotRead("undecodable", f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise NotRead("malformed", f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets a thousand deep
        raise NotRead("malformed", f"not read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotRead("malformed", f"a {type(value).__name__}, not an object")
    return value


def wanted_fields(names: Iterable[str], config: CorpusConfig) -> list[str]:
    """Those of the names that a document is made of, in their order; none if no text can be among them."""
    names = list(names)
    texts = (config.text_field in names) or ("messages" in names) or {"prompt", "completion"} <= set(names)
    wanted = (config.text_field, "messages", "prompt", "completion", config.access_field, config.tags_field)
    return [name for name in names if name in wanted] if texts else []


def _columns(schema: Any, config: CorpusConfig, report: ReportBuilder) -> list[str]:
    columns = wanted_fields(schema.names, config)
    if not columns:
        strings = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in schema.types]
        report.saw_fields({name: " " * text for name, text in zip(schema.names, strings, strict=True)})
        raise NotRead("no_text")
    return columns


def _rows(batches: Iterable[Any], file: str, report: ReportBuilder) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            for fields in _fields(batch.slice(start, ROWS)):
                number += 1
                report.records += 1
                if fields is None:
                    report.skip(f"{file}:{number}", "undecodable", "a string that is not UTF-8")
                else:
                    yield Record(file, f"{file}:{number}", fields)


def _fields(batch: Any) -> list[dict[str, object] | None]:
    """The rows of a batch as dictionaries, None for one whose strings are not UTF-8."""
    try:
        rows: list[dict[str, object] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for start in range(batch.num_rows) for row in _fields(batch.slice(start, 1))]


def _open_arrow(stream: BinaryIO) -> Any:
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)


def _arrow_batches(table: Any) -> Iterator[Any]:
    """Batches that may be touched: a damaged one has offsets that point outside its memory."""
    batches = (
        table
        if isinstance(table, pa.RecordBatchStreamReader)
        else map(table.get_batch, range(table.num_record_batches))
    )
    for batch in batches:
        batch.validate(full=True)
        yield batch
