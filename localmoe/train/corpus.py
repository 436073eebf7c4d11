"""The corpus: from a path or a dataset id to documents, streamed, each content once for each access set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError, did_you_mean
from localmoe.train.corpus_report import CorpusReport, ReportBuilder
from localmoe.train.documents import Document, Message, NotRead, Record, document_of, split_of
from localmoe.train.folder import access_of, printable, tags_of, walk
from localmoe.train.hub import DATASET_ID, read_dataset
from localmoe.train.readers import READERS, kind_of, read_file

__all__ = ["CorpusReport", "Document", "Message", "ReportBuilder", "read_corpus", "split_of"]

LOOKED_FOR = "text, code, JSONL, Parquet, Arrow, PDF, HTML, notebooks"


def read_corpus(source: str | Path, config: CorpusConfig, report: ReportBuilder) -> Iterator[Document]:
    """The documents of a folder, a file or a dataset id, in a fixed order and in bounded memory.

    A string that names nothing on disk is read as a dataset id, unless it looks like a path. Documents are
    partitioned by access set, then exact duplicates within a set are dropped (16 bytes are kept of each).
    `report` counts what was read and what was not; it is complete when the last document is out.

    Raises CorpusError at once if the source is missing or not readable; while reading for an access field
    that holds no names; at the end if there was no document, or if corpus.access_field is set and no record
    has it, for all would be public. Raises TemporaryError if the hub cannot be reached.
    """
    try:
        return _documents(_records(source, config, report), str(source), config, report)
    except (OSError, RuntimeError) as error:  # no permission for a folder above; no such user in ~user
        raise CorpusError(f"cannot read {str(source)!r}: {error}", "check the path and its permissions") from error


class SeenKeys:
    """The keys met so far, as 64-bit numbers: 8 bytes each, 16 while they are merged, and a constant.

    Two different keys are taken for one with probability n² / 2⁶⁵: 3·10⁻⁶ for ten million.
    """

    MERGE_AT = 2**16

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[NDArray[np.uint64]] = []  # each sorted, and shorter than the one before

    def add(self, key: str) -> bool:
        """Remember a key; whether it is new."""
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        if number in self._recent or any(_holds(run, np.uint64(number)) for run in self._runs):
            return False
        self._recent.add(number)
        if len(self._recent) == self.MERGE_AT:
            self._merge()
        return True

    def _merge(self) -> None:
        run = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._recent.clear()
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.concatenate([run, self._runs.pop()])
        run.sort()
        self._runs.append(run)


def _holds(run: NDArray[np.uint64], number: np.uint64) -> bool:
    place = run.searchsorted(number)
    return bool(place < len(run) and run[place] == number)


def _records(source: str | Path, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    if source == "":
        raise CorpusError("the path of the corpus is empty", "give a folder, a file or a dataset id")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_records(path, config, report)
    if path.exists():
        _refuse_json(path)
        name = printable(path.name)
        return _counted(read_file(path, name, config, report), name, report)
    if isinstance(source, str) and _may_be_dataset(source):
        return _counted(read_dataset(source, _missing(path), config, report), source, report)
    raise CorpusError(_missing(path), "give a folder, a file or a dataset id (owner/name:split)")


def _folder_records(root: Path, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    for path, file in walk(root, config, report):
        yield from _counted(read_file(path, file, config, report), file, report)


def _counted(records: Iterator[Record], file: str, report: ReportBuilder) -> Iterator[Record]:
    """The records of one file; what ends them too early is counted, and the other files are read."""
    try:
        yield from records
    except NotRead as skip:
        report.skip(file, skip.reason, skip.detail)
    except OSError as error:
        report.skip(file, "unreadable", error.strerror if error.strerror is not None else str(error))


def _documents(
    records: Iterable[Record], source: str, config: CorpusConfig, report: ReportBuilder
) -> Iterator[Document]:
    seen = SeenKeys()
    access_field_seen = config.access_field is None
    file = None
    for record in records:
        access_field_seen = access_field_seen or config.access_field in record.fields
        if record.file != file:
            file = record.file
            access, tags = access_of(file, config, report), tags_of(file, config)
        try:
            document = document_of(record, config, access, tags)
        except NotRead as skip:
            report.skip(record.source, skip.reason, skip.detail)
            if skip.reason == "no_text":
                report.saw_fields(record.fields)
            continue
        if seen.add(repr((document.id, document.access))):
            report.count(len(document.content), bool(document.access))
            yield document
        else:
            report.skip(record.source, "duplicate")
    report.unmatched = tuple(pattern for pattern in config.access_paths if pattern not in report.matched)
    if report.documents == 0:
        raise _no_documents(source, config, report)
    if not access_field_seen:
        raise CorpusError(
            f"no record of {source} has the field {config.access_field!r} of corpus.access_field:"
            " every document would be public",
            "correct the name, or leave corpus.access_field out if they are public",
        )


def _no_documents(source: str, config: CorpusConfig, report: ReportBuilder) -> CorpusError:
    found = report.finish()
    left_out = "; ".join(found.lines()[1:]) if found.skipped else "nothing"
    what = f"0 documents found in {source} (looked for {LOOKED_FOR}; left out: {left_out})"
    if report.fields:
        longest = max(report.fields, key=lambda name: report.fields[name])
        return CorpusError(
            f"{what}; there are records with neither {config.text_field!r} nor 'messages' nor 'prompt' and"
            f" 'completion'; their fields: {', '.join(map(repr, report.fields))}",
            f"say which field holds the text: corpus.text_field={longest}",
        )
    if "missing_package" in found.skipped:
        return CorpusError(what, "pip install 'localmoe[documents]'")
    if "excluded" in found.skipped:
        return CorpusError(what, "check the patterns of corpus.include and corpus.exclude")
    return CorpusError(what, "give a folder or a file with text in it")


def _missing(path: Path) -> str:
    """The sentence that says that a path is missing, with the nearest name in its folder."""
    try:
        names = [printable(entry.name) for entry in path.parent.iterdir()]
    except OSError:
        return f"there is no file or folder {str(path)!r}, nor the folder {str(path.parent)!r}"
    return f"there is no file or folder {str(path)!r}{did_you_mean(path.name, names)}"


def _may_be_dataset(source: str) -> bool:
    """Whether a missing path may be a dataset id, so that a mistyped path is not asked of the hub."""
    compression, suffix = kind_of(source)
    a_file = compression is not None or suffix in (*READERS, ".txt", ".md", ".json", ".csv")
    return DATASET_ID.fullmatch(source) is not None and not a_file


def _refuse_json(path: Path) -> None:
    if path.suffix.lower() == ".json":
        raise CorpusError(
            f"{path} is one JSON value; records are read from JSONL, one object per line",
            f"jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
