"""Encoders: text → unit vector. The one importer of sentence-transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from localmoe.errors import PromptError
from localmoe.models import Fingerprint, hub_errors, locate, quiet


class Encoder:
    """A sentence encoder φ; `fingerprint` identifies its weights, pooling and prompt."""

    def __init__(self, model: Any, name: str, prompt: str = "") -> None:
        self._model = model
        self.name = name
        self.prompt = prompt
        self.dim: int = model.get_embedding_dimension()
        self.max_tokens: int = int(model.max_seq_length)
        self.fingerprint = _fingerprint(model, prompt)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """φ(x) for every text: [n, dim] fp32, unit rows. Text beyond `max_tokens` is not read."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        vectors = self._model.encode(
            [self.prompt + text for text in texts],
            batch_size=32,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise PromptError("the encoder gave a vector that cannot be normalised", "is there any text in the input?")
        return np.ascontiguousarray(vectors / norms)


def load_encoder(name: str, revision: str | None = None, prompt: str = "") -> Encoder:
    """A sentence-transformers model: a folder, a hub id or a packaged one; `prompt` is put before every text."""
    from sentence_transformers import SentenceTransformer

    with hub_errors("encoder", name), quiet():
        model = SentenceTransformer(locate(name), revision=revision, model_kwargs={"use_safetensors": True})
        return Encoder(model, name, prompt)


def encoder_mark(fingerprint: str) -> Fingerprint:
    """The key under which this machine remembers where an encoder is (`models.remember`)."""
    return Fingerprint("encoder", fingerprint)


def _fingerprint(model: Any, prompt: str) -> str:
    digest = hashlib.sha256(f"{prompt}\0{model.max_seq_length}\0{[type(m).__name__ for m in model]}".encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
