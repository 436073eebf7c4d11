"""Prompt routing in one bank: the encoder alone, no base model; a prompt in, its mix and nearest documents out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from localmoe.bank.store import Bank
from localmoe.config import RouteConfig
from localmoe.encoders import BASE, Encoder, encoder_mark, load_encoder, remember_encoder
from localmoe.errors import BankError, ConfigError, PromptError
from localmoe.identity import Fingerprint, recall
from localmoe.models import load_model, load_tokenizer
from localmoe.routing import ON_MEANS, WITHOUT_BETA, Centroids, Mix, beta_scores, find_beta, route

Conversation = Sequence[dict[str, str]]
"""Turns of a chat: {"role": "user", "content": "..."}."""

ENOUGH = 3
"""With fewer tune documents β is not looked for."""

_BLOCK = 65_536  # embeddings that are in memory as fp32 at a time (96 MiB at d = 384)


@dataclass(frozen=True)
class Neighbour:
    """A train document near to a prompt; `similarity` is the cosine of the embeddings."""

    id: str
    source: str
    expert: str
    similarity: float


class PromptRouter:
    """Routes prompts among the experts of one bank that may be routed to."""

    def __init__(self, bank: Bank, encoder: Encoder, config: RouteConfig) -> None:
        self.bank = bank
        self.encoder = encoder
        self.config = config
        self.centroids = routable_centroids(bank)

    def embed(self, prompt: str | Conversation) -> np.ndarray:
        """φ of a prompt: [1, d] fp32. Raises PromptError for a prompt without text."""
        text = prompt if isinstance(prompt, str) else query_of(prompt)
        if not text.strip():
            raise PromptError("the prompt is empty", "write something for the model to go on from")
        return self.encoder.encode([text])

    def select(self, vector: np.ndarray) -> Mix:
        """The mix for an embedded prompt [1, d]."""
        return route(torch.from_numpy(vector), self.centroids, self.config)[0]

    def route(self, prompt: str | Conversation) -> Mix:
        """The mix for a prompt; raises PromptError for a prompt without text."""
        return self.select(self.embed(prompt))

    def nearest_experts(self, vector: np.ndarray, count: int) -> tuple[str, ...]:
        """The experts that score highest for an embedded prompt [1, d], the highest first, in its mix or not."""
        scores = beta_scores(torch.from_numpy(vector), self.centroids, self.config.router)[0]
        best = scores.topk(min(count, len(scores))).indices.tolist()
        return tuple(self.centroids.experts[row] for row in best)

    def nearest(self, prompt: str | Conversation, count: int = 5) -> list[Neighbour]:
        """The train documents whose embeddings are nearest to the prompt's, the nearest first."""
        return self.neighbours(self.embed(prompt), count)

    def neighbours(self, vector: np.ndarray, count: int = 5) -> list[Neighbour]:
        """The same for an embedded prompt [1, d]."""
        embeddings, table = self.bank.embeddings(), self.bank.documents()
        blocks = [embeddings[start : start + _BLOCK] for start in range(0, len(embeddings), _BLOCK)]
        similarity = np.concatenate([block.astype(np.float32) @ vector[0] for block in blocks])
        train = np.flatnonzero(table["split"].to_numpy() == "train")
        rows = train[np.argsort(-similarity[train], kind="stable")[:count]]
        return [
            Neighbour(document["id"], document["source"], document["expert"], float(similarity[row]))
            for row, document in zip(rows, table.take(rows).to_pylist(), strict=True)
        ]


def open_router(bank: str | Path, encoder: str | None = None, changes: Mapping[str, Any] | None = None) -> PromptRouter:
    """Open a bank to route in it; the base model is not needed, unless it is the encoder too.

    encoder: where it is, if not where the bank (or this machine's memory of it) says. changes: fields of RouteConfig
    that differ from the bank's (see `route_config`). Raises BankError for a damaged bank or another encoder.
    """
    opened = Bank.open(Path(bank))
    config = route_config(opened, {} if changes is None else changes)
    return PromptRouter(opened, open_encoder(opened, encoder), config)


