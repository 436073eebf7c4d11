"""Content-addressed files: made durable under a temporary name, then renamed to one that carries the hash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from localmoe.bank.manifest import FileRecord, Kind, encode_json, file_name
from localmoe.errors import BankError, TemporaryError

Messages = Sequence[tuple[str, str]]
"""Role and content of every turn of a conversation."""
TEMPORARY = ".tmp-"

_LFS_POINTER = b"version https://git-lfs"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROWS = 1024  # rows of a row group, the unit in which a large table is read,
_CHARACTERS = 16 * 2**20  # ... or tokens; fewer rows, if they are long


def write_tensors(path: Path, kind: Kind, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes `<kind>-<hash>.safetensors` into the bank at `path`; raises BankError for non-finite tensors."""
    check_finite(tensors, kind)
    return _place(path, kind, encode_tensors(tensors))


def write_table(path: Path, kind: Kind, table: Any) -> FileRecord:
    """Writes a pyarrow Table as `<kind>-<hash>.parquet` into the bank at `path`."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return _place(path, kind, sink.getvalue().to_pybytes())


def write_texts(path: Path, texts: Iterable[tuple[str, str, Messages]]) -> FileRecord:
    """Writes ids, texts and messages (none for plain text) as `texts-<hash>.parquet` into the bank at `path`.

    One row group is in memory at a time.
    """
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "text", "messages")])
    rows = ({"id": name, "text": text, "messages": json.dumps(turns)} for name, text, turns in texts)
    with temporary(path, 0) as new:
        write_rows(new, rows, schema)
        with new.open("rb+") as stream:
            os.fsync(stream.fileno())
        record = FileRecord(hash_of(new), new.stat().st_size)
        target = path / file_name("texts", record.sha256)
        if not holds(target, record):
            os.replace(new, target)
    sync_folder(path)
    return record


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], schema: Any) -> None:
    """A Parquet file from rows, a row group at a time."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        held: list[Mapping[str, Any]] = []
        size = 0
        for row in rows:
            held.append(row)
            size += sum(_length(value) for value in row.values())
            if len(held) == _ROWS or size > _CHARACTERS:
                writer.write_table(pyarrow.Table.from_pylist(held, schema))
                held, size = [], 0
        if held:
            writer.write_table(pyarrow.Table.from_pylist(held, schema))


def _length(value: Any) -> int:
    """Characters of a text, or of all texts in a list; numbers of all lists in a list."""
    if isinstance(value, list):
        return sum(len(part) for part in value if isinstance(part, str | list))
    return len(value) if isinstance(value, str) else 0


def write_json(path: Path, kind: Kind, value: Any) -> FileRecord:
    """Writes plain nested data as `<kind>-<hash>.json` into the bank at `path`."""
    return _place(path, kind, encode_json(value))


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file; equal tensors give equal bytes."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata={"format": "pt"})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped; raises BankError for a damaged or missing one."""
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError as error:
        raise missing(file) from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if is_lfs_pointer(file):
            raise BankError(f"{file} is a Git-LFS pointer, not the weights", "fetch them: git lfs pull") from error
        raise BankError(f"{file} is not a whole safetensors file: {error}", "copy it again") from error


def missing(file: Path) -> BankError:
    """The error for a file that was there when the bank was opened."""
    return BankError(f"{file} is missing", "open the bank again: it may have a newer generation")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises BankError that names the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BankError(f"{where}: {name} is not finite", "train it again at a lower rate, or leave it out")


def record_of(data: bytes) -> FileRecord:
    """Hash and size of a file with this content."""
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def hash_of(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def holds(file: Path, record: FileRecord) -> bool:
    """Whether the file exists with exactly this content."""
    return file.is_file() and file.stat().st_size == record.bytes and hash_of(file) == record.sha256


def is_lfs_pointer(file: Path) -> bool:
    """Whether the file is what Git leaves in place of a large file that was not fetched."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def write_durably(file: Path, data: bytes) -> None:
    """Creates `file` with this content and waits until it is on the disk."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk."""
    if os.name == "nt":
        return  # Windows cannot open a folder, and journals its names itself
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary(folder: Path, need: int) -> Iterator[Path]:
    """A new name in `folder`; whatever still bears it at the end is removed.

    `need`: bytes about to be written, 0 if that is not known. Raises TemporaryError if the disk is full.
    """
    path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        needs = f"needs {size(need)}, " if need else ""
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        raise TemporaryError(
            f"the disk of {folder} is full: {needs}has {size(shutil.disk_usage(there).free)}",
            "make room and type the same command again: what is finished is kept",
        ) from error
    finally:
        discard(path)


def discard(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(count: int) -> str:
    """`"3.1 MB (3,100,000 bytes)"`."""
    return f"{count / 1e6:.1f} MB ({count:,} bytes)"


def _place(path: Path, kind: Kind, data: bytes) -> FileRecord:
    record = record_of(data)
    target = path / file_name(kind, record.sha256)
    if not holds(target, record):  # a damaged file is replaced by what its name says it holds
        with temporary(path, record.bytes) as new:
            write_durably(new, data)
            os.replace(new, target)
    sync_folder(path)
    return record
