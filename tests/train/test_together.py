"""Trainings side by side: each job gives what `train` gives alone."""

import dataclasses

import pytest
import tiny
import torch
from torch import Tensor

from localmoe.config import TrainConfig
from localmoe.errors import UsageError
from localmoe.lora import Adapter, attached
from localmoe.models import packed, target_linears
from localmoe.packing import Passage
from localmoe.train import together
from localmoe.train.course import DivergedError, Job, Trained
from localmoe.train.places import Places
from localmoe.train.together import step_through, train_together
from localmoe.train.training import fresh_adapter, step_once, train

CONFIG = TrainConfig(rank=3, alpha=16.0, batch=2, learning_rate=1e-2)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _alone(model: object, job: Job, freeze_A: bool = False) -> Trained:
    return train(
        model, job.passages, job.start, job.config, job.learning_rate, job.seed, job.tokens, freeze_A, floor=job.floor
    )


def _jobs(model: object) -> list[Job]:
    start = tiny.random_adapter(model)
    other = tiny.random_adapter(model, seed=5)
    small = dataclasses.replace(CONFIG, batch=1, weight_decay=0.1, clip=0.05, warmup=0.3)
    return [
        Job(tiny.passages(20, 12, 7, 16, 9), start, CONFIG, 1e-2, 0),
        Job(tiny.passages(11, 5), other, small, 3e-3, 1, tokens=60, floor=0.25),
        Job(tiny.passages(8, 30, 14), start, CONFIG, 5e-3, 2, tokens=120),
    ]


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_job_gives_what_it_gives_alone(name: str, places: int) -> None:
    model = tiny.base(name)
    jobs, before, modules = _jobs(model), tiny.checksum(model), target_linears(model)
    seen: list[int] = []
    found = train_together(model, jobs, places, progress=seen.append)
    assert tiny.checksum(model) == before
    assert target_linears(model) == modules
    for job, mine in zip(jobs, found, strict=True):
        alone = _alone(model, job)
        assert isinstance(mine, Trained)
        assert (mine.tokens, mine.steps) == (alone.tokens, alone.steps)
        assert mine.first_loss == pytest.approx(alone.first_loss, abs=2e-4)
        assert mine.last_loss == pytest.approx(alone.last_loss, abs=2e-4)
        for module, update in alone.adapter.items():
            for a, b in ((mine.adapter[module].A, update.A), (mine.adapter[module].B, update.B)):
                assert a.dtype == torch.bfloat16
                torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-3)
    assert sum(seen) == sum(mine.tokens for mine in found if isinstance(mine, Trained))


def test_a_frozen_first_factor_stays_the_very_same_tensor() -> None:
    model = tiny.base("llama")
    start = tiny.random_adapter(model)
    jobs = [dataclasses.replace(job, start=start) for job in _jobs(model)]
    for job, mine in zip(jobs, train_together(model, jobs, 2, freeze_A=True), strict=True):
        alone = _alone(model, job, freeze_A=True)
        assert isinstance(mine, Trained)
        for module, update in mine.adapter.items():
            assert update.A is job.start[module].A
            torch.testing.assert_close(update.B.float(), alone.adapter[module].B.float(), rtol=2e-2, atol=2e-3)


def test_a_job_that_diverges_says_so_and_disturbs_no_other() -> None:
    model = tiny.base("llama")
    fine = Job(tiny.passages(20, 12, 7, 16, 9), fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0, tokens=300)
    wild = dataclasses.replace(fine, learning_rate=1e30, config=dataclasses.replace(CONFIG, clip=1e30))
    first, bad, last = train_together(model, [fine, wild, fine], 3)
    assert isinstance(bad, DivergedError)
    assert isinstance(first, Trained)
    assert isinstance(last, Trained)
    alone = _alone(model, fine)
    for mine in (first, last):
        assert mine.last_loss == pytest.approx(alone.last_loss, abs=2e-4)


def test_adapters_of_another_scale_are_refused() -> None:
    model = tiny.base("llama")
    jobs = _jobs(model)
    other = {name: update.scaled(2.0) for name, update in jobs[0].start.items()}
    with pytest.raises(ValueError, match="one scale"):
        train_together(model, [jobs[0], dataclasses.replace(jobs[1], start=other)], 2)


