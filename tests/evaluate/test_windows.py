"""Windows: what a plot of gains shows, and which methods are so far off that they would squash the others."""

from __future__ import annotations

import pytest

from localmoe.evaluate.results import ComparisonRow
from localmoe.evaluate.windows import window


def _rows(gains: dict[str, float], width: float = 0.01, default: str = "merged") -> list[ComparisonRow]:
    return [
        ComparisonRow(name, "fine-tuned", name == default, gain, (gain - width, gain + width), 100, "")
        for name, gain in gains.items()
    ]


def _outside(gains: dict[str, float], width: float = 0.01) -> tuple[list[str], list[str]]:
    shown = window(_rows(gains, width))
    return [row.method for row in shown.below], [row.method for row in shown.above]


NEAR = {"merged": 0.07, "trunk": -0.02, "uniform": -0.01, "ensemble": 0.075}


def test_without_a_method_far_off_all_intervals_are_within() -> None:
    rows = _rows(NEAR)
    shown = window(rows)
    assert not shown.below and not shown.above and shown.caption(NEAR) == ""
    assert all(shown.low < row.interval[0] and row.interval[1] < shown.high for row in rows)
    assert all(shown.edge(row) is None for row in rows)


def test_one_far_off_is_at_the_edge_and_the_others_keep_the_picture() -> None:
    rows = _rows(NEAR | {"base": -1.9})
    shown = window(rows)
    assert [row.method for row in shown.below] == ["base"]
    assert shown.low == pytest.approx(-0.03 - 0.12 * 0.115) and shown.high == pytest.approx(0.085 + 0.06 * 0.115)
    assert shown.edge(rows[-1]) == shown.low
    assert shown.caption(NEAR | {"base": 0.0}).endswith("an arrow at its edge with the value: base.")
    assert shown.caption(NEAR) == ""


def test_two_far_off_do_not_hide_each_other_and_either_side_may_have_some() -> None:
    assert _outside(NEAR | {"base": -1.9, "null": -1.5}) == (["base", "null"], [])
    assert _outside(NEAR | {"base": -1.9, "ttt": 2.5}) == (["base"], ["ttt"])


def test_twice_the_width_of_the_others_is_still_within() -> None:
    width = 0.085 + 0.03
    assert _outside(NEAR | {"base": -0.03 - 1.99 * width}) == ([], [])
    assert _outside(NEAR | {"base": -0.03 - 2.01 * width}) == (["base"], [])


def test_the_default_and_the_baseline_are_never_outside() -> None:
    assert _outside({"merged": -5.0, "trunk": 0.0, "uniform": 0.01}) == ([], [])
    far = window(_rows({"merged": 0.6, "trunk": 0.61, "uniform": 0.62}))
    assert far.low < 0 < far.high
    assert _outside({"merged": 0.0, "base": -0.3}) == (["base"], [])


def test_most_methods_far_off_are_the_picture() -> None:
    assert _outside({"merged": 0.0, "a": -3.0, "b": -3.1, "c": -3.2}) == ([], [])
