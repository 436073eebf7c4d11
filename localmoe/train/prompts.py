"""Prompts of a build: what a document's first tokens would ask for, and what of it comes after them."""

from __future__ import annotations

from typing import Any

import torch

from localmoe.packing import Passage
from localmoe.train.documents import Document

PREFIX_TOKENS = 50
"""A prompt is the first tokens of a document, as the evaluation will show them (specification)."""


def prompt_of(document: Document, tokenizer: Any) -> str:
    """The first tokens of what a document is routed by, or all of it where these are blank."""
    ids = tokenizer(document.query, verbose=False)["input_ids"][:PREFIX_TOKENS]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text if text.strip() else document.query


def suffix(passage: Passage) -> Passage:
    """The passage, its loss taken after the prompt alone."""
    return Passage(passage.tokens, passage.labels & (torch.arange(len(passage)) >= PREFIX_TOKENS))
