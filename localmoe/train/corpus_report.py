"""The account of a reading: what became documents, what did not, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "empty",
    "duplicate",
    "no_text",
    "malformed",
    "undecodable",
    "binary",
    "too_large",
    "unreadable",
    "missing_package",
    "excluded",
    "ignored",
]

MEANINGS: Mapping[Reason, str] = {
    "empty": "empty",
    "duplicate": "duplicate (same content and access set as an earlier one)",
    "no_text": "without a text field",
    "malformed": "malformed",
    "undecodable": "undecodable (neither UTF-8 nor marked as UTF-16; iconv converts)",
    "binary": "binary",
    "too_large": "too large",
    "unreadable": "unreadable",
    "missing_package": "in need of a package (pip install 'localmoe[documents]')",
    "excluded": "left out by corpus.include and corpus.exclude",
    "ignored": "ignored (hidden, installed packages, banks, links to folders)",
}

EXAMPLES = 20
"""Sources kept for each reason."""
DETAIL = 200
"""Characters kept of a detail."""
FIELDS = 50
"""Field names kept for the error that lists them."""


@dataclass(frozen=True)
class Skip:
    """One thing that gave no document."""

    source: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class CorpusReport:
    """Counts of what was read and what was not; `examples` holds the first few sources of each reason.

    `documents` counts those given out, `restricted` those of them with an access set; `characters` is their
    length. `skipped` counts files, records and documents by reason. `unmatched` are the patterns of
    corpus.access_paths that no file matched: what they were meant for may have been read as public.
    """

    files: int
    records: int
    documents: int
    restricted: int
    characters: int
    skipped: dict[Reason, int]
    examples: tuple[Skip, ...]
    unmatched: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as sentences, the most important first; control characters in names are escaped."""
        lines = [
            f"{self.documents:,} documents ({self.restricted:,} with restricted access, {self.characters:,}"
            f" characters in all) from {self._origin}"
        ]
        lines += [
            f"no file matches the access pattern {pattern!r}: was anything read as public that should not be?"
            for pattern in self.unmatched
        ]
        for reason, count in self.skipped.items():
            first = next(skip for skip in self.examples if skip.reason == reason)
            detail = f" ({_printable(first.detail)})" if first.detail else ""
            lines.append(f"{count:,} {MEANINGS[reason]}: {'e.g. ' * (count > 1)}{_printable(first.source)}{detail}")
        return lines

    @property
    def _origin(self) -> str:
        files = f"{self.files:,} file{'s' * (self.files != 1)}"
        return f"{files} and {self.records:,} records" if self.records else files

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return dataclasses.asdict(self)


class ReportBuilder:
    """Collects a CorpusReport while the corpus is read; its size does not grow with the corpus."""

    def __init__(self) -> None:
        self.files = 0
        self.records = 0
        self.documents = 0
        self.restricted = 0
        self.characters = 0
        self.matched: set[str] = set()
        self.unmatched: tuple[str, ...] = ()
        self.fields: dict[str, int] = {}
        self._skipped: Counter[Reason] = Counter()
        self._examples: list[Skip] = []

    def skip(self, source: str, reason: Reason, detail: str = "") -> None:
        """Count something that gives no document."""
        self._skipped[reason] += 1
        if self._skipped[reason] <= EXAMPLES:
            self._examples.append(Skip(source, reason, detail[:DETAIL]))

    def count(self, length: int, restricted: bool) -> None:
        """Count a document of so many characters."""
        self.documents += 1
        self.restricted += restricted
        self.characters += length

    def saw_fields(self, fields: Mapping[str, object]) -> None:
        """Remember the fields of a record without text, and the longest string that each held."""
        for name, value in fields.items():
            if name in self.fields or len(self.fields) < FIELDS:
                length = len(value) if isinstance(value, str) else 0
                self.fields[name] = max(self.fields.get(name, 0), length)

    def finish(self) -> CorpusReport:
        """The report so far."""
        order: Iterable[Reason] = MEANINGS
        return CorpusReport(
            files=self.files,
            records=self.records,
            documents=self.documents,
            restricted=self.restricted,
            characters=self.characters,
            skipped={reason: self._skipped[reason] for reason in order if self._skipped[reason]},
            examples=tuple(self._examples),
            unmatched=self.unmatched,
        )


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)
