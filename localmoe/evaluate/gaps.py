"""Gaps: which share of the way from an adapter to test-time training from it a method goes, as records and in words."""

from __future__ import annotations

from typing import Any

from localmoe.evaluate.results import Results, in_common
from localmoe.evaluate.statistics import gap_share
from localmoe.evaluate.verdicts import control_sentence, noun, rank_sentence
from localmoe.quantities import percent

NEAR, FAR = "trunk", "ttt-trunk"
GAPS = {
    "gap_from_fine_tuned": ("fine-tuned", FAR),
    "gap": (NEAR, FAR),
    "gap_to_ttt_fine_tuned": ("fine-tuned", "ttt-fine-tuned"),
}
"""Key in the shipped default's `detail` → where the way begins and ends.

A joint bank's trunk is the mean of its mixes, weaker than an adapter of its own: the way from the fine-tune is first.
"""


def closed_gap(results: Results, method: str, near: str, far: str) -> dict[str, Any]:
    """Which share of the gap from `near` to `far` a method closes, on the documents that all three were scored on.

    {"share", "interval", "documents"}, or {"share": None, "found": why} where there is no gap or no such method.
    """
    three = {name: results.method(name) for name in (method, near, far)}
    scored = [one for one in three.values() if one is not None]
    if len(scored) < len(three):
        missing = [name for name, one in three.items() if one is None]
        return {"share": None, "found": f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not scored"}
    both, (ours, start, goal) = in_common(scored)
    found = gap_share(ours, start, goal)
    if found is None:
        return {"share": None, "found": f"{far} is not shown to be better than {near} on these {len(both)} documents"}
    return {"share": found.share, "interval": [found.low, found.high], "documents": found.documents}


def out_of_reach(results: Results) -> str | None:
    """That not only the shipped default loses to the fine-tune but test-time training too, which experts imitate.

    None where either is not shown to lose, or one of the three is missing.
    """
    rows = [row for row in results.comparisons if row.baseline == "fine-tuned" and (row.default or row.method == FAR)]
    if len(rows) < 2 or any(row.interval[1] >= 0 for row in rows):
        return None
    row = next(row for row in rows if row.method == FAR)
    return (
        f"{FAR} loses to the fine-tune too, by {percent(-row.gain)}: here more text for one adapter is worth more than "
        "the nearest text, and experts of as many tokens have little to win"
    )


def closed_gaps(results: Results, method: str) -> dict[str, dict[str, Any]]:
    """`closed_gap` for each of `GAPS` that can be asked for."""
    return {key: closed_gap(results, method, *GAPS[key]) for key in _asked(results)}


def _asked(results: Results) -> list[str]:
    """Gaps whose end was scored, and whose beginning was, or is the trunk: then it is said that it was not."""
    scored = {method.name for method in results.methods} | {NEAR}
    return [key for key, (near, far) in GAPS.items() if near in scored and far in scored]


def gap_sentences(results: Results) -> list[str]:
    """The gaps that the shipped default closes, or why there is none; of those that can be asked for."""
    method = results.default
    if method is None:
        return []
    sentences = []
    for key in _asked(results):
        near, far = GAPS[key]
        gap = method.detail.get(key)
        if gap is None:  # an evaluation that was interrupted
            gap = closed_gap(results, method.name, near, far)
        if gap["share"] is None:
            sentences.append(f"no share of the gap from {near} to {far} can be told: {gap['found']}")
            continue
        on = f"on {gap['documents']:,} documents"
        also = ""
        if near == NEAR and results.method("fine-tuned") is not None:
            tuned = closed_gap(results, "fine-tuned", near, far)
            also = f" (the fine-tune: {_share(tuned)})" if tuned["share"] is not None else ""
        sentences.append(f"{noun(method)} closes {_share(gap)} of the gap from {near} to {far}, {on}{also}")
    return sentences


def _share(gap: dict[str, Any]) -> str:
    low, high = gap["interval"]
    return f"{gap['share'] * 100:.0f} % [{low * 100:.0f}, {high * 100:.0f}]"


def closing_sentences(results: Results) -> list[str]:
    """What stands below the table of an evaluation: ranks, the control, gaps that are closed, what is out of reach."""
    others = [rank_sentence(results), control_sentence(results), out_of_reach(results)]
    return gap_sentences(results) + [sentence for sentence in others if sentence is not None]
