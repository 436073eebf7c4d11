"""The work folder: what an unfinished build has done so far; every file in it is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.bank.files import write_rows
from localmoe.packing import Passage
from localmoe.train.documents import Document, Message


class Work:
    """`<bank>/work/<key>/`: documents, passages, embeddings, clusters, and one record a finished adapter.

    The key is a hash of all that decides the result, so that what lies here is never of another build.
    """

    def __init__(self, bank: Path, key: str) -> None:
        self.key = key
        self.path = bank / "work" / key

    def has(self, name: str) -> bool:
        """Whether this step has been finished."""
        return (self.path / name).exists()

    def read_json(self, name: str) -> Any:
        """Plain data of a finished step."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Plain data, whole or not at all."""
        self._whole(name, lambda target: target.write_text(json.dumps(value, indent=1), encoding="utf-8"))

    def write_array(self, name: str, value: np.ndarray) -> None:
        """An array, whole or not at all."""
        self._whole(name, lambda target: _write_npy(target, value.shape, value.dtype, [value]))

    def join_arrays(self, name: str, shape: tuple[int, ...], parts: Sequence[str]) -> None:
        """The fp32 arrays `parts` one below the other as one of this shape, whole or not at all."""
        arrays = (self.read_array(part) for part in parts)
        self._whole(name, lambda target: _write_npy(target, shape, np.dtype(np.float32), arrays))

    def read_array(self, name: str) -> np.ndarray:
        """An array, memory-mapped."""
        array: np.ndarray = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        return array

    def write_state(self, name: str, state: Mapping[str, Any]) -> None:
        """What a training goes on from, whole or not at all."""

        def write(target: Path) -> None:
            with target.open("wb") as file:  # a full disk is an OSError then
                torch.save(dict(state), file)

        self._whole(name, write)

    def read_state(self, name: str) -> dict[str, Any]:
        """What a training goes on from, memory-mapped."""
        state: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True, mmap=True)
        return state

    def remove(self, name: str) -> None:
        """Remove what is not needed again."""
        (self.path / name).unlink(missing_ok=True)

    def documents(self) -> Iterator[list[Document]]:
        """The documents in batches, in the order of their rows."""
        for batch in _batches(self.path / "documents.parquet"):
            yield [_document(row) for row in batch.to_pylist()]

    def chosen(self, rows: Iterable[int]) -> Iterator[tuple[int, Document]]:
        """These documents with their rows, ascending; one batch is in memory at a time."""
        for row, values in _taken(self.path / "documents.parquet", rows):
            yield row, _document(values)

    def write_passages(self, rows: Iterable[tuple[Passage, ...]]) -> None:
        """The passages of every document, in the order of their rows."""
        self._whole("passages.parquet", lambda target: write_rows(target, map(_passage_row, rows), _passage_schema()))

    def passages(self, rows: Sequence[int]) -> list[tuple[Passage, ...]]:
        """The passages of these documents (ascending rows); only they are held in memory."""
        return [_passages(values) for _, values in _taken(self.path / "passages.parquet", rows)]

    def adopt(self, name: str, file: Path) -> None:
        """Take a finished file in under `name`."""
        self.path.mkdir(parents=True, exist_ok=True)
        file.replace(self.path / name)

    def discard(self) -> None:
        """Remove this folder and those of earlier, abandoned builds."""
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _whole(self, name: str, write: Callable[[Path], Any]) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def collect(bank: Path, documents: Iterable[Document]) -> tuple[Path, str, int]:
    """Write documents as they are read; returns the file, a digest of their content and order, and their number."""
    digest, count = hashlib.sha256(), 0
    folder = bank / "work"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".documents.{os.getpid()}"

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for document in documents:
            count += 1
            digest.update(json.dumps([document.id, document.access, document.tags]).encode())
            yield {
                "id": document.id,
                "source": document.source,
                "text": document.text,
                "messages": json.dumps([[message.role, message.content] for message in document.messages]),
                "access": list(document.access),
                "tags": list(document.tags),
            }

    try:
        write_rows(file, rows(), _document_schema())
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file, digest.hexdigest(), count


def _write_npy(target: Path, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[np.ndarray]) -> None:
    """What `np.save` writes; its `tofile` and a memory map would meet a full disk with no errno, or with SIGBUS."""
    with target.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as reader:
        for group in range(reader.num_row_groups):
            yield reader.read_row_group(group)


def _taken(file: Path, rows: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """These rows of a file with their numbers, ascending; row groups without one are not read."""
    import pyarrow
    import pyarrow.parquet

    wanted, first = set(rows), 0
    with pyarrow.parquet.ParquetFile(file) as reader:
        for group in range(reader.num_row_groups):
            size = reader.metadata.row_group(group).num_rows
            here = [row for row in range(first, first + size) if row in wanted]
            if here:
                places = pyarrow.array([row - first for row in here], pyarrow.int64())
                yield from zip(here, reader.read_row_group(group).take(places).to_pylist(), strict=True)
            first += size


def _document_schema() -> Any:
    import pyarrow

    names = pyarrow.list_(pyarrow.string())
    text = pyarrow.string()
    return pyarrow.schema(
        [
            ("id", text),
            ("source", text),
            ("text", text),
            ("messages", text),
            ("access", names),
            ("tags", names),
        ]
    )


def _passage_schema() -> Any:
    import pyarrow

    return pyarrow.schema(
        [
            ("tokens", pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
            ("labels", pyarrow.list_(pyarrow.list_(pyarrow.bool_()))),
        ]
    )


def _passage_row(passages: tuple[Passage, ...]) -> dict[str, Any]:
    return {
        "tokens": [passage.tokens.tolist() for passage in passages],
        "labels": [passage.labels.tolist() for passage in passages],
    }


def _passages(row: dict[str, Any]) -> tuple[Passage, ...]:
    return tuple(
        Passage(torch.tensor(tokens), torch.tensor(labels, dtype=torch.bool))
        for tokens, labels in zip(row["tokens"], row["labels"], strict=True)
    )


def _document(row: dict[str, Any]) -> Document:
    messages = tuple(Message(role, content) for role, content in json.loads(row["messages"]))
    return Document(row["id"], row["source"], row["text"], messages, tuple(row["access"]), tuple(row["tags"]))
