"""Products with factors where they lie, against the formula in fp64, and a base that runs with them."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mixing import executor, mix, oracle

from localmoe.lora import Adapter
from localmoe.models import target_linears
from localmoe.runtime.execution import dense, kernels
from localmoe.runtime.execution.kernels import Buffer, Level, Located, address

LEVELS: tuple[Level, ...] = (1, 2)
TOLERANCE = 2**-6  # bf16 has 8 bits; n and the sums are rounded to it once, and thousands of numbers compared
HERE = pytest.mark.skipif(kernels.level() == 0, reason="no compiler when LocalMoE was installed, or no AVX-512 BF16")


def _here(level: Level) -> None:
    if level > kernels.level():
        pytest.skip("this processor has no AMX")


def _located(factors: list[torch.Tensor], places: list[int]) -> Located:
    where = np.array([factor.data_ptr() for factor in factors])
    rows, starts = np.array([len(factor) for factor in factors]), np.array(places)
    return Located(address(where), address(rows), address(starts), len(factors), (where, rows, starts, factors))


def _factors(ranks: list[int], width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rank, width, generator=generator).bfloat16() for rank in ranks]


RANKS = st.lists(st.integers(0, 70), min_size=1, max_size=4)


@HERE
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@example(ranks=[64, 64], tokens=33, d=64, each=True, threads=2)
@example(ranks=[16], tokens=1, d=32, each=False, threads=1)
@given(RANKS, st.integers(1, 70), st.sampled_from([32, 64, 96]), st.booleans(), st.integers(1, 2))
def test_narrow_is_the_formula(level: Level, ranks: list[int], tokens: int, d: int, each: bool, threads: int) -> None:
    _here(level)
    before = torch.get_num_threads()
    x, A = torch.randn(tokens, d).bfloat16(), _factors(ranks, d, 1)
    weights = torch.randn(tokens if each else 1, len(ranks))
    places = np.cumsum([0, *ranks]).tolist()
    try:
        torch.set_num_threads(threads)
        found = kernels.narrow(level, x, _located(A, places[:-1]), weights, places[-1], Buffer())
    finally:
        torch.set_num_threads(before)
    expected = [weights[:, k : k + 1].double() * (x.double() @ A_k.double().T) for k, A_k in enumerate(A)]
    torch.testing.assert_close(found.double(), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4 * d**0.5)


@HERE
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@example(ranks=[64, 64], tokens=33, d_out=128, threads=2)
@example(ranks=[1], tokens=1, d_out=1, threads=2)
@given(RANKS, st.integers(1, 70), st.integers(1, 200), st.integers(1, 2))
def test_widen_is_the_formula(level: Level, ranks: list[int], tokens: int, d_out: int, threads: int) -> None:
    _here(level)
    before = torch.get_num_threads()
    gap = 3  # numbers of another target between those of two experts
    places = np.cumsum([gap, *(rank + gap for rank in ranks)]).tolist()
    n, y, Bt = torch.randn(tokens, places[-1]), torch.randn(tokens, d_out).bfloat16(), _factors(ranks, d_out, 2)
    expected = y.double()
    for Bt_k, place in zip(Bt, places, strict=False):
        expected += n[:, place : place + len(Bt_k)].double() @ Bt_k.double()
    try:
        torch.set_num_threads(threads)
        kernels.widen(level, y, _located(Bt, places[:-1]), n, Buffer())
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE, atol=TOLERANCE * (1 + sum(ranks)) ** 0.5)


@HERE
@settings(max_examples=40, deadline=None)
@example(ranks=[64, 64], d=64, d_out=128, threads=2)
@example(ranks=[1, 33], d=32, d_out=17, threads=2)
@given(RANKS, st.sampled_from([1, 32, 96]), st.integers(1, 200), st.integers(1, 2))
def test_laid_factors_are_the_formula(ranks: list[int], d: int, d_out: int, threads: int) -> None:
    before = torch.get_num_threads()
    A, Bt, weights = _factors(ranks, d, 4), _factors(ranks, d_out, 5), torch.randn(len(ranks))
    all_A = torch.full((sum(ranks), d), 7.0).bfloat16()
    all_B = torch.full((d_out, sum(ranks)), 7.0).bfloat16()
    try:
        torch.set_num_threads(threads)
        kernels.lay(_located(A, [0] * len(A)), _located(Bt, [0] * len(A)), weights, all_A, all_B)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(all_A, torch.cat(A))
    scaled = [(Bt_k.float() * weight).bfloat16() for Bt_k, weight in zip(Bt, weights, strict=True)]
    assert torch.equal(all_B, torch.cat(scaled).T)


@HERE
@given(st.integers(1, 5), st.integers(1, 5000))
def test_the_sum_is_the_formula_rounded_once(parts: int, count: int) -> None:
    factors = _factors([1] * parts, count, 3)
    weights, out = torch.randn(parts), torch.empty(count, dtype=torch.bfloat16)
    kernels.add(factors, weights, out)
    expected = sum(weights[k].double() * factor[0].double() for k, factor in enumerate(factors))
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


def _wide() -> tuple[Any, dict[str, Adapter]]:
    """A base whose inputs are multiples of 32 numbers, and three experts."""
    model = tiny.causal_model("llama", **(tiny.LLAMA | {"intermediate_size": 64})).bfloat16()
    return model, {key: tiny.random_adapter(model, seed, 4) for key, seed in (("a", 1), ("b", 2), ("c", 3))}


@HERE
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [False, True])
def test_a_base_gives_the_logits_of_gathered_factors(
    level: Level, batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _here(level)
    model, adapters = _wide()
    mixes = [mix(a=0.7, b=-0.4), mix(b=0.2, c=0.9)] if batch else [mix(a=0.7, b=-0.4, c=1.1)]
    ids = torch.stack([tiny.passages(9, seed)[0].tokens for seed in range(len(mixes))])
    found, calls = [], []
    monkeypatch.setattr(kernels, "narrow", _counted(kernels.narrow, calls))
    for at in (level, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters)
        with torch.inference_mode(), run.attached(run.load(mixes), "grouped" if batch else "stacked"):
            found.append(model(ids).logits.float())
        assert (len(calls) > 0) == (level > 0)
    exact = torch.cat([oracle(model, adapters, one, row[None]) for one, row in zip(mixes, ids, strict=True)])
    error, gathered = ((one.double() - exact).abs().mean() for one in found)
    assert error < 1.2 * gathered  # both round to bf16; the kernels less often


@HERE
def test_a_dense_merge_is_the_same_as_from_gathered_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = _wide()
    adapters["b"] = tiny.random_adapter(model, 2, 7)
    ids, found, calls = tiny.passages(9)[0].tokens[None], [], []
    monkeypatch.setattr(dense, "lay", _counted(dense.lay, calls))
    for at in (kernels.level(), 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters)
        with torch.inference_mode(), run.attached(run.load([mix(a=0.7, b=-0.4, c=1.1)]), "dense"):
            found.append(model(ids).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)  # B is laid out otherwise, so sums differ
    assert len(calls) == len(adapters["a"])


def _counted(function: Any, calls: list[Level]) -> Any:
    def work(level: Level, *rest: Any) -> Any:
        calls.append(level)
        return function(level, *rest)

    return work


def test_without_a_compiled_file_there_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "EXTENSION_SUFFIXES", [".of-no-machine"])
    kernels._library.cache_clear()
    kernels.level.cache_clear()
    try:
        assert kernels.level() == 0
        with pytest.raises(RuntimeError, match="not compiled"):
            kernels.add([torch.zeros(1)], torch.ones(1), torch.zeros(1))
    finally:
        kernels._library.cache_clear()
        kernels.level.cache_clear()


def test_a_file_of_another_version_or_that_holds_nothing_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    source = Path(kernels.__file__).with_name("kernels.c")
    for options in (["-U__linux__"], ["-Dlocalmoe_version=of_old"]):
        file = tmp_path / "kernels_c.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-w", *options, str(source), "-o", str(file)], check=True)
        monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
        monkeypatch.setattr(kernels, "EXTENSION_SUFFIXES", [".so"])
        kernels._library.cache_clear()
        kernels.level.cache_clear()
        try:
            assert kernels.level() == 0
        finally:
            kernels._library.cache_clear()
            kernels.level.cache_clear()
            file.unlink()


@HERE
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("missing", ["q_proj", "gate_proj", "down_proj"])
def test_targets_that_no_expert_changes_are_left_out(
    level: Level, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _here(level)
    model, adapters = _wide()
    fewer = {
        name: {module: update for module, update in adapter.items() if not module.endswith(missing)}
        for name, adapter in adapters.items()
    }
    chosen, ids, errors = mix(a=0.7, b=-0.4, c=1.1), tiny.passages(9)[0].tokens[None], []
    exact = copy.deepcopy(model).double()
    for name, module in target_linears(exact).items():
        for expert, weight in zip(chosen.experts, chosen.weights, strict=True):
            if name in fewer[expert]:
                module.weight.data += weight * fewer[expert][name].delta().double()  # type: ignore[operator]
    for at in (level, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, fewer)
        with torch.inference_mode(), run.attached(run.load([chosen]), "stacked"):
            errors.append((model(ids).logits.double() - exact(ids).logits).abs().mean())
    assert errors[0] < 1.2 * errors[1]


@HERE
def test_gradients_go_the_way_of_gathered_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = _wide()
    found = []
    for at in (kernels.level(), 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters)
        inputs = model.get_input_embeddings()(tiny.passages(9)[0].tokens[None]).detach().requires_grad_()
        with run.attached(run.load([mix(a=1.0)]), "stacked"):
            model(inputs_embeds=inputs).logits.float().sum().backward()
        found.append(inputs.grad)
    assert torch.equal(found[0], found[1])


@HERE
def test_more_rows_than_the_kernels_take_are_gathered_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = _wide()
    monkeypatch.setattr(kernels, "TOKENS", {0: 0, 1: 4, 2: 4})
    run, calls = executor(model, adapters), []
    filled = run.beside.staying.fill
    monkeypatch.setattr(run.beside.staying, "fill", lambda *given, **more: calls.append(0) or filled(*given, **more))
    ids = tiny.passages(9)[0].tokens[:1].repeat(6, 1)
    with torch.inference_mode(), run.attached(run.load([mix(a=1.0, b=0.5)]), "stacked", stay=True):
        for _ in range(3):
            model(ids)
    assert len(calls) == len(run.layout.blocks)
