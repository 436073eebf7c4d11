"""Passages: what training sees of a document, cut to length, with a label where the loss is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.packing import Passage
from localmoe.train.documents import Document


@dataclass(frozen=True)
class Tokenized:
    """The passages of a document, and how many of its tokens are in none of them."""

    passages: tuple[Passage, ...]
    unused: int

    @property
    def tokens(self) -> int:
        """Tokens in the passages."""
        return sum(len(passage) for passage in self.passages)


def tokenize(document: Document, tokenizer: Any, config: CorpusConfig) -> Tokenized:
    """Tokens of a document, cut into passages of at most `passage_tokens`.

    Plain text has a label everywhere. A conversation passes through the chat template and has labels on what the
    assistant says, its end token included. Passages that predict nothing are left out and counted as unused.
    Raises CorpusError for a conversation of several turns if the base has no chat template.
    """
    if document.messages:
        ids, labels = _conversation(document, tokenizer)
    else:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        labels = [True] * len(ids)
    total = len(ids)
    kept: list[Passage] = []
    for passage in _cut(ids, labels, config.passage_tokens):
        if len(kept) == config.passages_per_document:
            break
        if passage.predicted > 0:
            kept.append(passage)
    return Tokenized(tuple(kept), total - sum(len(passage) for passage in kept))


def _cut(ids: list[int], labels: list[bool], length: int) -> Iterator[Passage]:
    for start in range(0, len(ids), length):
        part = slice(start, start + length)
        yield Passage(torch.tensor(ids[part]), torch.tensor(labels[part], dtype=torch.bool))


def _conversation(document: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    turns = [{"role": message.role, "content": message.content} for message in document.messages]
    if tokenizer.chat_template is None:
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise CorpusError(
                f"{document.source} is a conversation, and the base model has no chat template",
                "choose an instruction-tuned base, or give records with `prompt` and `completion`",
            )
        text = turns[0]["content"] + turns[1]["content"]
        spans = [(len(turns[0]["content"]), len(text))]
    else:
        text, spans = _templated(document, turns, tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True, verbose=False
    )
    labels = [
        end > start and any(first <= start < last for first, last in spans) for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], labels


def _templated(document: Document, turns: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the template writes it, and the characters that the assistant says."""

    def written(count: int, prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=prompt)
        return text

    text, spans = written(len(turns), False), []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = written(index, True), written(index + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise CorpusError(
                f"{document.source}: the chat template rewrites earlier turns, so answers cannot be told from prompts",
                "split the conversation into records of one question and one answer",
            )
        spans.append((len(before), len(after)))
    return text, spans
