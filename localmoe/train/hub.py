"""Datasets of the Hugging Face hub as a corpus, streamed (extra `datasets`; the one importer of it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError, LocalMoEError, TemporaryError
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.documents import NotRead, Record
from localmoe.train.readers import wanted_fields

DATASET_ID = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?::([\w.-]+))?")
"""name, name:split or name:configuration:split; the name may be owner/name."""


def read_dataset(source: str, missing: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    """The records of one split of a dataset; `source` is "name", "name:split" or "name:configuration:split".

    `missing` is the sentence that says that no file has this name. Raises CorpusError if the `datasets`
    package, the dataset or the split is missing, or if no split is named and there are several;
    TemporaryError if the hub cannot be reached, also later, while records are read.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{missing}; to read it as a dataset of the hub, a package is missing",
            "correct the path, or: pip install 'localmoe[datasets]'",
        ) from error
    match = DATASET_ID.fullmatch(source)
    if match is None:
        raise CorpusError(f"{missing}, and it is no dataset id", "a dataset id is owner/name or owner/name:split")
    name, first, second = match.groups()
    configuration, split = (None, first) if second is None else (first, second)
    try:
        dataset = datasets.load_dataset(name, name=configuration, split=split, streaming=True)
    except Exception as error:  # whatever the network and the dataset's own files raise
        raise _explained(error, missing) from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise CorpusError(
                f"the dataset {source!r} has the splits {', '.join(dataset)}",
                f"name one: {source}:{next(iter(dataset))}",
            )
        dataset = next(iter(dataset.values()))
    return _records(dataset, source, config, report)


def _records(dataset: Any, source: str, config: CorpusConfig, report: ReportBuilder) -> Iterator[Record]:
    if dataset.column_names is not None:
        columns = wanted_fields(dataset.column_names, config)
        if not columns:
            report.saw_fields(dict.fromkeys(dataset.column_names))
            raise NotRead("no_text")
        dataset = dataset.select_columns(columns)
    number = 0
    rows = iter(dataset)
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in read_dataset
            raise _explained(error, f"the dataset {source!r} broke off after {number} records") from error
        number += 1
        report.records += 1
        yield Record(source, f"{source}:{number}", fields)


def _explained(error: Exception, what: str) -> LocalMoEError:
    """TemporaryError for trouble with the network, CorpusError for the dataset or its name."""
    network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    if network and not isinstance(error, FileNotFoundError):
        return TemporaryError(f"{what}; the hub cannot be reached: {error}", "try again, or correct the path")
    return CorpusError(f"{what}; the hub says: {error}", "correct the path or the dataset id (owner/name:split)")
