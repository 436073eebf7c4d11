"""Full fine-tuning: a step written by hand, a base that stays as it was, trials that are kept, and what refuses it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import localmoe
from localmoe.config import EvalConfig, FineTuneConfig, as_dict
from localmoe.evaluate import full
from localmoe.evaluate.bench import Bench, NotPossibleError
from localmoe.evaluate.full import FullTried, check_memory, fine_tuned_full, free_bytes, train_copy
from localmoe.evaluate.protocol import Cut, trials_of
from localmoe.train.course import DivergedError, schedule
from localmoe.train.work import Work

CONFIG = EvalConfig(fine_tune=FineTuneConfig(full_rates=(1e-3, 3e-3), tune_tokens=100))


@pytest.fixture
def bench(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path) -> Bench:
    engine = localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))
    cut, work = Cut(5, 5, 40), Work(tmp_path, "key")
    trials, tune = (tuple(trials_of(engine, split, cut)) for split in ("test", "tune"))
    return Bench(engine, CONFIG, cut, trials, tune, work, work, lambda *progress: None)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_a_step_is_adamw_on_all_weights_and_the_base_stays_as_it_was(bench: Bench) -> None:
    """Written out: loss from plain logits, gradient clipped, m̂ / (√v̂ + ε) and decoupled decay; in fp64."""
    config, before = bench.build_config.train, tiny.checksum(bench.engine.model)
    passages = bench.train_passages()[:3]
    trained, tokens = train_copy(bench, passages, 1e-2, 1, "a step")
    assert tiny.checksum(bench.engine.model) == before
    assert tokens == sum(passage.predicted for passage in passages)
    plain = copy.deepcopy(bench.engine.model).double().requires_grad_(True)
    losses = [
        F.cross_entropy(plain(one.tokens[None]).logits[0, :-1], one.tokens[1:], reduction="sum") for one in passages
    ]
    (torch.stack(losses).sum() / tokens).backward()
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    norm = (
        torch.stack([gradient.square().sum() for gradient in gradients.values() if gradient is not None]).sum().sqrt()
    )
    rate = 1e-2 * schedule(0, 1, config.warmup)
    for name, weight in plain.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        gradient = gradient * (config.clip / norm).clamp(max=1)
        moved = weight.detach() * (1 - rate * config.weight_decay) - rate * gradient / (gradient.abs() + 1e-8)
        sure = gradient.abs() > 1e-5  # below, fp32 cannot tell the sign
        assert sure.any()
        torch.testing.assert_close(trained.get_parameter(name)[sure].double(), moved[sure], rtol=0, atol=1e-4)


def test_a_base_in_bf16_is_trained_in_fp32_and_stays_in_bf16(bench: Bench) -> None:
    bench.engine.model.bfloat16()
    before = _weights(bench.engine.model)
    trained, _ = train_copy(bench, bench.train_passages()[:2], 1e-4, 1, "a step")
    assert all(weight.dtype == torch.float32 for weight in trained.parameters())
    after = _weights(bench.engine.model)
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_rate_is_the_best_on_tune_and_trials_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = fine_tuned_full(bench)
    tried = scores.detail["tried"]
    best = min(tried, key=lambda trial: trial["perplexity"])
    assert scores.note.startswith(f"rate {best['rate']:g}, of {len(tried)} tried")
    rates = [trial["rate"] for trial in tried]
    assert len(tried) == 5 or min(rates) < best["rate"] < max(rates)  # a best rate at the edge widens the search
    assert bench.bank_tokens <= scores.training_tokens < bench.bank_tokens + 8 * 64
    trained = []

    def once(_bench: Bench, _passages: Any, rate: float, tokens: int, title: str) -> tuple[Any, int]:
        trained.append((rate, title))
        return bench.engine.model, tokens

    monkeypatch.setattr(full, "train_copy", once)
    assert fine_tuned_full(bench).detail == scores.detail
    assert trained == [(best["rate"], "fine-tuned-full")]


def test_rates_that_diverge_are_infinitely_bad_and_all_of_them_leave_the_method_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_given: Any) -> tuple[Any, int]:
        raise DivergedError("the loss became nan")

    monkeypatch.setattr(full, "train_copy", diverged)
    with pytest.raises(NotPossibleError, match="diverged at every rate"):
        fine_tuned_full(bench)
    kept = bench.training.read_json("tried-full-0.001-100.json")
    assert kept == as_dict(FullTried(1e-3, 100, float("inf")))


def test_too_little_memory_is_said_before_anything_is_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(weight.numel() for weight in bench.engine.model.parameters())
    monkeypatch.setattr(full, "free_bytes", lambda _device: 16 * count - 1)
    monkeypatch.setattr(full, "train_copy", None)
    with pytest.raises(NotPossibleError, match=rf"all {count:,} weights of the base takes .* are free"):
        fine_tuned_full(bench)
    for enough in (16 * count, None):
        monkeypatch.setattr(full, "free_bytes", lambda _device, enough=enough: enough)
        check_memory(bench)


def test_a_base_that_is_not_whole_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(bench.engine.executor), "plain", False)
    with pytest.raises(NotPossibleError, match="quantised, offloaded"):
        check_memory(bench)


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    if not Path("/proc/meminfo").exists():
        assert free_bytes(torch.device("cpu")) is None
        return
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < (free_bytes(torch.device("cpu")) or 0) <= total


def test_losses_that_are_no_numbers_are_infinitely_bad(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "score_model", lambda *_: [math.nan] * len(bench.tune))
    with pytest.raises(NotPossibleError, match="diverged at every rate"):
        fine_tuned_full(bench)
