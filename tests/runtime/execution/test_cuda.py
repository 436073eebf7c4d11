"""Execution on a GPU: the same algebra, experts in either memory, and nothing on the way that waits for the GPU."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from mixing import TOLERANCE, executor, mix, oracle

from localmoe.config import GenerateConfig
from localmoe.lora import Adapter, LowRank
from localmoe.routing import Mix
from localmoe.runtime.drawing import draw
from localmoe.runtime.execution import Choice, Executor, Way

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

WAYS: tuple[Way, ...] = ("dense", "stacked", "grouped")
MIX = mix(a=0.7, b=-0.4, c=1.1)
IDS = tiny.passages(9)[0].tokens[None]


def _adapters(model: Any) -> dict[str, Adapter]:
    """Three experts of different ranks."""
    return {
        name: tiny.random_adapter(model, seed, rank) for name, seed, rank in (("a", 1, 2), ("b", 2, 3), ("c", 3, 1))
    }


def _sharing(model: Any) -> tuple[dict[str, Adapter], Adapter]:
    """Three experts that share the A of their trunk, and that trunk."""
    trunk = tiny.random_adapter(model, 9)
    return {
        name: {
            module: LowRank(trunk[module].A, update.B, update.c)
            for module, update in tiny.random_adapter(model, seed).items()
        }
        for name, seed in (("a", 1), ("b", 2), ("c", 3))
    }, trunk


def _there(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(model).to("cuda", dtype)


@torch.no_grad()
def _logits(run: Executor, way: Way, stay: bool = False) -> torch.Tensor:
    with run.attached(run.load([MIX]), way, stay):
        logits: torch.Tensor = run.model(IDS.cuda()).logits
    return logits.cpu()


@contextmanager
def _unwaited() -> Iterator[None]:
    """Whatever waits for the GPU in here raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"device_bytes": 0}])
