"""The choice of how a mix is executed, for the prompt and for the tokens after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from localmoe.errors import UsageError

Way = Literal["dense", "stacked", "grouped"]
"""dense: merged into a second buffer; stacked: beside the weights; grouped: the same, each row with its own mix."""


@dataclass(frozen=True)
class Work:
    """What is to be done with one mix, or with a batch of mixes."""

    rows: int
    """Prompts that run together."""
    mixes: int
    """Different mixes among them."""
    experts: int
    """Different experts in all mixes, N."""
    rank: float
    """Sum of these experts' ranks, N·r."""
    prompt_tokens: int
    """Tokens of the longest prompt that are not in a KV cache yet."""
    new_tokens: int
    """Tokens that are expected to come for each row."""
    shared: bool
    """Whether all experts share one A."""
    plain: bool
    """Whether the base's weights can be merged into: in memory, floating-point, one device each."""
    held: bool
    """Whether the dense buffer holds this mix already."""


@dataclass(frozen=True)
class Choice:
    """The way for the prompt, up to the first token, and the way for the tokens after it."""

    prefill: Way
    decode: Way


Planner = Callable[[Work], Choice]
"""Chooses for work on one mix, over a base that can be merged into."""

PREFILL_TOKENS = 600
"""From this prompt length on, one merge costs less than factors beside every token of it."""
DECODE_TOKENS = 12
"""From this answer length on, one merge costs less than factors beside every new token."""


def choose(work: Work, execution: str, planner: Planner | None = None) -> Choice:
    """How to execute `work`; `execution` other than "auto" is what the caller insists on.

    planner: chooses where there is a choice, by what this machine was measured to take; without one the two lengths
    above decide.
    Raises UsageError for a way that cannot do it: dense for several mixes or for weights that cannot be merged into.
    """
    if execution != "auto":
        return _insisted(work, execution)
    if work.mixes > 1:
        return Choice("grouped", "grouped")
    if not work.plain:
        return Choice("stacked", "stacked")
    if planner is not None:
        return planner(work)
    if work.held or work.prompt_tokens >= PREFILL_TOKENS:
        return Choice("dense", "dense")
    return Choice("stacked", "dense" if work.new_tokens > DECODE_TOKENS else "stacked")


def _insisted(work: Work, execution: str) -> Choice:
    if execution == "dense" and work.mixes > 1:
        raise UsageError(
            f"{work.mixes} different mixes cannot be merged into one model",
            "choose --execution grouped or auto for a batch",
        )
    if execution == "stacked" and work.mixes > 1:
        return Choice("grouped", "grouped")
    if execution == "dense":
        return Choice("dense", "dense")
    return Choice("stacked", "stacked") if execution == "stacked" else Choice("grouped", "grouped")
