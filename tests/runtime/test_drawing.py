"""Drawing: every row gets the tokens that its prompt gets alone, from transformers' own `generate`."""

from typing import Any

import pytest
import tiny
import torch

from localmoe.config import GenerateConfig
from localmoe.runtime.drawing import draw

LENGTHS = (9, 3, 14, 5)
PROMPTS = [passage.tokens[None] for passage in tiny.passages(*LENGTHS)]


def _together(model: Any, config: GenerateConfig) -> tuple[list[list[int]], list[int]]:
    """The new tokens of every prompt, and how many rows each step had."""
    rows: list[list[int]] = [[] for _ in PROMPTS]
    sizes = []
    for step in draw(model, PROMPTS, config):
        for row, token in step.tokens.items():
            rows[row].append(token)
        sizes.append(len(step.tokens))
    return rows, sizes


def _alone(model: Any, ids: torch.Tensor, count: int, **settings: Any) -> list[int]:
    torch.manual_seed(5)
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=2, **settings
    )
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_greedy_rows_are_those_of_generate(name: str) -> None:
    model = tiny.base(name)
    rows, _ = _together(model, GenerateConfig(max_new_tokens=12))
    for ids, row in zip(PROMPTS, rows, strict=True):
        assert row == _alone(model, ids, 12, do_sample=False)


def test_drawn_rows_are_those_of_generate_with_the_same_seed() -> None:
    model = tiny.base("llama")
    rows, _ = _together(model, GenerateConfig(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=5))
    for ids, row in zip(PROMPTS, rows, strict=True):
        assert row == _alone(model, ids, 12, do_sample=True, temperature=1.5, top_p=0.9, top_k=0)


def test_rows_that_end_leave_and_the_others_go_on() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    model.generation_config.eos_token_id = None
    whole, _ = _together(model, GenerateConfig(max_new_tokens=20))
    ends = [whole[1][2], whole[3][5]]
    model.generation_config.eos_token_id = ends
    rows, sizes = _together(model, GenerateConfig(max_new_tokens=20))
    for row, before in zip(rows, whole, strict=True):
        stop = next((i + 1 for i, token in enumerate(before) if token in ends), 20)
        assert row == before[:stop]
    assert sizes == [sum(len(row) > step for row in rows) for step in range(20)][: len(sizes)]
    assert min(sizes) < 4


def test_the_bases_own_repetition_penalty_counts_for_each_row_alone() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    model.generation_config.repetition_penalty = 1.7
    rows, _ = _together(model, GenerateConfig(max_new_tokens=12))
    for ids, row in zip(PROMPTS, rows, strict=True):
        assert row == _alone(model, ids, 12, do_sample=False)


def test_a_row_ends_where_the_context_ends() -> None:
    model = tiny.base("llama")
    prompts = [torch.full((1, tiny.CONTEXT - 3), 9), torch.full((1, 4), 9)]
    steps = [list(step.tokens) for step in draw(model, prompts, GenerateConfig(max_new_tokens=8))]
    assert sum(0 in step for step in steps) <= 3
    assert len(steps) <= 8
