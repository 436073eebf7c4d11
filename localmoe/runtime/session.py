"""Sessions: conversations of several turns, with one mix for all of them or a mix for each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from localmoe.config import GenerateConfig
from localmoe.routing import Mix
from localmoe.runtime.answers import Stream
from localmoe.runtime.generation import Memory

if TYPE_CHECKING:
    from localmoe.runtime.engine import Engine


class Session:
    """One conversation: what was said, the mix of the last answer, and the keys and values that it left.

    Keys and values are used again only under the mix that made them, for a conversation that begins with their tokens.
    Between two turns that are routed, the experts next to those of the last mix are brought into memory: as many again.
    """

    def __init__(self, engine: Engine, config: GenerateConfig, sticky: bool) -> None:
        self.turns: list[dict[str, str]] = []
        self.mix: Mix | None = None
        self.sticky = sticky
        self._engine, self._config = engine, config
        self._memory = Memory()
        self._ahead: Future[None] | None = None

    def begin(self, message: str) -> Stream:
        """Route and check the next message at once; the iterator that is returned generates.

        The conversation is as it was until `end`. Raises PromptError for a message that is empty or does not fit.
        """
        self._stop_looking()  # what was idle is at work again
        turns = [*self.turns, {"role": "user", "content": message}]
        mix = self.mix if self.sticky else None
        return self._engine.start(turns, self._config, mix, self._memory)

    def end(self, message: str, stream: Stream, said: str) -> None:
        """The message and what was answered to it become part of the conversation."""
        self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": said}]
        self.mix = stream.mix
        self._ahead = None if self.sticky or stream.vector is None else self._look_ahead(stream.vector, stream.mix)

    def _stop_looking(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()

    def _look_ahead(self, vector: np.ndarray, mix: Mix) -> Future[None] | None:
        """Loads experts that the next turn may need, while nobody waits; not into a cache that they would fill."""
        if not self._engine.executor.roomy:
            return None
        near = self._engine.router.nearest_experts(vector, 2 * len(mix.experts))
        return self._engine.prefetch([expert for expert in near if expert not in mix.experts])

    def say(self, message: str) -> Iterator[str]:
        """The answer to the next message, piece by piece; an answer that is closed early stays as far as it came.

        After an error the conversation is as it was.
        """
        stream, said = self.begin(message), list[str]()
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        except GeneratorExit:
            self.end(message, stream, "".join(said))
            raise
        self.end(message, stream, "".join(said))

    def reset(self) -> None:
        """Forgets the conversation, its mix included."""
        self._stop_looking()
        self.turns.clear()
        self.mix = None
        self._memory.clear()
