"""Passages: every token once, labels on answers alone."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.documents import Document, Message
from localmoe.train.passages import tokenize

TOKENIZER = tiny.tokenizer()


def _text(text: str) -> Document:
    return Document("0" * 16, "note.txt", text)


def _chat(*turns: tuple[str, str]) -> Document:
    return Document("0" * 16, "chat.jsonl:1", "", tuple(Message(role, content) for role, content in turns))


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(2, 9))
def test_passages_laid_end_to_end_are_the_text_but_for_a_lone_last_token(text: str, length: int) -> None:
    ids = TOKENIZER(text)["input_ids"]
    found = tokenize(_text(text), TOKENIZER, CorpusConfig(passage_tokens=length))
    laid = [token for passage in found.passages for token in passage.tokens.tolist()]
    assert found.unused == (1 if len(ids) % length == 1 else 0)
    assert laid == ids[: len(ids) - found.unused]
    assert found.tokens == len(laid)
    assert all(2 <= len(passage) <= length and passage.labels.all() for passage in found.passages)


def test_the_paper_keeps_the_first_passage_and_counts_the_rest_as_unused() -> None:
    document = _text(tiny.sentence("sea", 0))
    count = len(TOKENIZER(document.text)["input_ids"])
    found = tokenize(document, TOKENIZER, CorpusConfig(passage_tokens=10, passages_per_document=1))
    assert [len(passage) for passage in found.passages] == [10]
    assert found.unused == count - 10


def test_labels_of_a_conversation_are_the_answers_with_their_end_tokens() -> None:
    """Oracle: the template written piece by piece, each piece's tokens with its own label."""
    document = _chat(
        ("system", "be brief"),
        ("user", "what is a mast?"),
        ("assistant", "a pole."),
        ("user", "why?"),
        ("assistant", "sail"),
    )
    pieces = [
        ("<system>be brief<|end|><user>what is a mast?<|end|><assistant>", False),
        ("a pole.<|end|>", True),
        ("<user>why?<|end|><assistant>", False),
        ("sail<|end|>", True),
    ]
    ids = [(token, label) for text, label in pieces for token in TOKENIZER(text)["input_ids"]]
    (passage,) = tokenize(document, TOKENIZER, CorpusConfig()).passages
    assert list(zip(passage.tokens.tolist(), passage.labels.tolist(), strict=True)) == ids


def test_passages_of_a_conversation_without_an_answer_are_left_out() -> None:
    document = _chat(("user", "star " * 30), ("assistant", "moon"))
    found = tokenize(document, TOKENIZER, CorpusConfig(passage_tokens=16))
    everything = tokenize(document, TOKENIZER, CorpusConfig())
    assert len(found.passages) < -(-everything.tokens // 16)
    assert sum(passage.predicted for passage in found.passages) >= everything.passages[0].predicted - 1
    assert found.unused == everything.tokens - found.tokens > 0


def test_without_a_template_prompt_and_completion_follow_each_other() -> None:
    bare = tiny.tokenizer()
    bare.chat_template = None
    (passage,) = tokenize(_chat(("user", "boat"), ("assistant", " sail")), bare, CorpusConfig()).passages
    assert bare.decode(passage.tokens) == "boat sail"
    assert bare.decode(passage.tokens[passage.labels]) == " sail"


def test_without_a_template_a_longer_conversation_is_an_error_that_names_it() -> None:
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(CorpusError, match=r"chat\.jsonl:1") as caught:
        tokenize(_chat(("system", "x"), ("user", "a"), ("assistant", "b")), bare, CorpusConfig())
    assert "instruction-tuned" in caught.value.remedy


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    rewriting = tiny.tokenizer()
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    document = _chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(CorpusError, match="rewrites earlier turns"):
        tokenize(document, rewriting, CorpusConfig())
