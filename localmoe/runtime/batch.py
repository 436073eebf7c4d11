"""Batches: tokens for several prompts at once, in one forward a step; rows that finish leave the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from localmoe.config import GenerateConfig
from localmoe.models import context_length, key_value_cache, logits_processors
from localmoe.runtime.generation import sampling


@dataclass
class _Row:
    """One prompt under way."""

    ids: Tensor
    most: int
    draws: torch.Generator | None
    process: Any
    new: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate_rows(
    model: Any,
    prompts: Sequence[Tensor],
    config: GenerateConfig,
    first: Callable[[], None],
    kept: Callable[[list[int]], None],
) -> list[list[int]]:
    """New tokens for every prompt [1, n]; what each gets alone, up to near-ties (floating-point sums depend on shapes).

    Prompts are padded on the left, and positions count from each one's first token. `first` is called when all rows
    have their first token; `kept` with the rows that go on, counted among those before, when others have finished.
    """
    rows = [_row(model, ids, config) for ids in prompts]
    tokens: list[list[int]] = [row.new for row in rows]
    cache, ends = key_value_cache(model), _ends(model)
    ids, mask = _padded(prompts, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    begun = False
    while rows:
        logits = _forward(model, ids, mask, positions, cache)
        for row, scores in zip(rows, logits, strict=True):
            row.new.append(_draw(row, scores[None]))
        if not begun:
            begun = True
            first()
        going = [i for i, row in enumerate(rows) if len(row.new) < row.most and row.new[-1] not in ends]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            if rows:
                index = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(index)
                mask, positions = mask[index], positions[index]
                kept(going)
        ids = torch.tensor([[row.new[-1]] for row in rows], device=model.device)
    return tokens


def _row(model: Any, ids: Tensor, config: GenerateConfig) -> _Row:
    draws = None
    if config.temperature > 0:
        draws = torch.Generator(model.device)
        draws.manual_seed(config.seed)
    most = min(config.max_new_tokens, context_length(model) - ids.shape[1])
    process = logits_processors(model, ids.shape[1], max_new_tokens=most, **sampling(config))
    return _Row(ids, most, draws, process)


def _draw(row: _Row, scores: Tensor) -> int:
    """The next token of a row, from its logits [1, V]."""
    scores = scores.float()
    if len(row.process) > 0:
        written = torch.tensor([row.new], dtype=row.ids.dtype, device=row.ids.device)
        scores = row.process(torch.cat([row.ids, written], dim=1), scores)
    if row.draws is None:
        return int(scores.argmax(dim=-1))
    return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=row.draws))


def _forward(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits of the last tokens [rows, V]."""
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    logits: Tensor = model(input_ids=ids, logits_to_keep=1, **given).logits[:, -1]
    return logits


def _padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest], padded on the left."""
    longest = max(ids.shape[1] for ids in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


def _ends(model: Any) -> set[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, list) else {int(end)}
