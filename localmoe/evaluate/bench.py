"""The bench: a bank with its held-out and tune documents, as every method of an evaluation finds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from localmoe.bank.manifest import Manifest
from localmoe.bank.store import Bank
from localmoe.config import BuildConfig, EvalConfig
from localmoe.errors import UsageError
from localmoe.evaluate.protocol import Cut, Trial, document_in
from localmoe.packing import Passage
from localmoe.registry import Registry
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine
from localmoe.train.passages import tokenize
from localmoe.train.work import Work

Watch = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and of how much."""


class NotPossibleError(UsageError):
    """A method that this bank cannot do: no trunk, no texts, one expert."""


@dataclass(frozen=True)
class Scores:
    """What a method leaves: summed suffix nll (nats) of the documents at these places, and what it took."""

    documents: tuple[int, ...]
    nll: tuple[float, ...]
    training_tokens: int
    mixes: tuple[tuple[tuple[str, ...], tuple[float, ...], bool], ...] = ()
    """Experts, weights, and whether it was a fall-back, of every document, where a router chose them."""
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Stage → seconds of every prompt that was timed."""
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bench:
    """All that a method needs; `work` keeps finished scores and `training` the baseline, so that it resumes."""

    engine: Engine
    config: EvalConfig
    cut: Cut
    trials: tuple[Trial, ...]
    tune: tuple[Trial, ...]
    work: Work
    training: Work
    watch: Watch

    @cached_property
    def embedded(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """φ of every query [n, d] fp32, embedded one by one as a server would, and the seconds of each."""
        vectors, seconds = [], []
        for trial in self.trials:
            started = time.perf_counter()
            vectors.append(self.engine.encoder.encode([trial.prefix]))
            seconds.append(time.perf_counter() - started)
        return np.concatenate(vectors), tuple(seconds)

    @property
    def queries(self) -> torch.Tensor:
        """φ of every query [n, d] fp32."""
        return torch.from_numpy(self.embedded[0])

    @cached_property
    def tune_queries(self) -> torch.Tensor:
        """φ of the tune documents' queries [m, d] fp32."""
        return torch.from_numpy(self.engine.encoder.encode([trial.prefix for trial in self.tune]))

    @cached_property
    def build_config(self) -> BuildConfig:
        """The settings that the bank was built with."""
        return self.engine.bank.manifest.settings()

    @property
    def learning_rate(self) -> float:
        """The rate that the bank's trunk was trained at (without one: its experts), be it configured or found."""
        return trained_at(self.engine.bank.manifest)

    @cached_property
    def bank_tokens(self) -> int:
        """Label tokens that trunk and experts were trained on together, those that taught both at once counted once."""
        return trained_tokens(self.engine.bank.manifest)

    @cached_property
    def public_train(self) -> tuple[list[str], np.ndarray]:
        """Ids of the public train documents, and their rows in the bank's embeddings [t]."""
        return public_train(self.engine.bank)

    def train_passages(self, documents: Sequence[str] | None = None, most: int | None = None) -> list[Passage]:
        """Passages of the train documents (or of these ids, in this order), cut as the build cut them.

        most: of each document only the first passages. Raises NotPossibleError where no document is public.
        """
        documents = self.public_train[0] if documents is None else documents
        if not documents:
            raise NotPossibleError("no train document is public, so that one adapter for all cannot be trained")
        found = []
        for name, content in zip(documents, self.engine.bank.contents(documents), strict=True):
            tokenized = tokenize(document_in(name, *content), self.engine.tokenizer, self.build_config.corpus)
            found += list(tokenized.passages[:most])
        return found


def public_train(bank: Bank) -> tuple[list[str], np.ndarray]:
    """Ids of a bank's public train documents, and their rows in its documents and embeddings [t]."""
    table = bank.documents()
    columns = zip(*(table[name].to_pylist() for name in ("id", "split", "access")), strict=True)
    kept = [(row, name) for row, (name, split, access) in enumerate(columns) if split == "train" and not access]
    return [name for _, name in kept], np.array([row for row, _ in kept], dtype=np.int64)


def trained_at(manifest: Manifest) -> float:
    """The rate that a bank's trunk was trained at; without one the highest of its experts."""
    adapters = manifest.adapters if manifest.trunk is None else (manifest.trunk,)
    rates = [one.training.learning_rate for one in adapters if one.training is not None]
    return max(rates, default=manifest.settings().train.learning_rate)  # a training that diverged had half of it


def trained_tokens(manifest: Manifest) -> int:
    """Label tokens that a bank's trunk and experts saw together, those that taught both at once counted once.

    Raises NotPossibleError for a bank of imported experts.
    """
    if any(adapter.training is None for adapter in manifest.adapters):
        raise NotPossibleError(
            "the bank holds imported experts: how many tokens they saw is not known",
            "evaluate a bank that was built here",
        )
    return known_tokens(manifest)


def known_tokens(manifest: Manifest) -> int:
    """`trained_tokens` of the adapters of which they are known: all but imported ones."""
    records = (adapter.training for adapter in manifest.adapters)
    return sum(record.tokens for record in records if record is not None and not record.with_trunk)


Method = Callable[[Bench], Scores]
"""One row of an evaluation."""

methods: Registry[Method] = Registry("method")


def plain_mixes(mixes: Sequence[Mix]) -> tuple[tuple[tuple[str, ...], tuple[float, ...], bool], ...]:
    """Mixes as `Scores` keeps them."""
    return tuple((mix.experts, mix.weights, mix.fallback is not None) for mix in mixes)
