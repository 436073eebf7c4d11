"""Gaps: which share of the way from the trunk to test-time training a method goes, as a record and as a sentence."""

from __future__ import annotations

from typing import Any

from localmoe.evaluate.results import Results
from localmoe.evaluate.statistics import gap_share
from localmoe.evaluate.verdicts import noun
from localmoe.quantities import percent

NEAR, FAR = "trunk", "ttt-trunk"


def closed_gap(results: Results, method: str, near: str = NEAR, far: str = FAR) -> dict[str, Any]:
    """Which share of the gap from `near` to `far` a method closes, on the documents that all three were scored on.

    {"share", "interval", "documents"}, or {"share": None, "found": why} where there is no gap or no such method.
    """
    three = {name: results.method(name) for name in (method, near, far)}
    missing = [name for name, one in three.items() if one is None]
    if missing:
        return {"share": None, "found": f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not scored"}
    scored = [dict(zip(one.documents, one.nll, strict=True)) for one in three.values() if one is not None]
    both = sorted(scored[0].keys() & scored[1].keys() & scored[2].keys())
    ours, start, goal = ([nll[place] for place in both] for nll in scored)
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


def gap_sentence(results: Results) -> str | None:
    """The gap that the shipped default closes, or why there is none; None where it or test-time training is missing."""
    method = next((method for method in results.methods if method.default), None)
    if method is None or results.method(FAR) is None:
        return None
    gap = method.detail.get("gap")
    if gap is None:  # an evaluation that was interrupted
        gap = closed_gap(results, method.name)
    if gap["share"] is None:
        return f"no share of the gap from {NEAR} to {FAR} can be told: {gap['found']}"
    low, high = gap["interval"]
    share = f"{gap['share'] * 100:.0f} % [{low * 100:.0f}, {high * 100:.0f}]"
    return f"{noun(method)} closes {share} of the gap from {NEAR} to {FAR}, on {gap['documents']:,} documents"
