"""Joint training: its gradients against PyTorch's own, what is shared, and going on after an interruption."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from localmoe.config import TrainConfig
from localmoe.lora import LowRank, attached, stack
from localmoe.models import packed
from localmoe.packing import loss, pack
from localmoe.train import joint
from localmoe.train.course import DivergedError, batches_of, schedule
from localmoe.train.joint import JointJob, JointTrained, State, Weights, train_jointly
from localmoe.train.training import fresh_adapter, train

CONFIG = TrainConfig(rank=3, alpha=6.0, batch=2, weight_decay=0.05)
LENGTHS = (20, 12, 7, 16, 9)


def _job(model: Any, weights: Sequence[Weights] | None = None, count: int = 3, **changes: Any) -> JointJob:
    mixes = (
        weights if weights is not None else ([(0, 1.0)], [(0, 0.5), (2, 0.5)], [(2, 1.0)], [(1, 0.25), (2, 0.75)], [])
    )
    passages = tuple(zip(tiny.passages(*LENGTHS), mixes, strict=True))
    job = JointJob(passages, count, fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0.5, seed=0, tokens=150)
    return dataclasses.replace(job, **changes)


def _by_autograd(model: Any, job: JointJob) -> tuple[dict[str, list[torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """(A, B₀) and the b_k after the same steps, one document after the other through `attached`.

    PyTorch's AdamW moves A and B₀; b_k takes ρ η w_k g / max(√v̂ + ε, |g|) with the clipped g,
    v = β₂ v + (1 − β₂) (Σ g)² and v̂ = v / (1 − β₂ᵗ).
    """
    factors = {
        name: [u.A.float().clone().requires_grad_(), u.B.float().clone().requires_grad_()]
        for name, u in job.start.items()
    }
    own = [
        {name: torch.zeros_like(u.B, dtype=torch.float32) for name, u in job.start.items()} for _ in range(job.count)
    ]
    moment = {name: torch.zeros_like(u.B, dtype=torch.float32) for name, u in job.start.items()}
    group = [f for pair in factors.values() for f in pair]
    optimizer = torch.optim.AdamW(group, weight_decay=job.config.weight_decay)
    weights = {id(passage): mix for passage, mix in job.passages}
    batches = batches_of([passage for passage, _ in job.passages], job.config, job.seed, job.tokens)
    for step, batch in enumerate(batches):
        total, taught = sum(passage.predicted for passage in batch), []
        for passage in batch:
            mix = weights[id(passage)]
            merged = {
                name: LowRank(
                    A.detach(),
                    (B + sum((w * own[k][name] for k, w in mix), torch.zeros(()))).detach(),
                    job.start[name].c,
                )
                for name, (A, B) in factors.items()
            }
            with attached(model, merged, train_A=True, train_B=True) as modules, packed(model):
                (loss(model, pack([passage])) * passage.predicted / total).backward()
            for name, module in modules.items():
                for parameter, gradient in zip(factors[name], (module.A.grad, module.B.grad), strict=True):
                    parameter.grad = gradient + (0 if parameter.grad is None else parameter.grad)
                taught += [(k, name, w, module.B.grad) for k, w in mix]
        now = job.rate * schedule(step, len(batches), job.config.warmup)
        norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in group))
        clip = min(1.0, job.config.clip / norm)
        for name, (_, B) in factors.items():
            moment[name] = 0.999 * moment[name] + 0.001 * (clip * B.grad) ** 2
        for k, name, weight, gradient in taught:
            spread = (moment[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            bounded = clip * gradient / torch.maximum(spread, (clip * gradient).abs())
            own[k][name] -= now * job.expert_rate * weight * bounded
        for parameter in group:
            parameter.grad *= clip
        optimizer.param_groups[0]["lr"] = now
        optimizer.step()
        optimizer.zero_grad()
    return factors, own


def _shares(job: JointJob) -> list[float]:
    """Label tokens that every expert was taught by, each times its weight."""
    weights = {id(passage): dict(mix) for passage, mix in job.passages}
    batches = batches_of([passage for passage, _ in job.passages], job.config, job.seed, job.tokens)
    read = [passage for batch in batches for passage in batch]
    return [sum(weights[id(p)].get(k, 0.0) * p.predicted for p in read) for k in range(job.count)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_steps_are_those_of_autograd_on_the_formula(name: str) -> None:
    model = tiny.base(name)
    job, before = _job(model), tiny.checksum(model)
    found = train_jointly(model, job)
    assert tiny.checksum(model) == before
    factors, own = _by_autograd(model, job)
    shares = _shares(job)
    for module, (A, B) in factors.items():
        mean = sum((share * b[module] for share, b in zip(shares, own, strict=True)), torch.zeros(())) / sum(shares)
        for adapter, extra in [
            (found.trunk.adapter, mean),
            *((e.adapter, b[module]) for e, b in zip(found.experts, own, strict=True)),
        ]:
            torch.testing.assert_close(adapter[module].A.float(), A.detach(), rtol=2e-2, atol=2e-3)
            torch.testing.assert_close(adapter[module].B.float(), (B + extra).detach(), rtol=2e-2, atol=2e-3)
            assert torch.equal(adapter[module].c, job.start[module].c)


def test_experts_share_the_first_factor_of_the_trunk_and_their_mix_has_its_rank() -> None:
    model = tiny.base("llama")
    found = train_jointly(model, _job(model))
    for module, trunk in found.trunk.adapter.items():
        updates = [expert.adapter[module] for expert in found.experts]
        assert all(update.A is trunk.A for update in updates)
        assert all(not torch.equal(update.B, trunk.B) for update in updates)
        assert stack([update.scaled(1 / 3) for update in updates]).rank == CONFIG.rank


def test_what_is_told_of_a_training() -> None:
    model = tiny.base("llama")
    seen: list[int] = []
    job = _job(model)
    job = dataclasses.replace(job, tokens=sum(passage.predicted for passage, _ in job.passages))
    found = train_jointly(model, job, progress=seen.append)
    assert sum(seen) == found.trunk.tokens == job.tokens
    assert found.trunk.steps == len(seen) == 3
    assert [expert.tokens for expert in found.experts] == [round(share) for share in _shares(job)]


def test_an_expert_that_no_document_teaches_has_seen_nothing_and_the_only_one_is_the_trunk() -> None:
    model = tiny.base("llama")
    found = train_jointly(model, _job(model, weights=[[(0, 1.0)]] * len(LENGTHS), count=2))
    taught, other = found.experts
    assert (other.tokens, other.steps, other.last_loss) == (0, 0, found.trunk.last_loss)
    for module, update in found.trunk.adapter.items():
        assert torch.equal(update.B, taught.adapter[module].B)
        assert not torch.equal(update.B, other.adapter[module].B)


def test_without_experts_it_is_the_plain_training() -> None:
    model = tiny.base("llama")
    job = _job(model, weights=[[]] * len(LENGTHS), count=1)
    plain = train(model, [passage for passage, _ in job.passages], job.start, CONFIG, job.rate, job.seed, job.tokens)
    found = train_jointly(model, job)
    assert found.trunk.tokens == plain.tokens
    assert found.trunk.last_loss == pytest.approx(plain.last_loss, abs=2e-4)
    for module, update in found.trunk.adapter.items():
        torch.testing.assert_close(update.A.float(), plain.adapter[module].A.float(), rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(update.B.float(), plain.adapter[module].B.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    stop: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(joint, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(joint, "SAVE_SHARE", 1e9)
    model = tiny.base("llama")
    whole = train_jointly(model, _job(model))

    def keep(state: State) -> None:
        torch.save(state, tmp_path / "state.pt")

    steps = 0

    def interrupt(_tokens: int) -> None:
        nonlocal steps
        steps += 1
        if steps > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_jointly(model, _job(model), interrupt, keep)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(kept["losses"]) == stop
    again = train_jointly(model, _job(model), kept=kept)
    for one, other in zip((whole.trunk, *whole.experts), (again.trunk, *again.experts), strict=True):
        assert (one.tokens, one.steps, one.first_loss, one.last_loss) == (
            other.tokens,
            other.steps,
            other.first_loss,
            other.last_loss,
        )
        for module, update in one.adapter.items():
            assert torch.equal(update.A, other.adapter[module].A)
            assert torch.equal(update.B, other.adapter[module].B)


def _same(one: JointTrained, other: JointTrained, tolerance: float) -> None:
    for mine, theirs in zip((one.trunk, *one.experts), (other.trunk, *other.experts), strict=True):
        assert (mine.tokens, mine.steps) == (theirs.tokens, theirs.steps)
        assert mine.last_loss == pytest.approx(theirs.last_loss, abs=tolerance)
        for module, update in mine.adapter.items():
            for a, b in ((update.A, theirs.adapter[module].A), (update.B, theirs.adapter[module].B)):
                torch.testing.assert_close(a.cpu().float(), b.float(), rtol=10 * tolerance, atol=2 * tolerance)


def test_passages_that_are_filled_up_as_on_a_gpu_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.base("llama")
    job = _job(model, config=dataclasses.replace(CONFIG, batch=3))  # the last batch is short
    packed_steps = train_jointly(model, job)
    monkeypatch.setattr(joint, "captured", lambda model: True)
    _same(train_jointly(model, job), packed_steps, 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_of_a_gpu_are_those_of_a_cpu() -> None:
    model = tiny.base("llama")
    job = _job(model, tokens=600)
    expected = train_jointly(model, job)
    model.to("cuda")
    _same(train_jointly(model, job), expected, 5e-3)


def test_a_training_that_diverges_says_so() -> None:
    model = tiny.base("llama")
    wild = _job(model, rate=1e30, config=dataclasses.replace(CONFIG, clip=1e30))
    with pytest.raises(DivergedError):
        train_jointly(model, wild)
