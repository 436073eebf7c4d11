"""Progress of a build, as values that a terminal, a log or a notebook may show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["read", "tokenize", "embed", "cluster", "prompts", "rates", "trunk", "experts", "route", "commit"]


@dataclass(frozen=True)
class Event:
    """`done` of `total` units of a stage (documents, tokens or experts; total 0 = unknown), and a sentence if any."""

    stage: Stage
    done: int
    total: int
    note: str = ""


Watch = Callable[[Event], None]


def unwatched(event: Event) -> None:
    """Shows nothing."""
