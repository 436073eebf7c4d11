"""Prompts of a build: what a document's first tokens would ask for, and what of it comes after them."""

from __future__ import annotations

from typing import Any

import torch

from localmoe.packing import Passage
from localmoe.train.documents import Document

PREFIX_TOKENS = 50
"""A prompt is the first tokens of a document, as the evaluation will show them (specification)."""
_LONG = 16  # characters a token


def prompt_of(document: Document, tokenizer: Any) -> str:
    """The first tokens of what a document is routed by, or all of it where these are blank."""
    start = document.query[: PREFIX_TOKENS * _LONG]  # enough of a long document, nearly always
    ids = tokenizer(start, verbose=False)["input_ids"]
    if len(ids) <= 2 * PREFIX_TOKENS and len(start) < len(document.query):
        ids = tokenizer(document.query, verbose=False)["input_ids"]
    ids = ids[:PREFIX_TOKENS]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text if text.strip() else document.query


def suffix(passage: Passage) -> Passage:
    """The passage, its loss taken after the prompt alone."""
    return Passage(passage.tokens, passage.labels & (torch.arange(len(passage)) >= PREFIX_TOKENS))
