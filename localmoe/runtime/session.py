"""Sessions: conversations of several turns, with one mix for all of them or a mix for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from localmoe.config import GenerateConfig
from localmoe.routing import Mix
from localmoe.runtime.answers import Stream
from localmoe.runtime.generation import Memory

if TYPE_CHECKING:
    from localmoe.runtime.engine import Engine


class Session:
    """One conversation: what was said, the mix of the last answer, and the keys and values that it left.

    Keys and values are used again only under the mix that made them, for a conversation that begins with their tokens.
    """

    def __init__(self, engine: Engine, config: GenerateConfig, sticky: bool) -> None:
        self.turns: list[dict[str, str]] = []
        self.mix: Mix | None = None
        self.sticky = sticky
        self._engine, self._config = engine, config
        self._memory = Memory()

    def begin(self, message: str) -> Stream:
        """Route and check the next message at once; the iterator that is returned generates.

        The conversation is as it was until `end`. Raises PromptError for a message that is empty or does not fit.
        """
        turns = [*self.turns, {"role": "user", "content": message}]
        mix = self.mix if self.sticky else None
        return self._engine.start(turns, self._config, mix, self._memory)

    def end(self, message: str, stream: Stream, said: str) -> None:
        """The message and what was answered to it become part of the conversation."""
        self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": said}]
        self.mix = stream.mix

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
        self.turns.clear()
        self.mix = None
        self._memory.clear()
