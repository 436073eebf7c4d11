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
from localmoe.config import BuildConfig, EvalConfig
from localmoe.encoders import load_encoder
from localmoe.errors import ConfigError
from localmoe.evaluate.evaluation import evaluate
from localmoe.lora import attached, stack
from localmoe.models import load_model, load_tokenizer
from localmoe.routing import Centroids, route
from localmoe.runtime.router import route_config
from localmoe.train import joint, joint_tasks, prompts
from localmoe.train.course import DivergedError
from localmoe.train.groundwork import RATE_WITH_TRUNK
from localmoe.train.joint import JointJob, JointTrained, train_jointly
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
    assert {(event.done, event.total) for event in events if event.stage == "experts"} == {(1, 1)}


def test_what_sets_experts_apart_is_kept_as_far_as_tune_documents_like_it(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = localmoe.build(tiny_corpus, tmp_path / "whole", config(train={"expert_rate": 0.01}))
    judged: list[int] = []

    def half(model: Any, found: JointTrained, judges: Any) -> Any:
        judged.append(len(judges))
        return 0.5, {0.5: 1.0}

    monkeypatch.setattr(joint_tasks, "search_share", half)
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(train={"expert_rate": 0.01}), watch=events.append)
    assert judged == [sum(split == "tune" for split in bank.documents()["split"].to_pylist())]
    assert any("experts keep 50% of what sets them apart" in event.note for event in events if event.stage == "trunk")
    trunk, other = bank.trunk(), whole.trunk()
    assert trunk is not None and other is not None
    kept = whole.manifest.experts[0].adapter.training.kept  # type: ignore[union-attr]
    for expert in bank.manifest.experts:
        assert expert.adapter is not None and expert.adapter.training is not None
        assert expert.adapter.training.kept == 0.5
        for name, update in bank.adapter(expert.id).items():
            far = (whole.adapter(expert.id)[name].B.float() - other[name].B.float()) / kept
            torch.testing.assert_close(update.B.float() - trunk[name].B.float(), 0.5 * far, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("router", ["sparse_softmax", "uniform", "sift", "members", "nearest"])
def test_documents_train_by_the_mixes_that_the_bank_routes_by(
    router: str, config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _given(monkeypatch)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(route={"router": router, "active": 10.0}))
    (job,) = jobs
    table, record = bank.documents(), bank.manifest.router
    train = [row for row, split in enumerate(table["split"].to_pylist()) if split == "train"]
    centroids = Centroids(tuple(e.id for e in bank.manifest.experts), bank.centroids(), "", bank.means())
    queries = torch.nn.functional.normalize(torch.from_numpy(bank.embeddings()[train].astype(np.float32)), dim=1)
    routed = route_config(bank, {})
    assert routed.active == record.wanted == 2.5  # of four experts
    mixes = [dict(zip(mix.experts, mix.weights, strict=True)) for mix in route(queries, centroids, routed)]
    expected = torch.tensor([[mix.get(name, 0.0) for name in centroids.experts] for mix in mixes])
    documents = list({id(weights): weights for _, weights in job.passages}.values())
    found = torch.zeros(len(documents), job.count)
    for place, weights in enumerate(documents):
        for k, weight in weights:
            found[place, k] = weight
    close = (found - expected).abs().amax(dim=1) < 2e-2  # the bank's embeddings are fp16
    assert close.float().mean() > 0.9  # where two are equally near, that may change which is the nearest


def test_mixes_are_those_of_the_formula(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half by the whole document, half by its first tokens."""
    jobs = _given(monkeypatch)
    monkeypatch.setattr(prompts, "PREFIX_TOKENS", 6)
    asked = config(route={"active": 2.5})
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", asked)
    table, tokenizer, encoder = bank.documents(), load_tokenizer(asked.base), load_encoder(asked.encoder)
    train = [row for row, split in enumerate(table["split"].to_pylist()) if split == "train"]
    texts = bank.texts([table["id"][row].as_py() for row in train])
    firsts = [tokenizer.decode(tokenizer(text)["input_ids"][:6], skip_special_tokens=True) for text in texts]
    by_prompt = _weights(bank, torch.from_numpy(encoder.encode(firsts)))
    whole = _weights(bank, _embeddings(bank, train))
    assert (whole - by_prompt).abs().max() > 0.1
    expected = (whole + by_prompt) / 2
    documents = list({id(weights): weights for _, weights in jobs[0].passages}.values())
    found = torch.zeros(len(documents), jobs[0].count, dtype=torch.float64)
    for place, weights in enumerate(documents):
        for k, weight in weights:
            found[place, k] = weight
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    assert bank.manifest.router.beta > 0


def test_a_lone_expert_is_the_trunk_is_judged_against_the_base_and_answers(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(cluster={"clusters": 1}))
    (expert,), trunk = bank.manifest.experts, bank.trunk()
    assert trunk is not None and bank.manifest.trunk_outcome is not None
    assert all(torch.equal(update.B, trunk[name].B) for name, update in bank.adapter(expert.id).items())
    assert expert.outcome.status == "good"
    assert expert.outcome.reference_nll == pytest.approx(bank.manifest.trunk_outcome.reference_nll, abs=0.2)
    assert localmoe.open(tmp_path / "bank").route("boat sail").experts == (expert.id,)


def test_an_expert_is_judged_by_the_mixes_of_its_tune_documents(
    config: Make, tiny_corpus: Path, tiny_base: Path, tmp_path: Path
) -> None:
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    model, tokenizer, table = load_model(str(tiny_base)), load_tokenizer(str(tiny_base)), bank.documents()
    tune = [row for row, split in enumerate(table["split"].to_pylist()) if split == "tune"]
    weights = _weights(bank, _embeddings(bank, tune))  # documents so short that their first tokens are all of them
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


def _embeddings(bank: Bank, rows: list[int]) -> torch.Tensor:
    """φ of whole documents [n, d]."""
    return torch.nn.functional.normalize(torch.from_numpy(bank.embeddings()[rows].astype(np.float32)), dim=1)


def _weights(bank: Bank, queries: torch.Tensor) -> torch.Tensor:
    """w ∝ ReLU(softmax(s/β) − τ) [n, K], by the formula."""
    router = bank.manifest.router
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
    for adapter, rate in zip(bank.manifest.adapters, [5e-3, *[5e-3 * RATE_WITH_TRUNK] * 4], strict=True):
        assert adapter.training is not None
        assert (adapter.training.learning_rate, adapter.training.attempts) == (pytest.approx(rate), 2)


def test_where_it_diverges_again_experts_start_from_the_base_for_good(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []

    def unstable(model: Any, job: JointJob, *more: Any) -> Any:
        begun.append(job.rate)
        raise DivergedError("the loss became nan")

    def stop(event: Event) -> None:
        if event.stage == "experts" and event.note.startswith("e01"):
            raise KeyboardInterrupt

    monkeypatch.setattr(joint_tasks, "train_jointly", unstable)
    with pytest.raises(KeyboardInterrupt):
        localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=stop)
    monkeypatch.setattr(joint_tasks, "train_jointly", train_jointly)
    assert not list((tmp_path / "bank" / "work").rglob("joint-*"))
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert len(begun) == 2
    assert bank.manifest.trunk is None
    first, second = (bank.adapter(expert.id) for expert in bank.manifest.experts[:2])
    assert all(not torch.equal(first[name].A, second[name].A) for name in first)
    assert verify(bank) == []


def test_private_documents_teach_neither_the_trunk_nor_public_experts(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    asked = config(cluster={"clusters": 2, "min_tokens": 50})
    whole = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, whole)
    (whole / "secret").mkdir()
    for number in range(12):
        (whole / "secret" / f"{number}.txt").write_text(tiny.sentence("sky", 1000 + number, 40), encoding="utf-8")
    corpus = dataclasses.replace(asked.corpus, access_paths={"secret/*": ("board",)})
    cluster = dataclasses.replace(asked.cluster, clusters=3)
    public = localmoe.build(tiny_corpus, tmp_path / "public", dataclasses.replace(asked, corpus=corpus))
    bank = localmoe.build(whole, tmp_path / "bank", dataclasses.replace(asked, corpus=corpus, cluster=cluster))
    trunk, other = bank.trunk(), public.trunk()
    assert trunk is not None and other is not None
    secret = [expert for expert in bank.manifest.experts if expert.access]
    for expert in secret:
        assert expert.adapter is not None and expert.adapter.training is not None
        assert not expert.adapter.training.with_trunk
        assert expert.adapter.training.learning_rate == pytest.approx(0.25 * 1e-2)
        assert all(update.A is trunk[name].A for name, update in bank.adapter(expert.id).items())
        assert any(not torch.equal(update.B, trunk[name].B) for name, update in bank.adapter(expert.id).items())
    assert (len(secret), len(bank.manifest.experts)) == (1, 3)
    pairs = [(trunk, other)]  # embedded in other batches, so that the last digits of a mix may differ
    open_to_all = [expert.id for expert in bank.manifest.experts if not expert.access]
    for mine, theirs in zip(open_to_all, (expert.id for expert in public.manifest.experts), strict=True):
        pairs.append((bank.adapter(mine), public.adapter(theirs)))
    for one, two in pairs:
        for name, update in one.items():
            torch.testing.assert_close(update.B, two[name].B, rtol=0, atol=1e-5)


def test_the_fine_tune_gets_as_many_tokens_as_a_joint_bank_has_read(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    trunk = bank.manifest.trunk
    assert trunk is not None and trunk.training is not None
    asked = EvalConfig(methods=("base",), prefix=4, length=30)
    found = evaluate(localmoe.open(tmp_path / "bank"), tmp_path / "results", asked, lambda *progress: None)
    assert found.corpus["bank_training_tokens"] == trunk.training.tokens
