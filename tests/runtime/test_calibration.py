"""Calibration of a tiny base: it covers every phase, leaves the model as it was, and is made once."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from localmoe import open as open_bank
from localmoe.config import GenerateConfig
from localmoe.runtime import calibration
from localmoe.runtime.explanation import explain
from localmoe.runtime.planner import PHASES, CalibratedPlanner, Calibration
from localmoe.terminal.explanations import calibrate


@pytest.fixture(scope="module")
def executor(tiny_bank: Any, tiny_base: Any, tiny_encoder: Any) -> Any:
    return open_bank(tiny_bank, str(tiny_base), str(tiny_encoder)).executor


def test_every_phase_is_measured_and_the_base_is_left_alone(executor: Any) -> None:
    before = tiny.checksum(executor.model)
    forwards = [target.module.__dict__.get("forward") for target in executor.layout.targets]
    points = list(calibration.measure(executor))
    assert {point.phase for point in points} == set(PHASES)
    assert all(point.seconds > 0 for point in points)
    assert tiny.checksum(executor.model) == before
    assert [target.module.__dict__.get("forward") for target in executor.layout.targets] == forwards
    assert executor.dense.bytes == 0


def test_a_machine_is_calibrated_once(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibration.planner(executor)
    monkeypatch.setattr(calibration, "measure", lambda _: pytest.fail("measured again"))
    assert calibration.planner(executor) == made


def test_an_opened_bank_chooses_by_what_its_machine_was_measured_to_take(
    tiny_bank: Any, tiny_base: Any, tiny_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = dict.fromkeys(PHASES, (0.001, 0.0, 0.0, 0.0))
    for phase, way in (("beside prefill", "dense"), ("base prefill", "stacked")):
        found = Calibration(cheap | {phase: (1.0, 0.0, 0.0, 0.0)})
        monkeypatch.setattr(calibration, "planner", lambda _, found=found: CalibratedPlanner(found))
        engine = open_bank(tiny_bank, str(tiny_base), str(tiny_encoder))
        answer = engine.generate("the ferry left", GenerateConfig(max_new_tokens=3))
        assert answer.choice is not None and answer.choice.prefill == way


def test_a_slow_base_is_measured_with_short_prompts(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SLOW", 0.0)
    prompts = {point.tokens for point in calibration.measure(executor) if point.phase == "base prefill"}
    assert prompts == set(calibration.SLOW_PROMPTS)


def test_a_home_that_cannot_be_written_costs_no_second_calibration(
    tiny_bank: Any, tiny_base: Any, tiny_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_bank(tiny_bank, str(tiny_base), str(tiny_encoder))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "file"))
    measured = _counted(monkeypatch)
    calibrate(engine)
    engine.generate("the ferry left", GenerateConfig(max_new_tokens=3))
    assert len(measured) == 1


def test_a_quantised_base_is_measured_only_where_that_is_asked_for_and_kept_apart(
    tiny_bank: Any, tiny_base: Any, tiny_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    engine = open_bank(tiny_bank, str(tiny_base), str(tiny_encoder), quantised="int8")
    measured = _counted(monkeypatch)
    calibrate(engine)  # there is nothing to choose
    engine.generate("the ferry left", GenerateConfig(max_new_tokens=3))
    assert measured == []
    assert {
        cost.choice.prefill for cost in explain(engine, "the ferry left", GenerateConfig(max_new_tokens=2)).costs
    } == {"stacked"}
    assert len(measured) == 1
    assert not calibration.known(open_bank(tiny_bank, str(tiny_base), str(tiny_encoder)).executor)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The executors that are measured from now on."""
    measure, measured = calibration.measure, []

    def counted(executor: Any) -> Any:
        measured.append(executor)
        return measure(executor)

    monkeypatch.setattr(calibration, "measure", counted)
    return measured
