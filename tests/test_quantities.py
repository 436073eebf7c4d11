"""Quantities for people: shares and gains."""

import pytest

from localmoe.quantities import interval_text, percent


def test_a_share_has_one_digit_unless_it_would_show_as_nothing() -> None:
    assert [percent(share) for share in (0.018, 0.5, 0.0005, 0.0004, -0.0123)] == [
        "1.8 %",
        "50.0 %",
        "0.1 %",
        "0.04 %",
        "-1.2 %",
    ]
    assert percent(0.018, signed=True) == "+1.8 %"


@pytest.mark.parametrize(
    ("gain", "low", "high", "text"),
    [
        (0.018, 0.011, 0.024, "+1.8 % [+1.1, +2.4]"),
        (-0.003, -0.007, 0.002, "-0.3 % [-0.7, +0.2]"),
        (0.001, 0.0001, 0.0021, "+0.10 % [+0.01, +0.21]"),
    ],
)
def test_an_interval_never_shows_a_bound_as_zero_that_is_not(gain: float, low: float, high: float, text: str) -> None:
    assert interval_text(gain, low, high) == text
