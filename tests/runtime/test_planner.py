"""The planner on calibrations that are made up: what it predicts, chooses, fits and remembers."""

import random
from dataclasses import replace

import pytest
import torch

from localmoe.errors import UsageError
from localmoe.identity import home
from localmoe.runtime.execution.choice import Choice, Work
from localmoe.runtime.planner import (
    CalibratedPlanner,
    Calibration,
    Point,
    calibration_key,
    fit,
    predict,
    recall_calibration,
    remember_calibration,
)

CALIBRATION = Calibration(
    {
        "base prefill": (0.02, 0.001, 0.0, 0.0),
        "base step": (0.02, 0.001, 0.0, 0.0),
        "beside prefill": (0.025, 0.001, 0.00004, 0.000002),
        "beside step": (0.023, 0.001, 0.00003, 0.000001),
        "write": (0.03, 0.0, 0.0002, 0.0),
    }
)
WORK = Work(
    rows=1, mixes=1, experts=10, rank=160.0, prompt_tokens=20, new_tokens=32, shared=False, plain=True, held=False
)
STACKED, DENSE, BOTH = Choice("stacked", "stacked"), Choice("dense", "dense"), Choice("stacked", "dense")
GROUPED = Choice("grouped", "grouped")
plan = CalibratedPlanner(CALIBRATION).plan


def test_the_prediction_is_the_sum_of_the_phases() -> None:
    write, prefill, step = 0.03 + 160 * 0.0002, 0.02 + 20 * 0.001, 0.021
    beside = 0.025 + 20 * 0.001 + 160 * 0.00004 + 20 * 160 * 0.000002
    beside_step = 0.023 + 0.001 + 160 * 0.00003 + 160 * 0.000001
    assert predict(CALIBRATION, WORK, DENSE) == pytest.approx(write + prefill + 31 * step)
    assert predict(CALIBRATION, WORK, BOTH) == pytest.approx(beside + write + 31 * step)
    assert predict(CALIBRATION, WORK, STACKED) == pytest.approx(beside + 31 * beside_step)


def test_a_short_answer_is_stacked_and_a_long_one_merged() -> None:
    assert plan(replace(WORK, new_tokens=1)).choice == STACKED
    assert plan(replace(WORK, new_tokens=500)).choice.decode == "dense"
    assert set(plan(WORK).predicted) == {STACKED, BOTH, DENSE}


def test_a_merge_is_not_paid_for_where_nothing_comes_after_the_first_token() -> None:
    single = replace(WORK, new_tokens=1)
    assert predict(CALIBRATION, single, BOTH) == predict(CALIBRATION, single, STACKED)


def test_a_long_prompt_is_merged_at_once() -> None:
    assert plan(replace(WORK, prompt_tokens=4000)).choice == DENSE


def test_what_is_merged_already_need_not_be_written() -> None:
    held = replace(WORK, new_tokens=1, held=True)
    assert predict(CALIBRATION, held, DENSE) == pytest.approx(0.04)
    assert plan(held).choice == DENSE


def test_several_mixes_are_grouped() -> None:
    work = replace(WORK, rows=4, mixes=4, experts=20, rank=320.0)
    prefill = 0.025 + 80 * 0.001 + 320 * 0.00004 + 80 * 320 * 0.000002
    step = 0.023 + 4 * 0.001 + 320 * 0.00003 + 4 * 320 * 0.000001
    assert plan(work).predicted == {GROUPED: pytest.approx(prefill + 31 * step)}


def test_a_base_that_cannot_be_merged_into_is_stacked() -> None:
    assert set(plan(replace(WORK, plain=False, new_tokens=10_000)).predicted) == {STACKED}


def test_experts_that_share_a_are_applied_at_one_rank() -> None:
    shared = replace(WORK, shared=True)
    prefill = 0.025 + 20 * 0.001 + 80 * 0.00004 + 20 * 16 * 0.000002
    step = 0.023 + 0.001 + 16 * 0.00003 + 16 * 0.000001
    assert predict(CALIBRATION, shared, STACKED) == pytest.approx(prefill + 31 * step)


def test_every_mix_of_experts_that_share_a_is_one_expert_whose_sum_is_read_at_every_token() -> None:
    work = replace(WORK, rows=4, mixes=4, experts=20, rank=320.0, shared=True)
    prefill = 0.025 + 80 * 0.001 + (160 + 3 * 8) * 0.00004 + 80 * 16 * 0.000002
    step = 0.023 + 4 * 0.001 + (8 + 4 * 8) * 0.00003 + 4 * 16 * 0.000001
    assert plan(work).predicted == {GROUPED: pytest.approx(prefill + 31 * step)}


def test_the_base_model_alone_has_no_experts() -> None:
    assert predict(CALIBRATION, replace(WORK, experts=0, rank=0.0), STACKED) > 0


def test_a_fit_finds_the_times_that_the_points_were_made_of() -> None:
    noise = random.Random(0)
    points = []
    for phase, weights in CALIBRATION.seconds.items():
        for tokens in (1, 8, 64):
            for rank in (32, 256):
                seconds = CALIBRATION.time(phase, tokens, rank, rank) * noise.uniform(0.995, 1.005)
                points.append(Point(phase, tokens, rank, rank, seconds))
        assert len(weights) == 4
    found = fit(points)
    for phase in CALIBRATION.seconds:
        wanted = CALIBRATION.time(phase, 20, 160, 160)
        assert found.time(phase, 20, 160, 160) == pytest.approx(wanted, rel=0.06)
    assert all(w >= 0 for weights in found.seconds.values() for w in weights)


def test_a_fit_needs_every_phase_but_the_merge() -> None:
    points = [Point(phase, 1, 1, 1, 0.1) for phase in CALIBRATION.seconds if phase != "write"]
    assert fit(points).time("base step", 1) > 0
    with pytest.raises(UsageError, match="base prefill"):
        fit(points[1:])


def test_a_calibration_is_remembered_and_a_damaged_note_is_none() -> None:
    key = calibration_key("architecture", torch.float32, torch.device("cpu"), ("plain",))
    assert recall_calibration(key) is None
    remember_calibration(key, CALIBRATION)
    assert recall_calibration(key) == CALIBRATION
    note = home() / "calibrations" / f"{key}.json"
    for damaged in ('{"write": [', "{}", '{"write": [1.0, 2.0]}'):
        note.write_text(damaged)
        assert recall_calibration(key) is None
    note.unlink()


def test_the_key_tells_bases_dtypes_and_quantised_weights_apart() -> None:
    cpu = torch.device("cpu")
    keys = {
        calibration_key(*of, cpu, ("plain",))
        for of in (("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16))
    }
    assert len(keys | {calibration_key("a", torch.float32, cpu, ("packed",))}) == 4
    assert calibration_key("a", torch.float32, cpu, ("plain",)) in keys
