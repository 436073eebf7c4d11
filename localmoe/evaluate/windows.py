"""Windows: which gains a plot has room for, so that one method far off does not squash all others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from localmoe.evaluate.results import ComparisonRow

_FAR = 2.0  # then the others would have less than a third of the axis


@dataclass(frozen=True)
class Window:
    """The gains that a plot has room for, and the methods that lie far below or above them."""

    low: float
    high: float
    below: tuple[ComparisonRow, ...] = ()
    above: tuple[ComparisonRow, ...] = ()

    def edge(self, row: ComparisonRow) -> float | None:
        """Where a method that is outside is drawn; None for one within."""
        return self.low if row in self.below else self.high if row in self.above else None

    def caption(self, drawn: Collection[str]) -> str:
        """A sentence about those of the drawn methods that are outside, if any are."""
        names = ", ".join(row.method for row in (*self.below, *self.above) if row.method in drawn)
        return f" Far outside the picture, and so an arrow at its edge with the value: {names}." if names else ""


def window(rows: Sequence[ComparisonRow]) -> Window:
    """The gains of all methods with their intervals, without those that would squash the others.

    A method is outside if the gap between it and the others is more than `_FAR` times as wide as all of them, zero
    and their intervals included; never the shipped default, and at most half of the methods on either side.
    """
    ordered = sorted(rows, key=lambda row: row.gain)
    half = len(ordered) // 2
    cuts = [(below, above) for below in range(half + 1) for above in range(half + 1) if below + above < len(ordered)]
    below, above = max((cut for cut in cuts if _squashing(ordered, *cut)), key=sum)
    end = len(ordered) - above
    low, high = _span(ordered[below:end])
    room = 0.06 * (high - low)
    return Window(
        low - room * (1 + bool(below)), high + room * (1 + bool(above)), tuple(ordered[:below]), tuple(ordered[end:])
    )


def _squashing(ordered: Sequence[ComparisonRow], below: int, above: int) -> bool:
    """Whether so many at either end, none of them the default, are all far off the others; of none, true."""
    end = len(ordered) - above
    low, high = _span(ordered[below:end])
    gaps = [low - row.gain for row in ordered[:below]] + [row.gain - high for row in ordered[end:]]
    far = all(gap > _FAR * (high - low) for gap in gaps)
    return far and not any(row.default for row in (*ordered[:below], *ordered[end:]))


def _span(rows: Sequence[ComparisonRow]) -> tuple[float, float]:
    """Smallest and largest end of the intervals, zero included."""
    ends = [0.0, *(end for row in rows for end in (row.gain, *row.interval))]
    return min(ends), max(ends)
