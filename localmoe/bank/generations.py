"""Generations of a bank: committed as a new manifest, made from an older one, pruned."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from localmoe.bank.files import (
    TEMPORARY,
    discard,
    sync_folder,
    temporary,
    write_durably,
    write_table,
    write_tensors,
    write_texts,
)
from localmoe.bank.integrity import damage, file_problems
from localmoe.bank.lock import build_lock
from localmoe.bank.manifest import (
    ID_PATTERN,
    SUFFIXES,
    FileRecord,
    Kind,
    Manifest,
    as_values,
    encode_json,
    generations,
    manifest_name,
    read_current,
    read_manifest,
)
from localmoe.bank.store import Bank
from localmoe.errors import BankError, TemporaryError

WORK = "work"

_ENTRY = re.compile(
    rf"(experts/)?{re.escape(TEMPORARY)}\w+|({'|'.join(SUFFIXES)})-[0-9a-f]{{12}}\.\w+"
    rf"|(trunk|experts/{ID_PATTERN})-[0-9a-f]{{12}}"
)


def commit(path: Path, manifest: Manifest, after: int | None = None) -> Manifest:
    """Makes `manifest` the current generation of the bank at `path` and returns it with its number.

    Its number is the next free one, whatever `manifest.generation` says; readers see the old bank or the new.
    `after`: the generation that it was made from; if another one is current by now, nothing is committed.
    Raises BankError if a file it names is missing or of another size, TemporaryError for a full disk or, with
    `after`, a bank that changed; in all cases the bank is as it was.
    """
    problems = file_problems(path, manifest)
    if problems:
        raise damage(path, problems)
    with suppress(PermissionError):  # a parent that cannot be read
        sync_folder(path.parent)
    sync_folder(path)
    while True:
        generation = max(generations(path), default=0) + 1
        if after is not None and read_current(path).generation != after:
            raise TemporaryError(f"{path} was changed by another process", "type the same command again")
        numbered = replace(manifest, generation=generation)
        if _create(path, numbered):
            return numbered


def remove(path: Path, expert_ids: Collection[str]) -> Manifest:
    """Commits a generation without these experts and their centroids, documents, embeddings and texts.

    The cluster tree, which describes them, goes too. Old generations keep everything until `collect_garbage`,
    and the trunk what it learnt. Raises UnknownNameError for an unknown id, LockedError while a build runs.
    """
    with build_lock(path):
        bank = Bank.open(path)
        gone = {bank.expert(expert_id).id for expert_id in expert_ids}
        kept = [expert for expert in bank.manifest.experts if expert.id not in gone]
        rows = [expert.row for expert in kept]
        files = dict(bank.manifest.files)
        files.pop("clusters", None)
        tensors = {"centroids": bank.centroids()[rows], "means": bank.means()[rows]}
        files["centroids"] = write_tensors(path, "centroids", tensors)
        if "documents" in files:
            files |= _without_documents(bank, gone)
        experts = tuple(replace(expert, row=row) for row, expert in enumerate(kept))
        manifest = replace(bank.manifest, experts=experts, files=files)
        return commit(path, manifest, after=bank.manifest.generation)


def collect_garbage(path: Path, unfinished: bool = False) -> list[str]:
    """Removes old generations, what only they name, and temporary files; returns the names of what is gone.

    `unfinished`: also `work/` and files that no generation names, that is, what an unfinished build has done.
    Never removes what the current generation names. Raises LockedError while a build runs.
    """
    with build_lock(path):
        current = read_current(path)
        old = {number: file for number, file in generations(path).items() if number < current.generation}
        found = set(_entries(path))
        if unfinished:
            doomed = found | {WORK}
        else:
            doomed = found & {entry for file in old.values() for entry in _named_by(file)}
            doomed |= {entry for entry in found if TEMPORARY in entry}
        removed = [entry for entry in sorted(doomed - current.entries) if (path / entry).exists()]
        for entry in removed:
            discard(path / entry)
        for file in old.values():  # last, so that a prune that was interrupted finds the same files again
            file.unlink()
        sync_folder(path)
        return removed + sorted(file.name for file in old.values())


def _create(path: Path, manifest: Manifest) -> bool:
    """Whether this manifest was created; False if its generation exists."""
    data = encode_json(as_values(manifest))
    with temporary(path, len(data)) as new:
        write_durably(new, data)
        try:
            os.link(new, path / manifest_name(manifest.generation))
        except FileExistsError:
            return False
        sync_folder(path)
    return True


def _without_documents(bank: Bank, gone: Collection[str]) -> dict[Kind, FileRecord]:
    """The documents, embeddings and texts of the others, as new files."""
    import pyarrow
    import pyarrow.compute

    documents = bank.documents()
    removed = pyarrow.compute.is_in(documents["expert"], value_set=pyarrow.array(sorted(gone), pyarrow.string()))
    kept = pyarrow.compute.invert(removed)
    left = documents.filter(kept)
    files: dict[Kind, FileRecord] = {"documents": write_table(bank.path, "documents", left)}
    if "embeddings" in bank.manifest.files:
        rows = torch.from_numpy(bank.embeddings()[kept.to_numpy()])
        files["embeddings"] = write_tensors(bank.path, "embeddings", {"embeddings": rows})
    if "texts" in bank.manifest.files:
        ids = set(left["id"].to_pylist())
        files["texts"] = write_texts(bank.path, (row for row in bank.all_texts() if row[0] in ids))
    return files


def _entries(path: Path) -> list[str]:
    """The files and folders that LocalMoE wrote: named by a hash, or temporary."""
    files = [*path.iterdir(), *(path / "experts").glob("*")]
    return [name for file in files if _ENTRY.fullmatch(name := file.relative_to(path).as_posix())]


def _named_by(file: Path) -> frozenset[str]:
    try:
        return read_manifest(file).entries
    except BankError:  # what a damaged manifest named is not known, so it stays
        return frozenset()