@NEEDS_GPU
@pytest.mark.parametrize("places", [1, 3])
def test_captured_steps_of_a_gpu_are_those_of_a_cpu(places: int) -> None:
    model = tiny.base("llama")
    jobs = [dataclasses.replace(job, tokens=600) for job in _jobs(model)]
    expected = [_alone(model, job) for job in jobs]
    model.to("cuda")
    for mine, alone in zip(train_together(model, jobs, places), expected, strict=True):
        assert isinstance(mine, Trained)
        assert mine.steps == alone.steps > 8
        assert mine.last_loss == pytest.approx(alone.last_loss, abs=5e-3)
        for module, update in alone.adapter.items():
            mine_B, B = mine.adapter[module].B.cpu().float(), update.B.cpu().float()
            torch.testing.assert_close(mine_B, B, rtol=5e-2, atol=1e-2)


def _one_by_one(
    model: object, start: Adapter, passages: list[Passage], rate: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B after a step of torch's AdamW on each passage in turn."""
    with attached(model, start, True, True) as modules, packed(model):
        factors = [factor for module in modules.values() for factor in (module.A, module.B)]
        optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=CONFIG.weight_decay)
        for passage in passages:
            step_once(model, [passage], factors, optimizer, CONFIG.clip)
        return {name: (module.A.detach().cpu(), module.B.detach().cpu()) for name, module in modules.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_steps_in_turn_are_those_of_adamw_and_each_start_is_new(device: str) -> None:
    model = tiny.base("llama")
    start, passages = tiny.random_adapter(model), tiny.passages(20, 12, 7, 16, 9, 20, 13)
    expected = _one_by_one(model, start, passages, 1e-2)
    model.to(device)
    room = Places(model, start, 2)
    modules = target_linears(model)
    first = step_through(room, start, passages, CONFIG, 1e-2)
    for again in (first, step_through(room, start, passages, CONFIG, 1e-2)):
        for name, (A, B) in expected.items():
            torch.testing.assert_close(again[name].A.float(), A, rtol=5e-2, atol=5e-3)
            torch.testing.assert_close(again[name].B.float(), B, rtol=5e-2, atol=5e-3)
            assert torch.equal(again[name].B, first[name].B)
    other = step_through(room, start, passages[::-1], CONFIG, 1e-2)
    assert any(not torch.equal(other[name].B, first[name].B) for name in expected)
    assert step_through(room, start, [], CONFIG, 1e-2) is start
    assert target_linears(model) == modules
    with pytest.raises(DivergedError):
        step_through(room, start, passages, dataclasses.replace(CONFIG, clip=1e30), 1e30)


def test_a_last_step_that_diverges_is_noticed() -> None:
    model = tiny.base("llama")
    wild = dataclasses.replace(CONFIG, clip=1e30, warmup=0.0)
    start = fresh_adapter(model, wild, 0)
    (found,) = train_together(model, [Job(tiny.passages(20), start, wild, 1e30, 0)], 1)
    assert isinstance(found, DivergedError)


def test_a_frozen_first_factor_must_be_one_for_all() -> None:
    model = tiny.base("llama")
    jobs = [Job(tiny.passages(20), tiny.random_adapter(model, seed=seed), CONFIG, 1e-2, 0) for seed in (1, 2)]
    with pytest.raises(ValueError, match="share an A"):
        train_together(model, jobs, 2, freeze_A=True)


def test_a_linear_that_runs_twice_is_refused() -> None:
    model = tiny.base("llama")
    mlp = model.model.layers[1].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + once(x)
    job = Job(tiny.passages(20), fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0)
    with pytest.raises(UsageError, match="runs twice"):
        train_together(model, [job], 1)


def test_places_fill_the_memory_and_the_tokens_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.base("llama")
    start = fresh_adapter(model, CONFIG, 0)
    read = Job((), start, CONFIG, 1e-2, 0, read=tiny.passages(16))
    assert together.places_for(model, [read] * 9) == 1
    monkeypatch.setattr(together, "captured", lambda model: True)
    monkeypatch.setattr(together, "free", lambda device: 2**40)
    assert together.places_for(model, [read] * 9) == 9
    assert together.places_for(model, [read] * 9999) == together.TOKENS_AT_ONCE // (16 * CONFIG.batch)
    monkeypatch.setattr(together, "free", lambda device: 1)
    assert together.places_for(model, [read] * 9) == 1
