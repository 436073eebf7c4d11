"""The training loop: what it changes, what it never does, and that equal inputs give equal bytes."""

import dataclasses

import pytest
import tiny
import torch

from localmoe.config import TrainConfig
from localmoe.errors import LocalMoEError
from localmoe.lora import Adapter
from localmoe.models import target_linears
from localmoe.packing import Passage
from localmoe.train.course import DivergedError, batches_of, schedule
from localmoe.train.training import fresh_adapter, train

CONFIG = TrainConfig(rank=3, alpha=16.0, batch=2, learning_rate=1e-2)


def _bytes(adapter: Adapter) -> list[bytes]:
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for u in adapter.values() for t in (u.A, u.B, u.c)]


def _repetitive(count: int = 8) -> list[Passage]:
    tokens = torch.tensor([7, 8, 9, 10] * 8)
    return [Passage(tokens, torch.ones(32, dtype=torch.bool)) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_loss_falls_on_a_repetitive_text_and_the_base_is_untouched(name: str) -> None:
    model = tiny.base(name)
    before, modules = tiny.checksum(model), target_linears(model)
    trained = train(model, _repetitive(), fresh_adapter(model, CONFIG, 0), CONFIG, 3e-2, 0, tokens=8 * 8 * 31)
    assert trained.last_loss < trained.first_loss - 0.7
    assert (trained.steps, trained.tokens) == (32, 8 * 8 * 31)
    assert tiny.checksum(model) == before
    assert target_linears(model) == modules


def test_equal_seeds_give_equal_bytes_and_another_seed_other_ones() -> None:
    model, passages = tiny.base("llama"), tiny.passages(20, 12, 7, 16, 9)

    def run(seed: int) -> list[bytes]:
        return _bytes(train(model, passages, fresh_adapter(model, CONFIG, seed), CONFIG, 1e-2, seed).adapter)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_frozen_first_factor_is_the_very_same_tensor_and_the_second_learns() -> None:
    model = tiny.base("llama")
    start = tiny.random_adapter(model)
    trained = train(model, tiny.passages(20, 12), start, CONFIG, 1e-2, 0, freeze_A=True).adapter
    for name, update in trained.items():
        assert update.A is start[name].A
        assert not torch.equal(update.B, start[name].B.bfloat16())


def test_without_freezing_both_factors_learn_and_are_stored_in_bf16() -> None:
    model = tiny.base("llama")
    start = tiny.random_adapter(model)
    trained = train(model, tiny.passages(20, 12), start, CONFIG, 1e-2, 0).adapter
    for name, update in trained.items():
        assert update.A.dtype == update.B.dtype == torch.bfloat16
        assert not torch.equal(update.A, start[name].A.bfloat16())
        assert torch.equal(update.c, start[name].c)


def test_the_first_step_is_adamw_on_the_clipped_gradient() -> None:
    """Fresh B is zero, so A has no gradient, and AdamW's first step moves every B by the rate, against its sign."""
    model = tiny.base("llama")
    config = dataclasses.replace(CONFIG, warmup=0.0, weight_decay=0.0)
    start = fresh_adapter(model, config, 0)
    trained = train(model, tiny.passages(20), start, config, 1e-2, 0).adapter
    for name, update in trained.items():
        assert torch.equal(update.A, start[name].A.bfloat16())
        moved = update.B[update.B.abs() > 0].float().abs()
        assert len(moved) > 0.9 * update.B.numel()
        torch.testing.assert_close(moved.median(), torch.tensor(1e-2), rtol=0.02, atol=0)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws() -> None:
    model = tiny.base("gpt2")
    adapter = fresh_adapter(model, CONFIG, 0)
    assert adapter.keys() == target_linears(model).keys()
    for update in adapter.values():
        bound = update.A.shape[1] ** -0.5  # Kaiming with a = √5
        assert bool((update.A.abs() <= bound).all())
        assert 0.4 * bound < float(update.A.std()) < 0.75 * bound  # of a uniform one: bound / √3
        assert not update.B.any()
        assert update.c.tolist() == pytest.approx([16 / 3] * 3)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (10, 0.0), (10, 0.2), (40, 0.05), (7, 0.5)])
