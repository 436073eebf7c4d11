"""Folders: which files of a folder are read, in which order, and what patterns say about them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from localmoe.bank.generations import WORK
from localmoe.bank.lock import LOCK, OWNER
from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.corpus_report import ReportBuilder

IGNORED = ("node_modules", "site-packages", "__pycache__")
"""Folders of installed or generated code; hidden files and folders are left out too (.git, .venv, .env)."""


def matches(file: str, pattern: str) -> bool:
    """Whether a pattern names a file, given by its relative path, or a folder that it is in.

    A pattern without "/" is compared with every name along the path ("*.py", "hr"), one with "/" with the
    path and the paths of its folders ("hr/2024", "src/**/*.py"). "*" and "?" also stand for "/", and "**/"
    for nothing.
    """
    pattern = pattern.removeprefix("./").strip("/")
    names = file.split("/")
    if "/" not in pattern:
        return any(fnmatchcase(name, pattern) for name in names)
    return any(_matches_path("/".join(names[:end]), pattern) for end in range(1, len(names) + 1))


def walk(root: Path, config: CorpusConfig, report: ReportBuilder) -> Iterator[tuple[Path, str]]:
    """(path, path relative to `root`) of every file to read: a folder's files by name, then its folders.

    Links to files are followed, links to folders are not, so that no loop of links is walked; banks, finished or
    not, are no corpus. What is left out is counted. Raises CorpusError if `root` itself cannot be read.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise CorpusError(
                    f"cannot read the folder {root}: {error.strerror}", "check its permissions"
                ) from error
            report.skip(printable(folder), "unreadable", str(error.strerror))
            continue
        if _is_bank({entry.name for entry in entries}):
            report.skip(printable(folder), "ignored", "a bank")
            continue
        inner = []
        for entry in entries:
            file = folder + entry.name
            if entry.name.startswith(".") or entry.name in IGNORED:
                report.skip(printable(file), "ignored")
            elif entry.is_dir(follow_symlinks=False):
                inner.append(f"{file}/")
            elif entry.is_symlink() and os.path.isdir(entry.path):
                report.skip(printable(file), "ignored", "a link to a folder")
            elif _chosen(file, config):
                yield root / file, printable(file)
            else:
                report.skip(printable(file), "excluded")
        folders += reversed(inner)


def access_of(file: str, config: CorpusConfig, report: ReportBuilder) -> tuple[str, ...]:
    """The access set that corpus.access_paths gives a file: of the first pattern to match, else public."""
    found = [pattern for pattern in config.access_paths if matches(file, pattern)]
    report.matched.update(found)
    return config.access_paths[found[0]] if found else ()


def tags_of(file: str, config: CorpusConfig) -> tuple[str, ...]:
    """The tags that corpus.tags_paths gives a file: those of every pattern that matches."""
    return tuple(tag for pattern, tags in config.tags_paths.items() if matches(file, pattern) for tag in tags)


def printable(name: str) -> str:
    """A file's name as text that every encoder takes: bytes that are not UTF-8 become "\\xff"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _chosen(file: str, config: CorpusConfig) -> bool:
    included = not config.include or any(matches(file, pattern) for pattern in config.include)
    return included and not any(matches(file, pattern) for pattern in config.exclude)


def _is_bank(names: Collection[str]) -> bool:
    return LOCK in names and any(name in (OWNER, WORK) or name.startswith("manifest-") for name in names)


def _matches_path(path: str, pattern: str) -> bool:
    head, stars, tail = pattern.partition("**/")
    if not stars:
        return fnmatchcase(path, pattern)
    return _matches_path(path, head + tail) or _matches_path(path, f"{head}*/{tail}")
