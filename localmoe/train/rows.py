"""Rows: what the build knows of every document, one entry each, in the order in which they were read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from localmoe.config import BuildConfig
from localmoe.errors import ConfigError, CorpusError
from localmoe.packing import Passage
from localmoe.train.documents import split_of
from localmoe.train.passages import tokenize
from localmoe.train.work import Work


@dataclass(frozen=True)
class Rows:
    """Columns over all documents: tokens and unused [n] int64; split: train, tune, test, or unused (not sampled)."""

    ids: list[str]
    sources: list[str]
    access: list[tuple[str, ...]]
    tags: list[tuple[str, ...]]
    split: list[str]
    tokens: np.ndarray
    unused: np.ndarray

    def where(self, split: str, access: tuple[str, ...] | None = None) -> list[int]:
        """Ascending rows of a split, of one access set if given."""
        return [
            row
            for row, name in enumerate(self.split)
            if name == split and (access is None or self.access[row] == access)
        ]

    @property
    def train(self) -> np.ndarray:
        """[n] bool."""
        return np.array([name == "train" for name in self.split], dtype=bool)

    def counts(self) -> dict[str, Any]:
        """Documents and tokens by split, and the tokens that no passage holds."""
        tokens: Counter[str] = Counter()
        for name, count in zip(self.split, self.tokens.tolist(), strict=True):
            tokens[name] += count
        return {
            "split_documents": dict(sorted(Counter(self.split).items())),
            "split_tokens": dict(sorted(tokens.items())),
            "unused_tokens": int(self.unused.sum()),
        }


def read_rows(work: Work, tokenizer: Any, config: BuildConfig, progress: Callable[[int], None]) -> Rows:
    """Tokenize all documents into the work folder (unless that was done) and say what they are.

    Raises CorpusError if no document is left to train on, ConfigError for recipe `trunk-shared` if none is public.
    """
    if not (work.has("passages.parquet") and work.has("tokens.json")):
        counts: list[tuple[int, int]] = []

        def passages() -> Iterator[tuple[Passage, ...]]:
            for batch in work.documents():
                for document in batch:
                    tokenized = tokenize(document, tokenizer, config.corpus)
                    counts.append((tokenized.tokens, tokenized.unused))
                    yield tokenized.passages
                progress(len(counts))

        work.write_passages(passages())
        work.write_json("tokens.json", counts)
    described = [(d.id, d.source, d.access, d.tags) for batch in work.documents() for d in batch]
    ids, sources, access, tags = (list(column) for column in zip(*described, strict=True))
    counted = np.array(work.read_json("tokens.json"), dtype=np.int64).reshape(-1, 2)
    split = _splits(ids, counted[:, 0], config)
    if "train" not in split:
        raise CorpusError(
            f"none of the {len(ids)} documents is left to train on",
            "lower corpus.tune_fraction and corpus.test_fraction, raise corpus.sample_tokens, or add documents",
        )
    rows = Rows(ids, sources, access, tags, split, counted[:, 0], counted[:, 1])
    if config.train.recipe == "trunk-shared" and not rows.where("train", ()):
        raise ConfigError(
            "recipe 'trunk-shared' needs public documents, and all of them have an access set",
            "choose train.recipe=paper",
        )
    return rows


def _splits(ids: list[str], tokens: np.ndarray, config: BuildConfig) -> list[str]:
    """Splits by id; with `sample_tokens`, documents in the order of a hash until the train tokens are enough.

    Documents without a token are unused. If chance left train empty (one document, say), all is train.
    """
    split: list[str] = [split_of(document, config.seed, config.corpus) for document in ids]
    split = [name if count > 0 else "unused" for name, count in zip(split, tokens.tolist(), strict=True)]
    if "train" not in split:
        split = ["unused" if name == "unused" else "train" for name in split]
    if config.corpus.sample_tokens is None:
        return split
    left, full = config.corpus.sample_tokens, False
    for row in sorted(range(len(ids)), key=lambda row: _order(config.seed, ids[row])):
        if split[row] == "train" and not full:
            left -= int(tokens[row])
            full = left < 0
        if full:
            split[row] = "unused"
    return split


def _order(seed: int, document: str) -> bytes:
    return hashlib.blake2b(f"sample:{seed}:{document}".encode(), digest_size=8).digest()
