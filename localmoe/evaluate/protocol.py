"""The protocol: a prefix chooses the mix, the loss is counted on the suffix alone, for every method alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from localmoe.bank.files import Messages
from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.lora import Adapter, attached
from localmoe.models import packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine, base_mix
from localmoe.train.documents import Document, Message
from localmoe.train.passages import tokenize

_BATCH = 8


@dataclass(frozen=True)
class Cut:
    """Where documents are cut: tokens of the query and of the prefix without loss, and of the whole at most."""

    query: int
    prefix: int
    length: int


@dataclass(frozen=True)
class Trial:
    """One held-out document: the text that chooses its mix, and its tokens with labels on the suffix.

    `suffix`: the text whose bytes are counted; `whole`: all of it, as clustering and duplicate search see it.
    """

    document: str
    prefix: str
    passage: Passage
    suffix: str = ""
    whole: str = ""
    messages: tuple[Message, ...] = ()


def query_tokens(trial: Trial, cut: Cut) -> torch.Tensor:
    """The tokens [n] that a method may read to choose experts: the first ones, and none that is scored."""
    scored = int(trial.passage.labels.int().argmax())
    return trial.passage.tokens[: min(cut.query, scored)]


def held_out(engine: Engine, prefix_tokens: int, most_tokens: int, most_documents: int | None = None) -> list[Trial]:
    """Trials from the bank's test documents, in the order of their ids (which is random).

    Documents without a token after the prefix are left out. Raises CorpusError if there are none.
    """
    return trials_of(engine, "test", Cut(prefix_tokens, prefix_tokens, most_tokens), most_documents)


def trials_of(
    engine: Engine, split: str, cut: Cut, most: int | None = None, without: frozenset[str] = frozenset()
) -> list[Trial]:
    """Trials from one split of a bank, in the order of their ids, but for those in `without`.

    Raises CorpusError if no document has a token after the prefix.
    """
    table = engine.bank.documents()
    pairs = zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True)
    ids = sorted(name for name, where in pairs if where == split and name not in without)
    trials: list[Trial] = []
    for name, content in zip(ids, engine.bank.contents(ids), strict=True):
        if len(trials) == most:
            break
        trial = trial_of(engine, document_in(name, *content), cut)
        if trial is not None:
            trials.append(trial)
    if not trials:
        raise CorpusError(
            f"no {split} document has more than {cut.prefix} tokens",
            f"build with a larger corpus.{split}_fraction, or choose a shorter prefix",
        )
    return trials


def document_in(name: str, text: str, messages: Messages) -> Document:
    """A document as a bank keeps it: a conversation where there are messages, else plain text."""
    turns = tuple(Message(role, content) for role, content in messages)
    return Document(name, name, "" if turns else text, turns)


def trial_of(engine: Engine, document: Document, cut: Cut) -> Trial | None:
    """Of a text the first tokens are the prefix; of a conversation the loss is on its answers, and users' turns route.

    None if no token would be scored.
    """
    if document.messages:
        whole = CorpusConfig(passage_tokens=cut.length, passages_per_document=1)
        passages = tokenize(document, engine.tokenizer, whole).passages
        suffix = "\n".join(turn.content for turn in document.messages if turn.role == "assistant")
        if not passages:
            return None
        return Trial(document.id, document.query, passages[0], suffix, document.content, document.messages)
    tokens = torch.tensor(engine.tokenizer(document.text, verbose=False)["input_ids"][: cut.length])
    return _cut(engine, document.id, tokens, document.text, cut) if len(tokens) > cut.prefix else None


def _cut(engine: Engine, name: str, tokens: torch.Tensor, text: str, cut: Cut) -> Trial:
    prefix = engine.tokenizer.decode(tokens[: cut.query], skip_special_tokens=True)
    suffix = engine.tokenizer.decode(tokens[cut.prefix :], skip_special_tokens=True)
    return Trial(name, prefix, Passage(tokens, torch.arange(len(tokens)) >= cut.prefix), suffix, text)


def mutated(engine: Engine, trial: Trial, cut: Cut) -> Trial:
    """The same document with its suffix backwards, cut anew: whatever it routes to may depend on the prefix alone."""
    if trial.messages:
        turns = [
            (turn.role, turn.content[::-1] if turn.role == "assistant" else turn.content) for turn in trial.messages
        ]
        return replace(trial, prefix=document_in(trial.document, "", turns).query)
    kept = max(cut.prefix, cut.query)
    tokens = torch.cat([trial.passage.tokens[:kept], trial.passage.tokens[kept:].flip(0)])
    return _cut(engine, trial.document, tokens, engine.tokenizer.decode(tokens), cut)


def score_alone(
    engine: Engine, trials: Sequence[Trial], adapter: Adapter | None, progress: Callable[[int], None]
) -> list[float]:
    """Summed nll (nats) of every suffix under the base, or under one adapter for all."""
    beside = attached(engine.model, adapter) if adapter is not None else nullcontext()
    with engine.merged(base_mix(engine.bank)), beside:
        return score_model(engine.model, trials, progress)


def score_model(model: Any, trials: Sequence[Trial], progress: Callable[[int], None]) -> list[float]:
    """Summed nll (nats) of every suffix under a model as it is."""
    totals: list[float] = []
    with packed(model):
        for start in range(0, len(trials), _BATCH):
            part = [trial.passage for trial in trials[start : start + _BATCH]]
            totals += [float(nll.double().sum()) for nll in token_nll(model, part)]
            progress(len(totals))
    return totals


def score_merged(
    engine: Engine, trials: Sequence[Trial], progress: Callable[[int], None]
) -> tuple[list[float], list[Mix]]:
    """Summed nll (nats) of every suffix under the model merged for its prefix, and the mixes."""
    totals: list[float] = []
    mixes: list[Mix] = []
    for trial in trials:
        mixes.append(engine.route(trial.prefix))
        totals.append(float(engine.token_nll(trial.passage, mixes[-1]).double().sum()))
        progress(len(totals))
    return totals, mixes