def test_every_way_gives_the_logits_of_the_formula(name: str, way: Way, stay: bool, settings: dict[str, int]) -> None:
    model = tiny.base(name)
    adapters = _adapters(model)
    run = executor(_there(model), adapters, **settings)
    expected = oracle(model, adapters, MIX, IDS)
    for _ in range(2):
        torch.testing.assert_close(_logits(run, way, stay).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_that_share_their_first_factor_give_the_logits_of_the_formula(name: str, way: Way) -> None:
    model = tiny.base(name)
    adapters, trunk = _sharing(model)
    logits = _logits(executor(_there(model), adapters, trunk), way)
    torch.testing.assert_close(logits.double(), oracle(model, adapters, MIX, IDS), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_the_logits_are_within_a_bf16_models_own_error(way: Way) -> None:
    model = tiny.base("llama")
    adapters, there = _adapters(model), _there(model, torch.bfloat16)
    logits = _logits(executor(there, adapters), way).double()
    expected = oracle(model, adapters, MIX, IDS)
    assert float((logits - expected).norm() / expected.norm()) < 0.05


@torch.no_grad()
def test_every_row_of_a_batch_has_its_own_mix_and_rows_may_leave() -> None:
    model = tiny.base("llama")
    adapters = _adapters(model)
    mixes = [mix(a=0.7, b=0.3), mix(c=1.0), mix(a=0.2, c=-0.5)]
    expected = torch.cat([oracle(model, adapters, chosen, IDS) for chosen in mixes])
    run = executor(_there(model), adapters)
    with run.running(run.load(mixes), Choice("grouped", "grouped")) as running:
        logits = run.model(IDS.cuda().repeat(3, 1)).logits.double().cpu()
        torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
        running.keep([0, 2])
        logits = run.model(IDS.cuda().repeat(2, 1)).logits.double().cpu()
        torch.testing.assert_close(logits, expected[[0, 2]], rtol=TOLERANCE, atol=TOLERANCE)


def test_experts_stay_on_the_gpu_or_in_pinned_memory() -> None:
    model = tiny.base("llama")
    run = executor(_there(model), _adapters(model))
    first, again = run.load([MIX]).active, run.load([MIX]).active
    assert first is not None and again is not None
    assert first.experts == again.experts
    assert all(block.is_cuda for block in first.experts[0].blocks)
    run = executor(_there(model), _adapters(model), device_bytes=0)
    first, again = run.load([MIX]).active, run.load([MIX]).active
    assert first is not None and again is not None
    assert not set(first.experts) & set(again.experts)
    assert all(block.is_pinned() for block in run.host.get("hash of a", pytest.fail).blocks)


@pytest.mark.parametrize("settings", [{}, {"device_bytes": 0}])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_between_a_mix_and_its_model_waits_for_the_gpu(way: Way, settings: Mapping[str, int]) -> None:
    model = tiny.base("llama")
    run = executor(_there(model), _adapters(model), mix_cache=False, **settings)
    _logits(run, way)
    for _ in range(3):  # dense: the first time captured, then replayed
        with _unwaited(), run.attached(run.load([MIX]), way):
            pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("error:merging goes on without CUDA graphs")
def test_graphs_replay_what_mixes_of_a_kind_have_in_common_alone(name: str, dtype: torch.dtype) -> None:
    model = tiny.base(name)
    adapters = {letter: tiny.random_adapter(model, seed) for seed, letter in enumerate("abcd", start=1)}
    small, there = _there(model, dtype), _there(model, dtype)
    room = 2 * executor(small, adapters).load([mix(a=1.0)]).active.experts[0].bytes  # type: ignore[union-attr]
    run = executor(there, adapters, mix_cache=False, device_bytes=room)  # two experts stay: others push them out
    two = [mix(a=0.7, b=-0.4), mix(c=1.1, d=0.2), mix(a=-0.3, d=0.9)]
    three = [mix(a=0.5, b=0.4, c=-1.0), mix(b=1.0, c=0.3, d=0.1)]
    for chosen in [*two, *three, *two, three[1], two[0], three[0], mix(d=1.0), two[1], mix(a=0.4), mix(b=-1.0)]:
        expected = oracle(model, adapters, chosen, IDS)
        with torch.no_grad(), run.attached(run.load([chosen]), "dense"):
            logits = run.model(IDS.cuda()).logits.double().cpu()
        if dtype == torch.float32:
            torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert float((logits - expected).norm() / expected.norm()) < 0.05
    graphs = run.dense._graphs.graphs
    assert len(graphs) == 3
    assert all(graph is not None for graph in graphs.values())


def test_merges_that_follow_without_a_wait_do_not_meet() -> None:
    model = _there(tiny.base("llama"))
    adapters = {letter: tiny.random_adapter(model, seed) for seed, letter in enumerate("abc", start=1)}
    mixes = [mix(a=number / 10, b=1.0) for number in range(1, 12)]

    def merged(run: Executor, chosen: Mix) -> torch.Tensor:
        with torch.no_grad(), run.attached(run.load([chosen]), "dense"):
            return torch.cat([target.module.weight.flatten() for target in run.layout.targets])  # type: ignore[operator]

    replayed, eager = executor(model, adapters), executor(model, adapters)
    kept = [merged(replayed, chosen) for chosen in mixes]
    for chosen, weights in zip(mixes, kept, strict=True):
        eager.dense._graphs.graphs.clear()  # kernel by kernel
        torch.testing.assert_close(weights, merged(eager, chosen), rtol=1e-5, atol=1e-6)


def test_tokens_of_a_batch_are_those_of_each_prompt_alone() -> None:
    model = _there(tiny.base("llama"))
    prompts = [passage.tokens[None].cuda() for passage in tiny.passages(9, 5)]
    config = GenerateConfig(max_new_tokens=4)
    together = [step.tokens for step in draw(model, prompts, config)]
    for row, prompt in enumerate(prompts):
        alone = [step.tokens[0] for step in draw(model, [prompt], config)]
        assert [tokens[row] for tokens in together if row in tokens] == alone