def open_encoder(bank: Bank, encoder: str | None = None, base: tuple[Any, Any] | None = None) -> Encoder:
    """The encoder that a bank was built with; raises BankError for another one.

    base: the loaded base model and its tokenizer. The encoder "base" is made of them; without them it loads the base
    from where this machine last saw it.
    """
    record = bank.manifest.encoder
    where = encoder if encoder is not None else recall(encoder_mark(record.fingerprint))
    where = where if where is not None else record.id
    if where == BASE and base is None:
        base = _load_base(bank)
    found = load_encoder(where, prompt=record.prompt, base=base)
    if found.fingerprint != record.fingerprint:
        raise BankError(
            f"the bank was built with the encoder {record.id!r}, and {found.name!r} is another: "
            "its vectors mean nothing here",
            "give the one it was built with: --encoder NAME_OR_FOLDER",
        )
    remember_encoder(found)
    return found


def _load_base(bank: Bank) -> tuple[Any, Any]:
    record = bank.manifest.base
    where = recall(Fingerprint(record.architecture, record.weights))
    where = where if where is not None else record.id
    return load_model(where, record.revision), load_tokenizer(where, record.revision)


def route_config(bank: Bank, changes: Mapping[str, Any]) -> RouteConfig:
    """How to route in a bank: as its manifest says, but for `changes` (fields of RouteConfig).

    Without a `beta`, β is found anew, on the embeddings of the bank's public tune documents, if `active` is given or
    the router reads other scores than the bank's (`ON_MEANS`).
    Raises ConfigError for a field or value that RouteConfig refuses, or if β cannot be found.
    """
    record = bank.manifest.router
    wanted = max(1.0, record.wanted)  # a bank that was not built may not have wanted any number
    fields = {"router": record.name, "beta": record.beta, "tau": record.tau, "active": wanted}
    try:
        values = fields | {"max_experts": record.max_experts, "sift_lambda": record.sift_lambda} | dict(changes)
        config = TypeAdapter(RouteConfig).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        what = f"route.{name} = {problem['input']!r}: {problem['msg'].lower()}"
        raise ConfigError(what, "the options and their defaults: localmoe route --help") from error
    unknown = "active" in changes or (config.router in ON_MEANS) != (record.name in ON_MEANS)
    if unknown and "beta" not in changes and config.router not in WITHOUT_BETA:
        return replace(config, beta=_beta(bank, config))
    return config


def routable_centroids(bank: Bank) -> Centroids:
    """Centroids and means of the experts that routing may use, in the order of their rows."""
    records = bank.routable()
    rows = [record.row for record in records]
    vectors, means = bank.centroids()[rows], bank.means()[rows]
    return Centroids(tuple(record.id for record in records), vectors, bank.manifest.digest, means)


def query_of(conversation: Conversation) -> str:
    """What is embedded of a conversation: the last user message, then the earlier ones, the latest first."""
    turns = [turn["content"] for turn in conversation if turn["role"] == "user"]
    return "\n\n".join(turn for turn in reversed(turns) if turn.strip())


def _beta(bank: Bank, config: RouteConfig) -> float:
    table = bank.documents()
    splits, access = table["split"].to_pylist(), table["access"].to_pylist()
    rows = [row for row, split in enumerate(splits) if split == "tune" and not access[row]]
    if len(rows) < ENOUGH:
        raise ConfigError(
            f"router {config.router!r}, {config.active:g} active experts: β is found on tune documents, "
            f"and the bank has {len(rows)} public ones",
            "give β itself: --beta 0.05",
        )
    queries = torch.nn.functional.normalize(torch.from_numpy(bank.embeddings()[rows].astype(np.float32)), dim=1)
    scores = beta_scores(queries, routable_centroids(bank), config.router)
    return find_beta(scores, config.active, config.tau, config.max_experts).beta
