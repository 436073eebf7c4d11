"""Answers: one generation under way, and what is known of it when it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from localmoe.config import GenerateConfig
from localmoe.routing import Mix
from localmoe.runtime.execution import Choice
from localmoe.runtime.generation import Memory, stream

if TYPE_CHECKING:
    from localmoe.runtime.engine import Engine


@dataclass(frozen=True)
class Seconds:
    """Where the time of an answer went; `merge` may lie after the first token, where that is faster.

    On a GPU `load` and `merge` end when it was asked for them: what it then takes is in `first_token` and `total`.
    """

    embed: float
    select: float
    load: float
    merge: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """A generated text, the mix that wrote it, and its cost."""

    text: str
    mix: Mix
    base_variant: bool
    """Whether the base has other weights than the bank was built for."""
    prompt_tokens: int
    new_tokens: int
    seconds: Seconds
    choice: Choice | None = None
    """How the mix was executed: for the prompt, and for the tokens after it."""


class Stream:
    """One generation under way: iterate for the pieces of text, once; then `answer` knows mix, tokens and times."""

    def __init__(
        self,
        engine: Engine,
        ids: torch.Tensor,
        config: GenerateConfig,
        mix: Mix,
        begun: float,
        embed: float,
        select: float,
        memory: Memory | None = None,
        vector: np.ndarray | None = None,
    ) -> None:
        self.mix = mix
        self.vector = vector
        """φ of the prompt [1, d], where it was routed."""
        self._memory = memory
        self._engine, self._ids, self._config, self._begun = engine, ids, config, begun
        self._seconds = Seconds(embed, select, 0.0, 0.0, 0.0, 0.0)
        self._tokens = 0
        self.choice: Choice | None = None

    def __iter__(self) -> Iterator[str]:
        engine, executor = self._engine, self._engine.executor
        with engine.turn():
            started = time.perf_counter()
            loaded = executor.load([self.mix])
            load = time.perf_counter() - started
            known = 0 if self._memory is None else self._memory.open(engine.model, executor.key(self.mix), self._ids)
            fresh = self._ids.shape[1] - known
            limit = self._config.max_new_tokens
            self.choice = executor.choose(loaded, 1, fresh, engine.lengths.expected(limit))
            try:
                with executor.running(loaded, self.choice) as running:
                    yield from self._pieces(running.decode)
            except (GeneratorExit, KeyboardInterrupt):  # whoever ends it has had enough: that is how long it was
                engine.lengths.note(self._tokens, limit)
                raise
            engine.lengths.note(self._tokens, limit)
            merge = running.merge_seconds
        self._seconds = replace(self._seconds, load=load, merge=merge, total=time.perf_counter() - self._begun)

    def _pieces(self, decode: Callable[[], None]) -> Iterator[str]:
        engine = self._engine
        return stream(engine.model, engine.tokenizer, self._ids, self._config, self._arrived, self._memory, decode)

    def answer(self, text: str) -> Answer:
        """The finished answer; `text` is the pieces together."""
        engine, prompt_tokens = self._engine, self._ids.shape[1]
        return Answer(text, self.mix, engine.base_variant, prompt_tokens, self._tokens, self._seconds, self.choice)

    def _arrived(self) -> None:
        self._tokens += 1
        if self._tokens == 1:
            self._seconds = replace(self._seconds, first_token=time.perf_counter() - self._begun)
