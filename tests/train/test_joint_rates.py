"""The search for the rate of experts beside their trunk: what is tried, what judges, what a bank is built with."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

import localmoe
from localmoe.config import BuildConfig, SearchConfig
from localmoe.train import joint_rates
from localmoe.train.course import DivergedError
from localmoe.train.groundwork import RATE_WITH_TRUNK
from localmoe.train.joint import JointJob, train_jointly
from localmoe.train.progress import Event


@pytest.fixture
def config(tiny_base: Path, tiny_encoder: Path) -> BuildConfig:
    made = tiny.tiny_config(tiny_base, tiny_encoder, recipe="joint", epochs=2.0)
    return dataclasses.replace(made, search=SearchConfig((1.0, 10.0), tokens=2_000))


def test_a_bank_is_built_at_the_rate_of_experts_that_tune_documents_like_best(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[JointJob] = []

    def watched(model: Any, job: JointJob, *more: Any) -> Any:
        jobs.append(job)
        return train_jointly(model, job, *more)

    monkeypatch.setattr(joint_rates, "train_jointly", watched)
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config, watch=events.append)
    note = [event.note for event in events if event.stage == "rates" and event.note][1]
    assert "first tokens' mixes of" in note and "for experts" in note
    short = [event.note for event in events if "these trials saw" in event.note]
    eager = any(
        e.adapter and e.adapter.training and e.adapter.training.learning_rate > jobs[0].rate * RATE_WITH_TRUNK
        for e in bank.manifest.experts
    )
    assert len(short) == eager and all("search.tokens=" in said for said in short)
    trunk = bank.manifest.trunk
    assert trunk is not None and trunk.training is not None
    assert {job.rate for job in jobs} == {trunk.training.learning_rate}
    assert all(job.tokens == 2_000 for job in jobs)
    tried = {round(job.expert_rate, 9) for job in jobs}
    assert {RATE_WITH_TRUNK, 10 * RATE_WITH_TRUNK} < tried  # one of two is at the edge
    told = {float(rate): float(nll) for rate, nll in (p.split(": ") for p in note.rpartition("(")[2][:-1].split(", "))}
    rates = {e.adapter.training.learning_rate for e in bank.manifest.experts if e.adapter and e.adapter.training}
    assert [pytest.approx(rate, rel=1e-4) for rate in rates] == [min(told, key=told.__getitem__)]


def test_a_trial_that_diverges_loses_and_finished_ones_are_not_run_again(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def broken(model: Any, job: JointJob, *more: Any) -> Any:
        asked.append(job.expert_rate)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if job.expert_rate > 0.5:
            raise DivergedError("the loss became nan")
        return train_jointly(model, job, *more)

    monkeypatch.setattr(joint_rates, "train_jointly", broken)
    with pytest.raises(KeyboardInterrupt):
        localmoe.build(tiny_corpus, tmp_path / "bank", config)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config)
    assert asked[:2] == [pytest.approx(RATE_WITH_TRUNK), pytest.approx(10 * RATE_WITH_TRUNK)] and asked[2] == asked[3]
    trunk, expert = bank.manifest.trunk, bank.manifest.experts[0].adapter
    assert trunk is not None and trunk.training is not None and expert is not None and expert.training is not None
    assert expert.training.learning_rate < 0.5 * trunk.training.learning_rate


def test_without_tune_documents_the_rate_is_taken_as_it_is_and_it_is_said(
    tmp_path: Path, tiny_corpus: Path, config: BuildConfig
) -> None:
    events: list[Event] = []
    without = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, tune_fraction=0.0))
    localmoe.build(tiny_corpus, tmp_path / "bank", without, watch=events.append)
    assert any("of it for experts, not tried" in event.note for event in events)
