"""Generation: pieces are the text, bounds hold, and a closed stream stops."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from localmoe.config import GenerateConfig
from localmoe.errors import PromptError
from localmoe.models import load_model, load_tokenizer
from localmoe.runtime.generation import prompt_tokens, stream


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return load_model(str(tiny_base))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def test_a_text_is_tokenized_as_the_tokenizer_does(model: Any, tokenizer: Any) -> None:
    assert prompt_tokens(tokenizer, model, "boat sail").tolist() == [tokenizer("boat sail")["input_ids"]]


def test_a_conversation_passes_through_the_template_and_asks_for_an_answer(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids[0]) == "<user>hi<|end|><assistant>"


def test_a_conversation_without_a_template_is_an_error(model: Any) -> None:
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        prompt_tokens(bare, model, [{"role": "user", "content": "hi"}])


def test_an_empty_prompt_and_one_without_room_for_a_token_are_errors(model: Any, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="empty"):
        prompt_tokens(tokenizer, model, "")
    assert prompt_tokens(tokenizer, model, "\n" * (tiny.CONTEXT - 1)).shape == (1, tiny.CONTEXT - 1)
    with pytest.raises(PromptError, match="128 tokens, and the model's context holds 128") as caught:
        prompt_tokens(tokenizer, model, "\n" * tiny.CONTEXT)
    assert "at most 127 tokens" in caught.value.remedy


def test_greedy_pieces_are_the_text_that_transformers_generates(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "boat sail")
    arrived: list[None] = []
    pieces = list(stream(model, tokenizer, ids, GenerateConfig(max_new_tokens=12), lambda: arrived.append(None)))
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(arrived) == len(expected)


def test_a_seed_decides_what_is_drawn(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "boat sail")

    def drawn(seed: int) -> str:
        config = GenerateConfig(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        return "".join(stream(model, tokenizer, ids, config))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_the_answer_ends_where_the_context_ends(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "\n" * (tiny.CONTEXT - 3))
    arrived: list[None] = []
    list(stream(model, tokenizer, ids, GenerateConfig(max_new_tokens=100), lambda: arrived.append(None)))
    assert 1 <= len(arrived) <= 3


def test_a_stream_that_is_closed_stops_the_generation(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "boat sail")
    arrived: list[None] = []
    pieces = stream(model, tokenizer, ids, GenerateConfig(max_new_tokens=110), lambda: arrived.append(None))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert 0 < len(arrived) < 110


def test_the_first_words_are_handed_out_before_more_is_prepared(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "boat sail")
    happened: list[str] = []
    config = GenerateConfig(max_new_tokens=6)
    more = lambda: happened.append("more")  # noqa: E731
    for piece in stream(model, tokenizer, ids, config, lambda: happened.append("token"), more=more):
        happened.append(piece)
    tokens, prepared = happened.count("token"), happened.count("more")
    assert happened[0] == "token" and prepared == tokens - 1
    assert all(after != "token" for before, after in itertools.pairwise(happened) if before == "token")


def test_an_error_while_a_token_is_drawn_is_raised_where_it_is_read(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, model, "boat sail")

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stream(model, tokenizer, ids, GenerateConfig(max_new_tokens=5), broken))
