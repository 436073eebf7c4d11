"""Generation: tokens from a merged model, streamed as text, through transformers' own `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from localmoe.config import GenerateConfig
from localmoe.errors import PromptError
from localmoe.models import context_length, key_value_cache, text_streamer


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
        self._mix: str | None = None
        self._ids: torch.Tensor | None = None

    def open(self, model: Any, mix: str, ids: torch.Tensor) -> int:
        """How many first tokens of `ids` [1, n] are known under this mix; whatever is held beyond them is dropped."""
        held = 0 if self._ids is None or mix != self._mix else self._ids.shape[1]
        known = _common(self._ids[0], ids[0, :-1]) if held and self._ids is not None else 0
        self._mix, self._ids = mix, None  # until a generation has ended well
        try:
            if known:
                if known < held:
                    self.cache.crop(known - held)
                return known
        except ValueError:  # a sliding window that has moved on cannot be taken back
            pass
        self.cache = key_value_cache(model)
        return 0

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
) -> Iterator[str]:
    """Pieces of text as they are generated; `arrived` is called at every token. `memory` has to be open.

    Closing the iterator stops the generation at its next token. Errors of the generating thread are raised here.
    """
    streamer = text_streamer(tokenizer)
    stop = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _generate(model, ids, config, streamer, stop, arrived, memory)
        except BaseException as error:  # handed to the thread that reads
            failure.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, name="localmoe-generate", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


@torch.inference_mode()
def _generate(
    model: Any,
    ids: torch.Tensor,
    config: GenerateConfig,
    streamer: Any,
    stop: threading.Event,
    arrived: Callable[[], None] | None,
    memory: Memory | None,
) -> None:
    def stopped(_ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        if arrived is not None:
            arrived()
        return torch.full((1,), stop.is_set(), device=ids.device)

    if config.temperature > 0:
        torch.manual_seed(config.seed)
    kept = {} if memory is None else {"past_key_values": memory.cache}
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(config.max_new_tokens, context_length(model) - ids.shape[1]),
        streamer=streamer,
        stopping_criteria=[stopped],
        pad_token_id=_end_token(model),
        **sampling(config),
        **kept,
    )
    if memory is not None:
        memory.close(made)


def sampling(config: GenerateConfig) -> dict[str, Any]:
    """The settings of transformers' `generate` that say how tokens are drawn."""
    if config.temperature > 0:
        return {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _end_token(model: Any) -> int | None:
    end = model.generation_config.eos_token_id
    return int(end[0] if isinstance(end, list) else end) if end is not None else None
