"""Encoders: text → unit vector. The one importer of sentence-transformers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localmoe.errors import PromptError, UsageError
from localmoe.identity import Fingerprint, fingerprint, remember
from localmoe.models import context_length, hub_errors, locate, quiet

STATIC = "static"
"""Name of the packaged static encoder, a table of token vectors that are averaged."""
BASE = "base"
"""Name of the encoder that is the base model itself, its last hidden states averaged."""
BASE_TOKENS = 256
"""Of a text the base model reads so many tokens, as an encoder."""
STATIC_TOKENS = 512
"""Of a text a static encoder reads so many tokens."""

_BATCH = 32
_ROWS = 32  # rows that packed weights are laid out for; other numbers work too


class Encoder:
    """A sentence encoder φ; `fingerprint` identifies its weights, pooling and prompt.

    model: a SentenceTransformer or a PooledBase; mark: its fingerprint, if it cannot be taken from its parameters.
    """

    def __init__(self, model: Any, name: str, prompt: str = "", mark: str | None = None) -> None:
        self._model = model
        self.name = name
        self.prompt = prompt
        self.dim: int = model.get_embedding_dimension()
        self.max_tokens: int = _max_tokens(model)
        self.fingerprint = _fingerprint(model, prompt, self.max_tokens) if mark is None else mark

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """φ(x) for every text: [n, dim] fp32, unit rows. Text beyond `max_tokens` is not read."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        read = [self.prompt + text for text in texts]
        alone = len(read) == 1 and _is_plain(self._model)
        vectors = (_forward(self._model, read) if alone else _encode(self._model, read)).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise PromptError("the encoder gave a vector that cannot be normalised", "is there any text in the input?")
        return np.ascontiguousarray(vectors / norms)


class PooledBase:
    """The base model as a sentence model: the mean of the last hidden states of a text's tokens.

    It has modules of its own over the base's weights: nothing is copied, and what is merged into the base or attached
    to it does not reach it. Raises UsageError for a base whose weights are not in memory.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UsageError(
                f"the encoder {BASE!r} needs all weights of the base in memory, and some are offloaded",
                "load it without --device-map, or build with a sentence encoder",
            )
        self._decoder = _over_the_same_weights(model.base_model)
        self._tokenizer = tokenizer
        self._dim = int(model.config.get_text_config().hidden_size)
        self.max_seq_length = min(BASE_TOKENS, context_length(model))

    def get_embedding_dimension(self) -> int:
        """d, the width of the hidden states."""
        return self._dim

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Means [n, d] fp32, not normalised; zeros for a text without a token."""
        ids = [self._tokenizer(text, verbose=False)["input_ids"][: self.max_seq_length] for text in texts]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        means = np.zeros((len(ids), self._dim), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            rows = [row for row in order[start : start + _BATCH] if ids[row]]
            if rows:
                means[rows] = self._means([torch.tensor(ids[row]) for row in rows]).cpu().numpy()
        return means

    def _means(self, ids: list[Tensor]) -> Tensor:
        device = self._decoder.device
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in ids], batch_first=True).to(device)
        states = self._decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state.float()
        means: Tensor = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return means


def load_encoder(
    name: str, revision: str | None = None, prompt: str = "", base: tuple[Any, Any] | None = None
) -> Encoder:
    """A sentence-transformers model (a folder, a hub id or a packaged one), or the base model itself (`BASE`).

    prompt: put before every text; base: the loaded base model and its tokenizer, which `BASE` needs.
    Raises UsageError for `BASE` without them, and what `locate` raises.
    """
    if name == BASE:
        if base is None:
            raise UsageError(
                f"the encoder {BASE!r} is the base model itself, and no base is loaded here",
                "choose a sentence encoder, e.g. sentence-transformers/all-MiniLM-L6-v2",
            )
        return _base_encoder(*base, prompt)
    from sentence_transformers import SentenceTransformer

    with hub_errors("encoder", name), quiet():
        model = SentenceTransformer(locate(name), revision=revision, model_kwargs={"use_safetensors": True})
        if model.max_seq_length == float("inf"):
            model[0].tokenizer.enable_truncation(STATIC_TOKENS)
        encoder = Encoder(model, name, prompt)
    _pack_linears(model)
    return encoder


def encoder_mark(fingerprint: str) -> Fingerprint:
    """The key under which this machine remembers where an encoder is (`identity.remember`)."""
    return Fingerprint("encoder", fingerprint)


def remember_encoder(encoder: Encoder) -> None:
    """Note on this machine where an encoder was found; `BASE` and `STATIC` need no note."""
    if encoder.name not in (BASE, STATIC):
        remember(encoder.name, encoder_mark(encoder.fingerprint))


def _base_encoder(model: Any, tokenizer: Any, prompt: str) -> Encoder:
    pooled = PooledBase(model, tokenizer)
    mark = fingerprint(model)
    identity = f"{prompt}\0{pooled.max_seq_length}\0{BASE}\0{mark.architecture}{mark.weights}"
    return Encoder(pooled, BASE, prompt, hashlib.sha256(identity.encode()).hexdigest())


def _over_the_same_weights(module: nn.Module) -> Any:
    """Modules of their own whose parameters and buffers share the memory of the given ones."""
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in module.parameters()
    }
    shared |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, shared).eval()


def _encode(model: Any, texts: list[str]) -> np.ndarray:
    if isinstance(model, PooledBase):
        return model.encode(texts)
    vectors: np.ndarray = model.encode(texts, batch_size=_BATCH, convert_to_numpy=True, show_progress_bar=False)
    return vectors


def _is_plain(model: Any) -> bool:
    """Whether a sentence model's vectors are what its modules return, without prompts or cuts of its own."""
    return not isinstance(model, PooledBase) and model.default_prompt_name is None and model.truncate_dim is None


@torch.inference_mode()
def _forward(model: Any, texts: list[str]) -> np.ndarray:
    """What `model.encode` returns, without what it prepares for many texts on many devices."""
    features = model.preprocess(texts)
    inputs = {name: part.to(model.device) if isinstance(part, Tensor) else part for name, part in features.items()}
    vectors: np.ndarray = model(inputs)["sentence_embedding"].cpu().numpy()
    return vectors


class _PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN multiplies it, so that it is not laid out anew at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def _pack_linears(model: nn.Module) -> None:
    """Pack the fp32 linear layers of a model on an x86 CPU; the products are the same up to rounding."""
    if not torch._C._has_mkldnn or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(module, name, _PackedLinear(child))


def _max_tokens(model: Any) -> int:
    if model.max_seq_length == float("inf"):  # a table of token vectors: its tokenizer may cut
        cut = model[0].tokenizer.truncation
        return int(cut["max_length"])
    return int(model.max_seq_length)


def _fingerprint(model: Any, prompt: str, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{prompt}\0{max_tokens}\0{[type(m).__name__ for m in model]}".encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
