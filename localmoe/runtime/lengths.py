"""Lengths: how long an engine's answers were, and how long the next one is likely to be."""

from __future__ import annotations

from collections import deque

ANSWERS = 64
"""As many last answers count."""


class Lengths:
    """New tokens of the last answers, each with the limit that it had."""

    def __init__(self) -> None:
        self._answers: deque[tuple[int, int]] = deque(maxlen=ANSWERS)

    def note(self, tokens: int, limit: int) -> None:
        """One more answer, of at most `limit` tokens."""
        self._answers.append((tokens, limit))

    def expected(self, limit: int) -> int:
        """Tokens of an answer of at most `limit`: the mean of the last ones', under this limit; `limit` before any.

        The mean, since cost grows with every token. An answer that its own limit cut short would have gone on, nobody
        knows how far: it counts as `limit`.
        """
        if not self._answers:
            return limit
        lengths = [limit if tokens >= own else min(tokens, limit) for tokens, own in list(self._answers)]
        return max(1, round(sum(lengths) / len(lengths)))
