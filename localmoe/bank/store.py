"""Bank: one opened, immutable generation, from which tensors and tables are read when they are asked for."""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.bank.files import Messages, check_finite, missing, read_tensors
from localmoe.bank.integrity import damage, file_problems
from localmoe.bank.manifest import (
    AdapterRecord,
    ExpertRecord,
    Kind,
    Manifest,
    decode_json,
    file_name,
    read_current,
)
from localmoe.bank.peft import check_values, read_adapter
from localmoe.errors import BankError, LocalMoEError, UnknownNameError, UsageError
from localmoe.lora import Adapter, LowRank

DOCUMENT_COLUMNS = ("id", "source", "split", "expert", "access", "tags", "tokens")


class Bank:
    """An opened generation of a bank; opening reads the manifest and the sizes of files, no tensor."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._rows = {expert.id: expert.row for expert in manifest.experts}
        self._trunk: Adapter | None = None
        self._trunk_lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Bank:
        """The highest valid generation of the bank at `path`, with every file that it names in full size.

        `verify`: compare the sha256 of every file too. Raises BankError naming what is missing or damaged.
        """
        while True:
            manifest = read_current(path)
            problems = file_problems(path, manifest, contents=verify)
            if not problems:
                return cls(path, manifest)
            if read_current(path).generation == manifest.generation:  # else it was pruned meanwhile
                raise damage(path, problems)

    def expert(self, expert_id: str) -> ExpertRecord:
        """The record of one expert; raises UnknownNameError that lists the nearest ids."""
        if expert_id not in self._rows:
            near = difflib.get_close_matches(expert_id, self._rows, n=5, cutoff=0)
            raise UnknownNameError(
                "expert", expert_id, self._rows, f"there are {len(self._rows)}, such as {', '.join(near)}"
            )
        return self.manifest.experts[self._rows[expert_id]]

    def routable(self) -> tuple[ExpertRecord, ...]:
        """The experts that routing may use, by row: good and unchecked ones, not harmful or failed ones."""
        return tuple(expert for expert in self.manifest.experts if expert.outcome.status in ("good", "unchecked"))

    def centroids(self) -> Tensor:
        """Unit centroids [K, d], fp32, one row per expert."""
        return self._vectors("centroids")

    def means(self) -> Tensor:
        """Means of the members' embeddings [K, d], fp32, not normalised."""
        return self._vectors("means")

    def adapter(self, expert_id: str) -> Adapter:
        """Module name → LowRank of one expert, memory-mapped.

        With recipes `joint` and `trunk-shared` every A is the trunk's tensor itself, so that `stack` merges at rank r;
        but for imported experts, which have their own.
        Raises UnknownNameError, UsageError for an expert that failed, BankError for damage or another A.
        """
        record = self.expert(expert_id)
        if record.adapter is None:
            raise UsageError(
                f"expert {expert_id!r} has no adapter: its training failed ({record.outcome.reason})",
                "leave it out, or build again",
            )
        adapter = self._read(record.adapter)
        trunk = self.trunk() if self.manifest.shared_factors else None
        if trunk is None or record.adapter.training is None:
            return adapter
        return _with_shared_factors(adapter, trunk, self.path / record.adapter.folder)

    def trunk(self) -> Adapter | None:
        """The trunk, read once and then the same tensors every time; None if the bank has none."""
        if self.manifest.trunk is None:
            return None
        with self._trunk_lock:
            if self._trunk is None:
                self._trunk = self._read(self.manifest.trunk)
            return self._trunk

    def documents(self) -> Any:
        """pyarrow Table with the columns DOCUMENT_COLUMNS; row i belongs to row i of `embeddings`."""
        file = self._file("documents")
        table = _read_table(file)
        if set(table.column_names) != set(DOCUMENT_COLUMNS):
            raise BankError(
                f"{file} has the columns {', '.join(table.column_names)}, not {', '.join(DOCUMENT_COLUMNS)}",
                "build the bank again",
            )
        return table

    def texts(self, ids: Sequence[str]) -> list[str]:
        """The texts of documents, in the order asked for; raises UnknownNameError for an unknown id."""
        if not ids:
            return []
        return [text for text, _ in self.contents(ids)]

    def contents(self, ids: Sequence[str]) -> list[tuple[str, Messages]]:
        """Text and messages (none of plain text) of documents, in the order asked for; raises as `texts` does."""
        found = {name: (text, turns) for name, text, turns in _read_texts(self._file("texts"), ids)}
        for document in ids:
            if document not in found:
                raise UnknownNameError("document", document, (), "ids are in the bank's documents table")
        return [found[document] for document in ids]

    def all_texts(self) -> Iterator[tuple[str, str, Messages]]:
        """Id, text and messages of every document; one row group is in memory at a time."""
        return _read_texts(self._file("texts"), None)

    def embeddings(self) -> NDArray[np.float16]:
        """Unit embeddings of the documents [n, d], fp16, memory-mapped."""
        file = self._file("embeddings")
        embeddings = _tensor(file, "embeddings", torch.float16, self.manifest.encoder.dim)
        array: NDArray[np.float16] = embeddings.numpy()
        return array

    def clusters(self) -> dict[str, Any]:
        """The cluster tree and the elbow curve."""
        file = self._file("clusters")
        try:
            return decode_json(file)
        except FileNotFoundError as error:
            raise missing(file) from error

    def _vectors(self, name: str) -> Tensor:
        file = self._file("centroids")
        rows = _tensor(file, name, torch.float32, self.manifest.encoder.dim)
        if len(rows) != len(self.manifest.experts):
            raise BankError(f"{file}: {len(rows)} {name} for {len(self.manifest.experts)} experts", "copy it again")
        return rows

    def _file(self, kind: Kind) -> Path:
        if kind not in self.manifest.files:
            raise UsageError(f"the bank {self.path} keeps no {kind}", f"build it again, with its {kind}")
        return self.path / file_name(kind, self.manifest.files[kind].sha256)

    def _read(self, record: AdapterRecord) -> Adapter:
        return read_adapter(self.path / record.folder)[0]


