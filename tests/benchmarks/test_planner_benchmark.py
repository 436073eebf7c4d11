"""What the planner's benchmark computes: its settings and its regret."""

import pytest
from planner import SERIAL, always, regrets, row, settings


def test_settings_are_distinct_and_of_every_kind() -> None:
    drawn = settings(24, [16, 64])
    assert len(set(drawn)) == 24
    assert drawn == settings(24, [16, 64])
    assert sum(setting.rows == 1 for setting in drawn) == 16
    assert {setting.rank for setting in drawn} == {16, 64}
    assert all(setting.mixes in (1, setting.rows) for setting in drawn)


def test_regret_is_the_time_of_the_choice_over_the_best() -> None:
    first = row({"dense": [3.0, 1.0, 2.0], "stacked": [4.0, 4.0, 9.0]}, "stacked", {"dense": 5.0, "stacked": 4.0})
    second = row({"dense": [1.0], "stacked": [2.0]}, "dense", {"dense": 1.0, "stacked": 2.0})
    third = row({"grouped": [1.0], SERIAL: [4.0]}, "grouped", {"grouped": 1.0})
    rows = {"first": first, "second": second, "third": third}
    assert first["regret"] == 1.0
    assert regrets(rows) == pytest.approx({"mean": 1 / 3, "largest": 1.0, "of_the_sum": 0.5, "best_chosen": 2 / 3})
    assert always(rows) == pytest.approx({"dense": 0.0, "stacked": 1.0})