def test_the_schedule_rises_over_the_warm_up_and_falls_to_zero(steps: int, warmup: float) -> None:
    rise = warmup * steps
    for step in range(steps):
        rising = (step + 1) / rise if rise > 1 else 1.0
        falling = (steps - step) / (steps - rise) if steps - rise > 1 else steps - step
        assert schedule(step, steps, warmup) == pytest.approx(min(rising, falling, 1.0))
        assert 0 < schedule(step, steps, warmup) <= 1


def test_the_schedule_may_end_above_zero() -> None:
    rates = [schedule(step, 10, 0.0, floor=0.4) for step in range(10)]
    assert rates == pytest.approx([0.4 + 0.6 * (10 - step) / 10 for step in range(10)])


def test_so_many_tokens_are_trained_on_as_are_asked_for() -> None:
    model, passages = tiny.base("llama"), tiny.passages(20, 12, 7)
    one = train(model, passages, fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0)
    again = train(model, passages, fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0, tokens=2 * one.tokens + 1)
    assert 2 * one.tokens < again.tokens <= 3 * one.tokens
    assert train(model, passages, fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0, tokens=1).steps == 1


def test_progress_counts_the_predicted_tokens_of_every_step() -> None:
    seen: list[int] = []
    model, passages = tiny.base("llama"), tiny.passages(20, 12, 7)
    trained = train(model, passages, fresh_adapter(model, CONFIG, 0), CONFIG, 1e-2, 0, progress=seen.append)
    assert sum(seen) == trained.tokens == sum(passage.predicted for passage in passages)
    assert len(seen) == trained.steps == 2


def test_passages_without_labels_are_left_out_and_none_is_an_error() -> None:
    model = tiny.base("llama")
    silent = Passage(torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool))
    start = fresh_adapter(model, CONFIG, 0)
    with_silent = train(model, [silent, *tiny.passages(20, 12)], start, CONFIG, 1e-2, 0)
    assert with_silent.steps == 1
    with pytest.raises(LocalMoEError, match="no passage"):
        train(model, [silent], start, CONFIG, 1e-2, 0)


def test_a_rate_beyond_all_measure_diverges_and_leaves_the_base_as_it_was() -> None:
    model = tiny.base("llama")
    before, modules = tiny.checksum(model), target_linears(model)
    start = fresh_adapter(model, CONFIG, 0)
    with pytest.raises(DivergedError):
        train(model, tiny.passages(20, 12, 7, 16), start, CONFIG, 1e30, 0)
    assert tiny.checksum(model) == before
    assert target_linears(model) == modules
    assert not any(update.B.any() for update in start.values())


def test_a_last_step_that_diverges_is_noticed_too() -> None:
    model = tiny.base("llama")
    with pytest.raises(DivergedError, match="the loss became"):
        train(model, tiny.passages(20), fresh_adapter(model, CONFIG, 0), CONFIG, 1e30, 0)


def test_an_exception_in_the_middle_leaves_the_base_as_it_was() -> None:
    model = tiny.base("llama-tied")
    before, attention = tiny.checksum(model), model.config._attn_implementation

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, tiny.passages(20), tiny.random_adapter(model), CONFIG, 1e-2, 0, progress=stop)
    assert tiny.checksum(model) == before
    assert model.config._attn_implementation == attention
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_was_read_before_comes_last_the_first_time_around() -> None:
    new, read = tiny.passages(20, 12, 7), tiny.passages(9, 16, 5, 6)
    batches = batches_of(new, CONFIG, 0, None, read)
    flat = [id(passage) for batch in batches for passage in batch]
    assert sorted(flat[:3]) == sorted(map(id, new))
    assert sorted(flat[3:]) == sorted(map(id, read))
    again = batches_of(new, CONFIG, 0, 2 * sum(passage.predicted for passage in (*new, *read)), read)
    second = [id(passage) for batch in again for passage in batch][7:]
    assert sorted(second) == sorted(map(id, (*new, *read)))
    assert [[*map(id, batch)] for batch in batches_of(read, CONFIG, 3, None)] == [
        [*map(id, batch)] for batch in batches_of((), CONFIG, 3, None, read)
    ]
