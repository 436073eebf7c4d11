"""Embeddings of a build: φ of every document, and of its first tokens, which are what a prompt will be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localmoe.encoders import Encoder
from localmoe.train.progress import Event, Watch
from localmoe.train.prompts import prompt_of
from localmoe.train.rows import Rows
from localmoe.train.work import Work

_SHARD = 2048  # prompts


def embed_documents(work: Work, encoder: Encoder, rows: Rows, watch: Watch) -> np.ndarray:
    """φ of every document [n, d] fp32, memory-mapped, rows of zeros for those that the sample left out.

    A shard a batch of documents, so that it resumes.
    """
    used = np.array([split != "unused" for split in rows.split], dtype=bool)
    count, total = len(used), int(used.sum())
    first = 0
    shards = []
    for number, batch in enumerate(work.documents()):
        name = f"embeddings-{number:05d}.npy"
        mask = used[first : first + len(batch)]
        if not work.has(name):
            shard = np.zeros((len(batch), encoder.dim), dtype=np.float32)
            chosen = [document.query for document, wanted in zip(batch, mask, strict=True) if wanted]
            if chosen:
                shard[mask] = encoder.encode(chosen)
            work.write_array(name, shard)
        shards.append(name)
        first += len(batch)
        watch(Event("embed", int(used[:first].sum()), total))
    if not work.has("embeddings.npy"):
        work.join_arrays("embeddings.npy", (count, encoder.dim), shards)
    return work.read_array("embeddings.npy")


def embed_prompts(
    work: Work, tokenizer: Any, encoder: Encoder, rows: Sequence[int], split: str, watch: Watch
) -> np.ndarray:
    """φ of the first tokens of these documents (ascending rows, all of a split) [m, d] fp32; it resumes too."""
    parts = [np.zeros((0, encoder.dim), dtype=np.float32)]
    for first in range(0, len(rows), _SHARD):
        name = f"prompts-{split}-{first // _SHARD:05d}.npy"
        if not work.has(name):
            chosen = work.chosen(rows[first : first + _SHARD])
            work.write_array(name, encoder.encode([prompt_of(document, tokenizer) for _, document in chosen]))
        parts.append(work.read_array(name))
        watch(Event("embed", min(first + _SHARD, len(rows)), len(rows)))
    return np.concatenate(parts)
