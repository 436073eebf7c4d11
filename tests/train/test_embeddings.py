"""Embeddings of a build: those of prompts are the encoder's, in their order, and nothing is encoded twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from localmoe.encoders import load_encoder
from localmoe.models import load_tokenizer
from localmoe.train import embeddings
from localmoe.train.documents import Document
from localmoe.train.embeddings import embed_prompts
from localmoe.train.progress import unwatched
from localmoe.train.prompts import prompt_of
from localmoe.train.work import Work, collect


def test_prompts_are_embedded_in_their_order_and_an_interrupted_embedding_goes_on(
    tmp_path: Path, tiny_base: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_SHARD", 3)
    documents = [Document(f"{n}", f"{n}.txt", tiny.sentence("sea", n, 20), (), (), ()) for n in range(12)]
    file, _, _ = collect(tmp_path, iter(documents))
    work = Work(tmp_path, "key")
    work.adopt("documents.parquet", file)
    encoder, tokenizer, rows = load_encoder(str(tiny_encoder)), load_tokenizer(str(tiny_base)), [1, 2, 4, 5, 7, 8, 11]
    expected = np.concatenate([encoder.encode([prompt_of(documents[row], tokenizer)]) for row in rows])
    real, asked = encoder.encode, []

    def pressed(texts: Any) -> np.ndarray:
        asked.append(len(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(texts)

    monkeypatch.setattr(encoder, "encode", pressed)
    with pytest.raises(KeyboardInterrupt):
        embed_prompts(work, tokenizer, encoder, rows, "train", unwatched)
    found = embed_prompts(work, tokenizer, encoder, rows, "train", unwatched)
    assert asked == [3, 3, 3, 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert embed_prompts(work, tokenizer, encoder, [], "tune", unwatched).shape == (0, encoder.dim)
