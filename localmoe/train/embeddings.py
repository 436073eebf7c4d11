"""Embeddings of a build: φ of every document, and of its first tokens, which are what a prompt will be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
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
    """φ of the first tokens of these documents (ascending rows, all of a split) [m, d] fp32, memory-mapped.

    A shard a few thousand documents, so that it resumes.
    """
    if not rows:
        return np.zeros((0, encoder.dim), dtype=np.float32)
    shards = [f"prompts-{split}-{number:05d}.npy" for number in range(math.ceil(len(rows) / _SHARD))]
    done = next((number for number, name in enumerate(shards) if not work.has(name)), len(shards))
    documents = work.chosen(rows[done * _SHARD :])
    for number, name in enumerate(shards[done:], done):
        texts = [prompt_of(document, tokenizer) for _, document in islice(documents, _SHARD)]
        work.write_array(name, encoder.encode(texts))
        watch(Event("prompts", min((number + 1) * _SHARD, len(rows)), len(rows)))
    if not work.has(f"prompts-{split}.npy"):
        work.join_arrays(f"prompts-{split}.npy", (len(rows), encoder.dim), shards)
    return work.read_array(f"prompts-{split}.npy")
