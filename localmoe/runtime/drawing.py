"""Drawing: new tokens for one prompt or for several, one forward a step; rows that finish leave the work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from localmoe.config import GenerateConfig
from localmoe.models import context_length, key_value_cache, logits_processors


class Step(NamedTuple):
    """What one forward brought: the new token of every row that was at work, and which of these rows go on."""

    tokens: dict[int, int]
    """Row of the batch → its new token."""
    going: list[int]
    """The rows that go on, counted among those of `tokens`."""


@dataclass
class _Row:
    """One prompt under way."""

    place: int
    ids: Tensor
    most: int
    draws: torch.Generator | None
    process: Any
    new: list[int] = field(default_factory=list)


@torch.inference_mode()
def draw(
    model: Any, prompts: Sequence[Tensor], config: GenerateConfig, cache: Any = None, known: int = 0
) -> Iterator[Step]:
    """Tokens for every prompt [1, n], step by step: those that transformers' `generate` draws for it alone.

    Up to near-ties, that is: floating-point sums depend on shapes. Prompts are padded on the left, and positions count
    from each one's first token. Nothing runs between two steps, and all runs in the thread that asks for them: another
    one would have its own threads for the products, too many for the processor.
    cache: keys and values of the first `known` tokens, for one prompt; it grows.
    """
    rows = [_row(model, place, ids, config) for place, ids in enumerate(prompts)]
    cache, ends = key_value_cache(model) if cache is None else cache, end_tokens(model)
    takes = set(inspect.signature(model.forward).parameters)
    ids, mask = _padded(prompts, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)[:, known:]
    ids = ids[:, known:]
    while rows:
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in given.items() if name in takes}
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits[:, -1]
        for row, token in zip(rows, _drawn(rows, logits), strict=True):
            row.new.append(token)
        going = [i for i, row in enumerate(rows) if len(row.new) < row.most and row.new[-1] not in ends]
        yield Step({row.place: row.new[-1] for row in rows}, going)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            if rows:
                index = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(index)
                mask, positions = mask[index], positions[index]
        ids = torch.tensor([[row.new[-1]] for row in rows], device=model.device)


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, list) else {int(end)}


def _row(model: Any, place: int, ids: Tensor, config: GenerateConfig) -> _Row:
    most = min(config.max_new_tokens, context_length(model) - ids.shape[1])
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    draws = None
    if config.temperature > 0:
        settings = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        draws = torch.Generator(model.device)
        draws.manual_seed(config.seed)
    process = logits_processors(model, ids.shape[1], max_new_tokens=most, **settings)
    return _Row(place, ids, most, draws, process)


def _drawn(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """The next token of every row, from logits [rows, V]; where all take the likeliest, a GPU is waited for once."""
    if all(row.draws is None and len(row.process) == 0 for row in rows):
        found: list[int] = logits.float().argmax(dim=-1).tolist()
        return found
    return [_drawn_alone(row, scores[None]) for row, scores in zip(rows, logits, strict=True)]


def _drawn_alone(row: _Row, scores: Tensor) -> int:
    """The next token of a row, from its logits [1, V]."""
    scores = scores.float()
    if len(row.process) > 0:
        written = torch.tensor([row.new], dtype=row.ids.dtype, device=row.ids.device)
        scores = row.process(torch.cat([row.ids, written], dim=1), scores)
    if row.draws is None:
        return int(scores.argmax(dim=-1))
    return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=row.draws))


def _padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest], padded on the left."""
    longest = max(ids.shape[1] for ids in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask
