"""Execution of mixes: three ways, one algebra; base weights that stay as they are; what is kept and what is not."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mixing import IDS, TOLERANCE, WAYS, executor, logits_of, mix, oracle, three_adapters

from localmoe.errors import UsageError
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.merging import mergers
from localmoe.models import target_linears
from localmoe.routing import Mix
from localmoe.runtime.execution import TRUNK, Choice, Way, rounded
from localmoe.runtime.execution.executor import _device_bytes

NEGATIVE = {"a": 0.7, "b": -0.4, "c": 1.1}


def _sharing(model: Any) -> tuple[dict[str, Adapter], Adapter]:
    """Two experts that share the A of their trunk, and that trunk."""
    trunk = tiny.random_adapter(model, 9)
    experts = {
        name: {module: LowRank(trunk[module].A, update.B, update.c) for module, update in own.items()}
        for name, own in (("a", tiny.random_adapter(model, 1)), ("b", tiny.random_adapter(model, 2)))
    }
    return experts, trunk


# one algebra


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_way_gives_the_logits_of_the_formula(name: str, way: Way, stay: bool) -> None:
    model = tiny.base(name)
    adapters, before = three_adapters(model), tiny.checksum(model)
    expected = oracle(model, adapters, mix(**NEGATIVE), IDS)
    logits = logits_of(executor(model, adapters), mix(**NEGATIVE), way, stay)
    torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert tiny.checksum(model) == before


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_way_gives_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    model = tiny.base(name)
    adapter = tiny.random_adapter(model)
    with torch.no_grad():
        theirs = tiny.peft_model(model, adapter, tmp_path)(IDS).logits
    run = executor(model, {"a": adapter})
    for way in WAYS:
        torch.testing.assert_close(logits_of(run, mix(a=1.0), way), theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_that_share_their_first_factor_and_their_trunk_merge_exactly(name: str, way: Way) -> None:
    model = tiny.base(name)
    experts, trunk = _sharing(model)
    chosen = mix(a=0.8, b=-0.5, trunk=1.3)
    expected = oracle(model, experts | {TRUNK: trunk}, chosen, IDS)
    run = executor(model, experts, trunk)
    loaded = run.load([chosen])
    assert loaded.active is not None and loaded.active.shared is not None
    torch.testing.assert_close(logits_of(run, chosen, way).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_with_factors_of_its_own_mixes_with_those_that_share_one(way: Way) -> None:
    model = tiny.base("llama")
    experts, trunk = _sharing(model)
    experts["c"] = tiny.random_adapter(model, 3, 2)
    chosen = mix(a=0.8, b=0.5, c=-0.6)
    logits = logits_of(executor(model, experts, trunk), chosen, way)
    expected = oracle(model, experts, chosen, IDS)
    torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_experts_of_equal_contents_count_as_often_as_they_are_in_the_mix(way: Way) -> None:
    model = tiny.base("llama")
    same = tiny.random_adapter(model, 1)
    adapters = {"a": same, "b": same, "c": tiny.random_adapter(model, 2)}
    run, chosen = executor(model, adapters), mix(a=0.5, b=0.3, c=0.2)
    for record in run.bank.manifest.experts[:2]:
        record.adapter.sha256 = "one content"
    expected = oracle(model, adapters, chosen, IDS)
    torch.testing.assert_close(logits_of(run, chosen, way).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_mixes_that_differ_in_why_they_were_chosen_alone_are_one() -> None:
    model = tiny.base("llama")
    run = executor(model, {"a": tiny.random_adapter(model)})
    assert len(run.load([mix(a=1.0), replace(mix(a=1.0), fallback="nothing was near")]).mixes) == 1


@pytest.mark.parametrize("way", WAYS)
def test_scaling_that_differs_between_modules_and_rows_is_kept(way: Way) -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    adapters["b"] = {
        module: LowRank(update.A, update.B, torch.rand(update.rank) + place)
        for place, (module, update) in enumerate(adapters["b"].items())
    }
    expected = oracle(model, adapters, mix(a=0.5, b=0.1), IDS)
    logits = logits_of(executor(model, adapters), mix(a=0.5, b=0.1), way)
    torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_experts_of_a_few_modules_leave_the_others_alone_and_nothing_stays_of_the_mix_before(way: Way) -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    few = {name: dict(list(adapter.items())[:3]) for name, adapter in adapters.items()}
    both = adapters | {f"few-{name}": adapter for name, adapter in few.items()}
    run = executor(model, both)
    logits_of(run, mix(**NEGATIVE), way)
    chosen = Mix(("few-a", "few-b"), (0.5, 0.4), "linear", "digest", None)
    left_out = {m: LowRank(u.A * 0, u.B, u.c) for m, u in adapters["a"].items() if m not in few["a"]}
    expected = oracle(model, {f"few-{name}": adapter | left_out for name, adapter in few.items()}, chosen, IDS)
    torch.testing.assert_close(logits_of(run, chosen, way).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_the_logits_are_within_a_bf16_models_own_error(way: Way) -> None:
    # the oracle of the bf16 model is itself off by what its activations are rounded by
    model = tiny.causal_model("llama", **tiny.LLAMA).bfloat16()
    adapters = {
        n: {m: LowRank(u.A.bfloat16(), u.B.bfloat16(), u.c) for m, u in a.items()}
        for n, a in three_adapters(model).items()
    }
    expected = oracle(model, adapters, mix(**NEGATIVE), IDS)
    rounding = (model(IDS).logits.double() - oracle(model, {}, mix(), IDS)).abs().mean()
    error = (logits_of(executor(model, adapters), mix(**NEGATIVE), way).double() - expected).abs().mean()
    assert error < 2 * rounding


def test_every_row_of_a_batch_has_its_own_mix() -> None:
    for name in tiny.ARCHITECTURES:
        model = tiny.base(name)
        adapters = three_adapters(model)
        mixes = [mix(a=1.0), mix(b=0.5, c=-0.5), mix(), mix(a=0.3, c=0.7)]
        ids = torch.stack([passage.tokens for passage in tiny.passages(9, 9, 9, 9)])
        run = executor(model, adapters)
        with torch.no_grad(), run.attached(run.load(mixes), "grouped", stay=True):
            logits = model(ids).logits
        for row, chosen in enumerate(mixes):
            expected = oracle(model, adapters, chosen, ids[row : row + 1])[0]
            torch.testing.assert_close(logits[row].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_row_of_a_batch_has_its_own_mix_of_experts_that_share_a_factor() -> None:
    model = tiny.base("llama")
    experts, trunk = _sharing(model)
    mixes = [mix(a=1.0), mix(a=0.5, b=-0.5), mix(), mix(b=0.3, trunk=0.7)]
    ids = torch.stack([passage.tokens for passage in tiny.passages(9, 9, 9, 9)])
    run = executor(model, experts, trunk)
    with torch.no_grad(), run.attached(run.load(mixes), "grouped"):
        logits = model(ids).logits
    for row, chosen in enumerate(mixes):
        expected = oracle(model, experts | {TRUNK: trunk}, chosen, ids[row : row + 1])[0]
        torch.testing.assert_close(logits[row].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


# merge methods


def test_a_method_that_is_low_rank_or_dense_runs_where_it_can() -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    expected = oracle(model, adapters, mix(a=0.5, b=0.5), IDS)

    @mergers.register("test-dense")
    def dense(updates: Any) -> torch.Tensor:
        return torch.stack([update.delta() for update in updates]).sum(0)

    @mergers.register("test-low-rank")
    def low_rank(updates: Any) -> LowRank:
        return mergers["linear"](updates)

    run = executor(model, adapters)
    try:
        for method, ways in (("test-dense", WAYS[:1]), ("test-low-rank", WAYS)):
            for way in ways:
                chosen = Mix(("a", "b"), (0.5, 0.5), method, "digest", None)
                logits = logits_of(run, chosen, way)
                torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
        with pytest.raises(UsageError, match="dense updates"):
            logits_of(run, Mix(("a", "b"), (0.5, 0.5), "test-dense", "digest", None), "stacked")
    finally:
        for method in ("test-dense", "test-low-rank"):
            mergers._functions.pop(method)


# what is left behind


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_base_is_as_it_was_after_exceptions(name: str, way: Way) -> None:
    model = tiny.base(name)
    before, run = tiny.checksum(model), executor(model, three_adapters(model))
    with torch.no_grad():
        plain = model(IDS).logits
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), run.attached(run.load([mix(a=1.0)]), way):
                assert not torch.equal(model(IDS).logits, plain)
                raise ZeroDivisionError
        assert torch.equal(model(IDS).logits, plain)
    assert tiny.checksum(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_mix_without_experts_is_the_base_itself(way: Way) -> None:
    model = tiny.base("llama")
    run = executor(model, three_adapters(model))
    logits_of(run, mix(a=1.0), way)
    with torch.no_grad():
        assert torch.equal(logits_of(run, mix(), way), model(IDS).logits)


def test_what_one_phase_begins_another_goes_on_with() -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    run = executor(model, adapters)
    expected = oracle(model, adapters, mix(**NEGATIVE), IDS)
    for choice in (Choice("stacked", "dense"), Choice("dense", "stacked"), Choice("grouped", "grouped")):
        loaded = run.load([mix(**NEGATIVE)])
        with torch.inference_mode(), run.running(loaded, choice) as running:
            first = model(IDS[:, :5], use_cache=True)
            running.decode()
            rest = model(IDS[:, 5:], past_key_values=first.past_key_values).logits
        logits = torch.cat([first.logits, rest], dim=1)
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    # memory that was first written in inference mode is written outside it
    logits_of(run, mix(b=1.0), "dense")
    logits_of(run, mix(b=1.0), "stacked", stay=True)


# caches


def test_a_repeated_mix_is_not_merged_again_and_a_changed_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    gathered: list[int] = []
    for run in (executor(model, adapters), executor(model, adapters, mix_cache=False)):
        for workspace in (*run.dense._workspaces, run.beside.staying):
            fill = workspace.fill

            def counted(index: int, *rest: Any, fill: Any = fill, **more: Any) -> Any:
                gathered.append(index)
                return fill(index, *rest, **more)

            monkeypatch.setattr(workspace, "fill", counted)
        blocks = len(run.layout.blocks)
        for way in ("dense", "stacked"):
            for weight, again in ((0.5, 1), (0.5, 0), (0.5 + 1e-7, 1), (0.5, 1)):
                gathered.clear()
                logits = logits_of(run, mix(a=weight, b=0.5), way, stay=True)
                expected = oracle(model, adapters, mix(a=weight, b=0.5), IDS)
                torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
                assert len(gathered) == blocks * (again if run.config.mix_cache else 1)


def test_factors_that_stay_are_those_of_their_mix_after_another_has_passed() -> None:
    model = tiny.base("llama")
    adapters = three_adapters(model)
    run = executor(model, adapters)
    for chosen, stay in ((mix(a=1.0), True), (mix(b=1.0), False), (mix(a=1.0), True), (mix(b=1.0), True)):
        expected = oracle(model, adapters, chosen, IDS)
        logits = logits_of(run, chosen, "stacked", stay)
        torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_experts_are_read_when_they_are_used_and_leave_when_memory_is_full() -> None:
    model = tiny.base("llama")
    adapters = {f"e{i:04d}": tiny.random_adapter(model, seed=i % 7, rank=1) for i in range(1000)}
    run = executor(model, adapters)
    assert run.host.bytes == 0
    run.load([mix(e0001=0.5, e0900=0.5)])
    one = run.host.bytes // 2
    assert one == sum(update.A.nbytes + update.B.nbytes for update in adapters["e0001"].values())
    small = executor(model, adapters, host_bytes=2 * one)
    for names in (("e0001", "e0002"), ("e0001", "e0003"), ("e0001", "e0002", "e0003")):
        chosen = mix(**dict.fromkeys(names, 0.5))
        expected = oracle(model, adapters, chosen, IDS)
        torch.testing.assert_close(
            logits_of(small, chosen, "stacked").double(), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
        assert small.host.bytes <= 2 * one
    assert "hash of e0001" not in small.host
    nothing = executor(model, adapters, host_bytes=0)
    nothing.load([mix(e0001=1.0)])
    assert nothing.host.bytes == 0


def test_prefetched_experts_are_in_memory_and_errors_wait_in_the_future() -> None:
    model = tiny.base("llama")
    run = executor(model, three_adapters(model))
    run.prefetch(["a", "c"]).result(timeout=60)
    assert "hash of a" in run.host and "hash of b" not in run.host
    with pytest.raises(KeyError):
        run.prefetch(["nobody"]).result(timeout=60)


def test_a_program_that_ends_while_experts_are_prefetched_ends_well() -> None:
    program = """
import tiny
from mixing import executor
model = tiny.causal_model("llama", **(tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 768}))
one = tiny.random_adapter(model, 1, 16)
run = executor(model, {f"e{i}": one for i in range(200)})
run.prepare()
run.prefetch([f"e{i}" for i in range(200)])
"""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, *here.parents[:2], *sys.path)))
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=120)


def test_a_prefetch_that_is_cancelled_stops_after_the_expert_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun, go_on = executor(tiny.base("llama"), {}), threading.Event(), threading.Event()
    loaded, before = list[str](), set(threading.enumerate())

    def slowly(name: str) -> None:
        loaded.append(name)
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(run, "_expert", slowly)
    future = run.prefetch(["a", "b", "c"])
    assert begun.wait(60) and future.cancel()
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert loaded == ["a"]


def test_experts_on_a_gpu_leave_room_for_the_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.base("llama")
    run = executor(model, {"a": tiny.random_adapter(model)})
    weights = sum(weight_of(module).nbytes for module in target_linears(model).values())
    assert run.dense.bytes_missing == weights
    logits_of(run, mix(a=1.0), "dense")
    assert run.dense.bytes_missing == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 if device.index == 1 else 0, 2000))
    device = torch.device("cuda", 1)
    assert _device_bytes(run.config, device, 400) == 300
    assert _device_bytes(run.config, device, 4000) == 0
    assert _device_bytes(replace(run.config, device_bytes=7), device, 400) == 7


def test_rounded_weights_are_multiples_that_keep_their_sum_and_never_nothing() -> None:
    assert rounded(mix(a=0.52, b=0.47, c=0.01), 4) == mix(a=0.5, b=0.5)
    assert rounded(mix(a=0.1), 4) == mix(a=0.1)
    assert rounded(mix(a=0.3, b=0.3, c=0.1, d=0.1, e=0.1, f=0.1), 4) == mix(a=0.25, b=0.25, c=0.25, d=0.25)
    assert rounded(mix(a=1.25, b=-0.25), 2) == mix(a=1.5, b=-0.5)
