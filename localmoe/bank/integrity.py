"""Integrity of a bank's files: there, plain files, of the size and content that the manifest names."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from localmoe.bank.files import hash_of, is_lfs_pointer, size
from localmoe.bank.manifest import FileRecord, Manifest
from localmoe.errors import BankError


def file_problems(path: Path, manifest: Manifest, contents: bool = False) -> list[str]:
    """What is wrong with the files that a manifest names, one sentence each.

    Missing files, links (a bank must not reach out of its folder), wrong sizes; with `contents` wrong sha256.
    """
    folders = {"experts"} | {adapter.folder for adapter in manifest.adapters}
    problems = [f"{folder} is a link" for folder in sorted(folders) if (path / folder).is_symlink()]
    for name, record in manifest.named_files().items():
        problem = _file_problem(path / name, name, record, contents)
        if problem is not None:
            problems.append(problem)
    return problems


def damage(path: Path, problems: Sequence[str]) -> BankError:
    """One error for all that `file_problems` found."""
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    fetch = any("Git-LFS" in problem for problem in problems)
    again = "copy the whole bank again from where it came, or build it in a new folder"
    remedy = "fetch the weights: git lfs pull" if fetch else again
    return BankError(f"{path}: {'; '.join(problems[:3])}{more}", remedy)


def _file_problem(file: Path, name: str, record: FileRecord, contents: bool) -> str | None:
    try:
        status = file.lstat()
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a plain file"
    if status.st_size != record.bytes:
        if is_lfs_pointer(file):
            return f"{name} is a Git-LFS pointer, not the weights"
        return f"{name} is {size(status.st_size)}, the manifest says {size(record.bytes)}"
    if contents and hash_of(file) != record.sha256:
        return f"{name} was changed: its sha256 is not the manifest's"
    return None
