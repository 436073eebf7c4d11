"""Recipe `joint` in a build: what the bank holds, who teaches whom, and that nothing is lost by an interruption."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import localmoe
from localmoe.bank.store import Bank, verify
from localmoe.config import BuildConfig
from localmoe.errors import ConfigError
from localmoe.lora import attached, stack
from localmoe.models import load_model, load_tokenizer
from localmoe.train import joint, joint_tasks
from localmoe.train.course import DivergedError
from localmoe.train.joint import JointJob, train_jointly
from localmoe.train.progress import Event

Make = Callable[..., BuildConfig]
JOINT = {"recipe": "joint", "epochs": 2.0}


@pytest.fixture
def config(tiny_base: Path, tiny_encoder: Path) -> Make:
    """A tiny joint build; keywords change `train` or `route` (mappings)."""

    def make(**changes: dict[str, Any]) -> BuildConfig:
        made = tiny.tiny_config(tiny_base, tiny_encoder, **JOINT)
        parts = {name: dataclasses.replace(getattr(made, name), **change) for name, change in changes.items()}
        return dataclasses.replace(made, **parts)

    return make


def _given(monkeypatch: pytest.MonkeyPatch) -> list[JointJob]:
    jobs: list[JointJob] = []

    def told(model: Any, job: JointJob, *more: Any) -> Any:
        jobs.append(job)
        return train_jointly(model, job, *more)

    monkeypatch.setattr(joint_tasks, "train_jointly", told)
    return jobs


def test_a_joint_bank_has_a_trunk_and_experts_beside_it_that_count_no_token_twice(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=events.append)
    assert verify(bank) == []
    trunk, record = bank.trunk(), bank.manifest.trunk
    assert trunk is not None and record is not None and record.training is not None
    for expert in bank.manifest.experts:
        assert expert.adapter is not None and expert.adapter.training is not None
        assert expert.adapter.training.with_trunk and not record.training.with_trunk
        assert all(update.A is trunk[name].A for name, update in bank.adapter(expert.id).items())
    each = [expert.adapter.training.tokens for expert in bank.manifest.experts if expert.adapter is not None]  # type: ignore[union-attr]
    assert sum(each) == pytest.approx(record.training.tokens, abs=len(each))
    assert [event for event in events if event.stage == "experts" and event.total] == []


def test_documents_train_by_the_mixes_that_the_bank_routes_by(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _given(monkeypatch)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(route={"active": 2.5}))
    (job,) = jobs
    table = bank.documents()
    train = [row for row, split in enumerate(table["split"].to_pylist()) if split == "train"]
    expected = _weights(bank, train)
    documents = list({id(weights): weights for _, weights in job.passages}.values())
    found = torch.zeros(len(documents), job.count, dtype=torch.float64)
    for place, weights in enumerate(documents):
        for k, weight in weights:
            found[place, k] = weight
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)  # the bank's embeddings are fp16
    assert bank.manifest.router.beta > 0


def test_an_expert_is_judged_by_the_mixes_of_its_tune_documents(
    config: Make, tiny_corpus: Path, tiny_base: Path, tmp_path: Path
) -> None:
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    model, tokenizer, table = load_model(str(tiny_base)), load_tokenizer(str(tiny_base)), bank.documents()
    tune = [row for row, split in enumerate(table["split"].to_pylist()) if split == "tune"]
    weights = _weights(bank, tune)
    nearest = (bank.embeddings()[tune].astype(np.float32) @ bank.centroids().float().numpy().T).argmax(axis=1)
    trunk, adapters = bank.trunk(), [bank.adapter(expert.id) for expert in bank.manifest.experts]
    assert trunk is not None
    checked = 0
    for k, expert in enumerate(bank.manifest.experts):
        total, reference, count = 0.0, 0.0, 0
        for place in np.flatnonzero(nearest == k).tolist():
            parts = [(one, float(w)) for one, w in zip(adapters, weights[place], strict=True) if w > 0]
            merged = {name: stack([one[name].scaled(w) for one, w in parts]) for name in trunk}
            (text,) = bank.texts([table["id"][tune[place]].as_py()])
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
            total, reference = total + _nll(model, merged, ids), reference + _nll(model, trunk, ids)
            count += ids.shape[1] - 1
        if expert.outcome.status == "unchecked":
            continue
        checked += 1
        assert expert.outcome.nll == pytest.approx(total / count, abs=2e-3)
        assert expert.outcome.reference_nll == pytest.approx(reference / count, abs=1e-4)
    assert checked


def _weights(bank: Bank, rows: list[int]) -> torch.Tensor:
    """w ∝ ReLU(softmax(s/β) − τ) of the whole documents [n, K], by the formula."""
    router = bank.manifest.router
    queries = torch.nn.functional.normalize(torch.from_numpy(bank.embeddings()[rows].astype(np.float32)), dim=1)
    kept = ((queries.double() @ bank.centroids().double().T / router.beta).softmax(dim=1) - router.tau).relu()
    return kept / kept.sum(dim=1, keepdim=True)


def _nll(model: Any, adapter: Any, ids: torch.Tensor) -> float:
    with torch.no_grad(), attached(model, adapter):
        logits = model(ids).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("step", [3, 8])
def test_ctrl_c_in_the_middle_loses_nothing_that_was_kept(
    step: int, config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = localmoe.build(tiny_corpus, tmp_path / "whole", config())
    monkeypatch.setattr(joint, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(joint, "SAVE_SHARE", 1e9)
    seen: list[int] = []

    def pressed(event: Event) -> None:
        if event.stage == "trunk" and event.done > 0:
            seen.append(event.done)
            if len(seen) == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=pressed)
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=events.append)
    assert bank.manifest.digest == whole.manifest.digest
    going_on = [event for event in events if event.stage == "trunk"]
    assert going_on[0].done == seen[-2]  # the step that was interrupted was not kept
    assert f"going on after {seen[-2]:,} tokens" in going_on[0].note
    assert not (tmp_path / "bank" / "work").exists()


def test_passes_of_a_trunk_alone_are_refused(config: Make, tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trunk_epochs=1 has no meaning for recipe 'joint'") as raised:
        localmoe.build(tiny_corpus, tmp_path / "bank", config(train={"trunk_epochs": 1.0}))
    assert "train.epochs" in raised.value.remedy


def test_a_joint_training_that_diverges_is_begun_again_at_half_the_rate(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def unstable(model: Any, job: JointJob, *more: Any) -> Any:
        rates.append(job.rate)
        if len(rates) == 1:
            raise DivergedError("the loss became nan")
        return train_jointly(model, job, *more)

    monkeypatch.setattr(joint_tasks, "train_jointly", unstable)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert rates == [1e-2, 5e-3]
    for adapter, rate in zip(bank.manifest.adapters, [5e-3] * 5, strict=True):
        assert adapter.training is not None
        assert (adapter.training.learning_rate, adapter.training.attempts) == (pytest.approx(rate), 2)


def test_where_it_diverges_again_experts_start_from_the_base(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unstable(*arguments: Any) -> Any:
        raise DivergedError("the loss became nan")

    monkeypatch.setattr(joint_tasks, "train_jointly", unstable)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert bank.manifest.trunk is None
    first, second = (bank.adapter(expert.id) for expert in bank.manifest.experts[:2])
    assert all(not torch.equal(first[name].A, second[name].A) for name in first)
    assert verify(bank) == []


def test_private_documents_teach_neither_the_trunk_nor_public_experts(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    asked = config()
    public = localmoe.build(tiny_corpus, tmp_path / "public", asked)
    whole = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, whole)
    (whole / "secret").mkdir()
    for number in range(12):
        (whole / "secret" / f"{number}.txt").write_text(tiny.sentence("sky", 1000 + number, 40), encoding="utf-8")
    corpus = dataclasses.replace(asked.corpus, access_paths={"secret/*": ("board",)})
    cluster = dataclasses.replace(asked.cluster, clusters=5, min_tokens=50)
    bank = localmoe.build(whole, tmp_path / "bank", dataclasses.replace(asked, corpus=corpus, cluster=cluster))
    trunk, other = bank.trunk(), public.trunk()
    assert trunk is not None and other is not None
    secret = [expert for expert in bank.manifest.experts if expert.access]
    assert secret and len(secret) < len(bank.manifest.experts)
    for expert in secret:
        assert expert.adapter is not None and expert.adapter.training is not None
        assert not expert.adapter.training.with_trunk
        assert expert.adapter.training.learning_rate == pytest.approx(0.25 * 1e-2)
        assert all(update.A is trunk[name].A for name, update in bank.adapter(expert.id).items())
        assert any(not torch.equal(update.B, trunk[name].B) for name, update in bank.adapter(expert.id).items())
    if len(bank.manifest.experts) - len(secret) == len(public.manifest.experts):
        assert all(torch.equal(trunk[name].B, other[name].B) for name in trunk)