def verify(bank: Bank) -> list[str]:
    """All that is wrong with a bank, one sentence each: sizes, sha256, unreadable and non-finite contents."""
    problems = file_problems(bank.path, bank.manifest, contents=True)
    for check in _checks(bank):
        try:
            check()
        except LocalMoEError as error:
            problems.append(error.what)
    return problems


def _checks(bank: Bank) -> Iterator[Callable[[], object]]:
    yield partial(_check_centroids, bank)
    yield partial(_check_trunk, bank)
    for expert in bank.manifest.experts:
        if expert.adapter is not None:
            yield partial(_check_expert, bank, expert.id)
    if "documents" in bank.manifest.files and "embeddings" in bank.manifest.files:
        yield partial(_check_documents, bank)
    if "texts" in bank.manifest.files:
        yield partial(_check_texts, bank)
    if "clusters" in bank.manifest.files:
        yield bank.clusters


def _check_centroids(bank: Bank) -> None:
    check_finite({"centroids": bank.centroids(), "means": bank.means()}, str(bank.path))
    if bool((bank.centroids().norm(dim=1) - 1).abs().gt(1e-3).any()):
        raise BankError(f"{bank.path}: a centroid is not a unit vector")


def _check_trunk(bank: Bank) -> None:
    trunk = bank.trunk()
    if trunk is not None:
        check_values(trunk, f"{bank.path}: the trunk")


def _check_expert(bank: Bank, expert_id: str) -> None:
    check_values(bank.adapter(expert_id), f"{bank.path}: expert {expert_id}")


def _check_documents(bank: Bank) -> None:
    documents, embeddings = bank.documents(), bank.embeddings()
    check_finite({"embeddings": torch.from_numpy(embeddings)}, str(bank.path))
    if len(documents) != len(embeddings):
        raise BankError(f"{bank.path}: {len(documents)} documents, but {len(embeddings)} embeddings")


def _check_texts(bank: Bank) -> None:
    for _ in bank.all_texts():  # reading to the end is the check
        pass


def _with_shared_factors(adapter: Adapter, trunk: Adapter, folder: Path) -> Adapter:
    """The same updates over the trunk's own A; raises BankError where the stored A is another one."""
    shared = {}
    for module, update in adapter.items():
        A = trunk[module].A if module in trunk else None
        if A is None or A.dtype != update.A.dtype or not torch.equal(A, update.A):
            raise BankError(
                f"{folder}: the A of {module} is not the trunk's, as the bank's recipe promises",
                "take this expert out of the bank",
            )
        shared[module] = LowRank(A, update.B, update.c)
    return shared


def _tensor(file: Path, name: str, dtype: torch.dtype, dim: int) -> Tensor:
    tensor = read_tensors(file).get(name)
    if tensor is None or tensor.dtype != dtype or tensor.ndim != 2 or tensor.shape[1] != dim:
        found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise BankError(f"{file}: {name} is {found}, not {dtype} [n, {dim}]", "build the bank again")
    return tensor


def _read_table(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _not_whole(file, error) from error


def _read_texts(file: Path, ids: Sequence[str] | None) -> Iterator[tuple[str, str, Messages]]:
    """Id, text and messages of these documents, of all if None; a row group without one of them is not read."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    wanted = None if ids is None else pyarrow.array(ids, pyarrow.string())
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as reader:
            columns = [name for name in ("text", "messages") if name in reader.schema_arrow.names]
            for group in range(reader.num_row_groups):
                names = reader.read_row_group(group, columns=["id"])["id"]
                here = names.is_valid() if wanted is None else pyarrow.compute.is_in(names, value_set=wanted)
                rows = pyarrow.compute.indices_nonzero(here)
                if len(rows) > 0:
                    contents = reader.read_row_group(group, columns=columns).take(rows).to_pylist()
                    yield from map(_content, names.take(rows).to_pylist(), contents)
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise _not_whole(file, error) from error


def _content(name: str, row: dict[str, str]) -> tuple[str, str, Messages]:
    """A row of the file; early banks hold no column of messages."""
    return name, row["text"], [(role, content) for role, content in json.loads(row.get("messages", "[]"))]


def _not_whole(file: Path, error: Exception) -> BankError:
    return BankError(f"{file} is not a whole parquet file: {error}", "copy the bank again")
