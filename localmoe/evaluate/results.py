"""Results of an evaluation: what was scored, by which methods, at which cost; as records and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from localmoe.config import as_dict
from localmoe.errors import UsageError

FORMAT = 1
FILE = "results.json"

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Spread:
    """Median and 95th percentile, in seconds."""

    p50: float
    p95: float


@dataclass(frozen=True, config=_STRICT)
class MethodResult:
    """One method on (some of) the documents of an evaluation; `nll` are summed nats of the suffix of each."""

    name: str
    title: str
    default: bool
    """Whether this is what the bank does as it is shipped."""
    documents: tuple[int, ...]
    """Places in `Results.documents` of those it was scored on, ascending."""
    nll: tuple[float, ...]
    perplexity: float
    """exp(Σ nll / Σ tokens) over its documents."""
    perplexity_documents: float
    """exp of the mean over documents of nll / tokens."""
    bits_per_byte: float
    training_tokens: int
    """Label tokens that were trained on, before and at test time for one prompt, to make this model."""
    active_mean: float | None
    active_max: int | None
    fallbacks: float | None
    """Share of prompts for which no expert passed the threshold."""
    seconds: dict[str, Spread]
    """What one prompt costs beside the base's own forward: embed, select, load, merge, train, ...; and `added`."""
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    """What only this method has: rates tried, mixes, ..."""


@dataclass(frozen=True, config=_STRICT)
class ComparisonRow:
    """Relative gain in perplexity of a method over a baseline on the documents that both were scored on."""

    method: str
    baseline: str
    default: bool
    gain: float
    """1 − ppl(method) / ppl(baseline); positive = better."""
    interval: tuple[float, float]
    """95 %, paired bootstrap over documents."""
    documents: int
    verdict: str
    """In words."""


@dataclass(frozen=True, config=_STRICT)
class Check:
    """One leak check: whether it passed, and what was found, as a sentence."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True, config=_STRICT)
class Results:
    """All of one evaluation."""

    format: int
    corpus: dict[str, Any]
    """Bank digest, documents by split, tokens scored, prefix lengths."""
    config: dict[str, Any]
    """Settings of the evaluation, the bank's build settings, versions, machine."""
    documents: tuple[str, ...]
    """Ids of the held-out documents, in the order in which they were scored."""
    experts: tuple[str | None, ...]
    """The expert whose centroid is nearest to each whole document."""
    tokens: tuple[int, ...]
    """Suffix tokens of each."""
    bytes: tuple[int, ...]
    """UTF-8 bytes of each suffix."""
    methods: tuple[MethodResult, ...]
    comparisons: tuple[ComparisonRow, ...]
    checks: tuple[Check, ...]
    seconds: float
    """Wall time of the whole evaluation, all its runs together."""

    @property
    def seed(self) -> int:
        """Of the bootstrap: the evaluation's own, so that its intervals are the same everywhere."""
        return int(self.config.get("eval", {}).get("seed", 0))

    @property
    def default(self) -> MethodResult | None:
        """The result of the shipped default, if it is among them."""
        return next((method for method in self.methods if method.default), None)

    def method(self, name: str) -> MethodResult | None:
        """The result of one method, if it is among them."""
        return next((method for method in self.methods if method.name == name), None)

    def comparison(self, method: str, baseline: str | None) -> ComparisonRow | None:
        """The comparison of a method with a baseline, if it was made."""
        rows = (row for row in self.comparisons if row.method == method and row.baseline == baseline)
        return next(rows, None)


def in_common(methods: Sequence[MethodResult]) -> tuple[list[int], list[list[float]]]:
    """The places of the documents that all these methods were scored on, and the summed nll of each method there."""
    scored = [dict(zip(method.documents, method.nll, strict=True)) for method in methods]
    places = sorted(set.intersection(*(set(nll) for nll in scored)))
    return places, [[nll[place] for place in places] for nll in scored]


def write_results(folder: Path, results: Results) -> Path:
    """`results.json` in a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    partial = folder / f".{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(as_dict(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_results(path: Path) -> Results:
    """The results in a file or in a folder that holds `results.json`; raises UsageError if they cannot be read."""
    file = path / FILE if path.is_dir() else path
    try:
        return TypeAdapter(Results).validate_python(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UsageError(
            f"{file} holds no results of an evaluation: {str(error).splitlines()[0]}", "make them: localmoe eval BANK"
        ) from error
