"""Prompts of a build: the first tokens of what routes a document, and what comes after them."""

from pathlib import Path

import pytest
import tiny
import torch

from localmoe.models import load_tokenizer
from localmoe.packing import Passage
from localmoe.train import prompts
from localmoe.train.documents import Document, Message
from localmoe.train.prompts import prompt_of, suffix


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PREFIX_TOKENS", 4)


def test_a_prompt_is_the_first_tokens_of_what_routes_a_document(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    text = tiny.sentence("sea", 1, 30)
    first = tokenizer.decode(tokenizer(text)["input_ids"][:4], skip_special_tokens=True)
    assert text.startswith(first.strip()) and len(first) < len(text)
    assert prompt_of(Document("a", "a.txt", text, (), (), ()), tokenizer) == first
    turns = (Message("user", text), Message("assistant", "harbour"))
    assert prompt_of(Document("a", "a.txt", "", turns, (), ()), tokenizer) == first


def test_a_document_that_begins_with_nothing_but_space_is_its_own_prompt(tiny_base: Path) -> None:
    text = "\n" * 40 + "boat"
    assert prompt_of(Document("a", "a.txt", text, (), (), ()), load_tokenizer(str(tiny_base))) == text


def test_what_follows_the_prompt_is_what_counts() -> None:
    passage = Passage(torch.arange(10), torch.ones(10, dtype=torch.bool))
    assert suffix(passage).labels.tolist() == [False] * 4 + [True] * 6
    assert suffix(suffix(passage)).predicted == suffix(passage).predicted == 6
