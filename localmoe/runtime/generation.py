"""Generation: a prompt's tokens, the text that is drawn after them piece by piece, and what a conversation keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from localmoe.config import GenerateConfig
from localmoe.errors import PromptError
from localmoe.models import context_length, key_value_cache, text_streamer
from localmoe.runtime.drawing import draw


def prompt_tokens(tokenizer: Any, model: Any, prompt: str | Sequence[dict[str, str]]) -> torch.Tensor:
    """Token ids [1, n] of a text, or of a conversation through the chat template.

    Raises PromptError if there is no token, no chat template, or no room for one more token in the context.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    else:
        if tokenizer.chat_template is None:
            raise PromptError("the base model has no chat template", "give the prompt as plain text instead")
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    length, limit = ids.shape[1], context_length(model)
    if length == 0:
        raise PromptError("the prompt is empty", "write something for the model to go on from")
    if length + 1 > limit:
        raise PromptError(
            f"the prompt has {length:,} tokens, and the model's context holds {limit:,}",
            f"shorten it to at most {limit - 1:,} tokens, so that at least one can be added",
        )
    tokens: torch.Tensor = ids.to(model.device)
    return tokens


class Memory:
    """Keys and values that a generation left, with the tokens and the mix they belong to."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.known = 0
        """First tokens of the prompt that it was opened for whose keys and values it holds."""
        self._mix: str | None = None
        self._ids: torch.Tensor | None = None

    def open(self, model: Any, mix: str, ids: torch.Tensor) -> int:
        """How many first tokens of `ids` [1, n] are known under this mix; whatever is held beyond them is dropped."""
        held = 0 if self._ids is None or mix != self._mix else self._ids.shape[1]
        self.known = _common(self._ids[0], ids[0, :-1]) if held and self._ids is not None else 0
        self._mix, self._ids = mix, None  # until a generation has ended well
        if 0 < self.known < held:
            try:
                self.cache.crop(self.known - held)
            except (RuntimeError, ValueError):  # a sliding window that has moved on cannot be taken back
                self.known = 0
        if self.known == 0:
            self.cache = key_value_cache(model)
        return self.known

    def close(self, ids: torch.Tensor) -> None:
        """Notes the tokens [1, n] of which keys and values were left; the last one drawn was never read."""
        self._ids = ids[:, : self.cache.get_seq_length()].clone()

    def clear(self) -> None:
        """Forgets all."""
        self.cache = self._mix = self._ids = None


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the longest common beginning."""
    length = min(len(a), len(b))
    return int((a[:length] == b[:length]).long().cumprod(0).sum())


def stream(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    config: GenerateConfig,
    arrived: Callable[[], None] | None = None,
    memory: Memory | None = None,
    more: Callable[[], None] | None = None,
) -> Iterator[str]:
    """Pieces of text as they are generated. `memory` has to be open.

    arrived: called at every token; more: called when what was drawn has been handed out and another token will follow.
    All is computed in the thread that reads; closing the iterator stops the generation.
    """
    text, new = text_streamer(tokenizer), list[int]()
    cache, known = (None, 0) if memory is None else (memory.cache, memory.known)
    try:
        for step in draw(model, [ids], config, cache, known):
            new.append(step.tokens[0])
            if arrived is not None:
                arrived()
            text.put(torch.tensor([new[-1]]))
            yield from text.pieces()
            if more is not None and step.going:
                more()
        text.end()
        yield from text.pieces()
    except GeneratorExit:
        _note(memory, ids, new)
        raise
    _note(memory, ids, new)


def _note(memory: Memory | None, ids: torch.Tensor, new: Sequence[int]) -> None:
    if memory is not None:
        memory.close(torch.cat([ids, torch.tensor([new], dtype=ids.dtype, device=ids.device)], dim=1))
