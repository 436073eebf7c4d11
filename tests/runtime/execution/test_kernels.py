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
from torch import nn

from localmoe.lora import Adapter, LowRank
from localmoe.models import target_linears
from localmoe.runtime.execution import dense, kernels
from localmoe.runtime.execution.choice import Way
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


def _inside(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same numbers in memory that begins after `gap` NaNs, and that NaNs follow."""
    memory = torch.full((values.numel() + 2 * gap + 64,), torch.nan).bfloat16()
    memory[gap : gap + values.numel()] = values.flatten()
    return memory[gap : gap + values.numel()].view(values.shape)


LINEARS = st.lists(st.tuples(RANKS, st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=4)


@HERE
@settings(max_examples=60, deadline=None)
@example(linears=[([64, 64], 64, 128), ([16, 16, 16], 96, 32)], gap=32, threads=2)
@example(linears=[([1], 1, 1), ([0, 0], 5, 7), ([0, 33], 33, 31)], gap=3, threads=2)
@example(linears=[([200, 321, 0], 700, 40)], gap=0, threads=2)  # columns in two parts
@example(linears=[([900, 250], 700, 65), ([30, 3], 31, 40)], gap=1, threads=3)  # in two passes, and in one
@example(linears=[([8], 40, 1600), ([777], 40, 1600)], gap=5, threads=2)  # rows in two parts
@given(LINEARS, st.integers(0, 40), st.integers(1, 3))
def test_a_merge_by_tiles_is_the_formula_and_writes_nowhere_else(
    linears: list[tuple[list[int], int, int]], gap: int, threads: int
) -> None:
    _here(2)
    before, experts = torch.get_num_threads(), max(len(ranks) for ranks, _, _ in linears)
    counts = [ranks + [0] * (experts - len(ranks)) for ranks, _, _ in linears]
    weights = torch.randn(experts)
    A = [[_inside(one, gap) for one in _factors(row, d, 6)] for row, (_, d, _) in zip(counts, linears, strict=True)]
    Bt = [[_inside(one, gap) for one in _factors(row, o, 7)] for row, (_, _, o) in zip(counts, linears, strict=True)]
    W = [_inside(torch.randn(d_out, d).bfloat16(), gap) for _, d, d_out in linears]
    canaries = [torch.full((one.numel() + 2 * gap + 64,), 7.0).bfloat16() for one in W]
    out = [memory[gap : gap + one.numel()].view(one.shape) for memory, one in zip(canaries, W, strict=True)]
    try:
        torch.set_num_threads(threads)
        kernels.merge(_addresses(W, out), _merged(A, Bt, counts), weights, Buffer())
    finally:
        torch.set_num_threads(before)
    for found, one, A_l, Bt_l, memory in zip(out, W, A, Bt, canaries, strict=True):
        scaled = [(part.float() * weight).bfloat16().double() for part, weight in zip(Bt_l, weights, strict=True)]
        expected = one.double() + sum(part.T @ A_k.double() for part, A_k in zip(scaled, A_l, strict=True))
        size = sum(part.abs().T @ A_k.double().abs() for part, A_k in zip(scaled, A_l, strict=True)) + 1e-30
        error = (found.double() - expected).abs()
        assert bool((error <= 2**-8 * expected.abs() + 1e-6 * size).all())  # half a unit of bf16, and sums in fp32
        assert bool((memory[:gap] == 7).all() and (memory[gap + one.numel() :] == 7).all())


def _addresses(W: list[torch.Tensor], out: list[torch.Tensor]) -> Any:
    """The linears as `kernels.merge` takes them."""
    pairs = zip(W, out, strict=True)
    return np.array([(one.shape[1], one.shape[0], one.data_ptr(), to.data_ptr()) for one, to in pairs]).T.copy()


def _merged(A: list[list[torch.Tensor]], Bt: list[list[torch.Tensor]], counts: list[list[int]]) -> kernels.Factors:
    where = [np.array([[one.data_ptr() for one in row] for row in factor]) for factor in (A, Bt)]
    return kernels.Factors(*where, np.array(counts))


@HERE
def test_a_merge_by_tiles_keeps_infinities_and_nan_in_their_places() -> None:
    _here(2)
    W, A, Bt = torch.randn(40, 40).bfloat16(), torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    W[3, 4], A[0, 7] = torch.nan, torch.inf
    out = torch.empty_like(W)
    kernels.merge(_addresses([W], [out]), _merged([[A, A]], [[Bt, Bt]], [[3, 3]]), torch.ones(2), Buffer())  # one twice
    expected = W.float() + 2 * Bt.float().T @ A.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-6, equal_nan=True)


@HERE
@given(st.integers(1, 5), st.integers(1, 5000), st.integers(1, 4))
def test_sums_are_the_formula_rounded_once(parts: int, count: int, sets: int) -> None:
    factors = _factors([1] * parts, count, 3)
    weights, out = torch.randn(sets, parts), torch.full((sets, count), 7.0).bfloat16()
    weights[torch.rand(sets, parts) < 0.3] = 0  # some are not read, perhaps none
    kernels.add([factor[0] for factor in factors], weights, out)
    expected = weights.double() @ torch.cat(factors).double()
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


class _Odd(nn.Linear):
    """A linear of another kind, whose result has other strides, or is of another dtype."""

    wide = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.float() if self.wide else y.repeat_interleave(2, dim=-1)[..., ::2]


@HERE
@pytest.mark.parametrize("wide", [False, True])
def test_what_a_linear_of_another_kind_gives_is_left_in_its_strides_and_dtype(wide: bool) -> None:
    model, adapters = _wide()
    expected = oracle(model, adapters, mix(a=0.7, b=-0.4), tiny.passages(9)[0].tokens[None])
    odd = model.model.layers[-1].mlp.down_proj  # nothing reads it but the sum of the residual stream
    odd.__class__ = _Odd
    odd.wide = wide
    model.model.norm.register_forward_hook(lambda _module, _inputs, normed: normed.bfloat16())
    run = executor(model, adapters)
    with torch.inference_mode(), run.attached(run.load([mix(a=0.7, b=-0.4)]), "stacked"):
        logits = model(tiny.passages(9)[0].tokens[None]).logits
    torch.testing.assert_close(logits.double(), expected, rtol=0.1, atol=0.1)


@HERE
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dense_merge_is_as_exact_as_from_gathered_factors(
    level: Level, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _here(level)
    model, adapters = _wide()
    if name == "gpt2":
        model = tiny.causal_model("gpt2").bfloat16()
        adapters = {key: tiny.random_adapter(model, seed, 4) for key, seed in (("a", 1), ("c", 3))}
    adapters["b"] = tiny.random_adapter(model, 2, 7)
    chosen, ids = mix(a=0.7, b=-0.4, c=1.1), tiny.passages(9)[0].tokens[None]
    exact, errors, laid, merged = oracle(model, adapters, chosen, ids), [], [], []
    monkeypatch.setattr(dense, "lay", _counted(dense.lay, laid))
    monkeypatch.setattr(dense, "merge", _counted(dense.merge, merged))
    for at in (level, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters)
        with torch.inference_mode(), run.attached(run.load([chosen]), "dense"):
            errors.append((model(ids).logits.double() - exact).abs().mean())
    assert errors[0] < 1.2 * errors[1]
    by_tiles = level == 2 and name == "llama"  # GPT-2 keeps its weights transposed
    assert (len(laid), len(merged)) == ((0, 1) if by_tiles else (len(adapters["a"]), 0))


@HERE
def test_experts_of_one_a_are_summed_and_then_merged_by_tiles_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _here(2)
    model, _ = _wide()
    trunk = tiny.random_adapter(model, 1, 4)
    own = {key: tiny.random_adapter(model, seed, 4) for key, seed in (("a", 2), ("b", 3), ("c", 4))}
    adapters = {
        key: {name: LowRank(trunk[name].A, one[name].B, trunk[name].c) for name in trunk} for key, one in own.items()
    }
    ids, errors, merged = tiny.passages(9)[0].tokens[None], [], []
    monkeypatch.setattr(dense, "merge", _counted(dense.merge, merged))
    for at in (2, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters, trunk)
        for chosen in (mix(a=0.7, b=-0.4, c=1.1), mix(a=0.2, c=0.8)):  # the second in the same memory
            exact = oracle(model, adapters, chosen, ids)
            with torch.inference_mode(), run.attached(run.load([chosen]), "dense"):
                errors.append((model(ids).logits.double() - exact).abs().mean())
    assert errors[0] < 1.2 * errors[2] and errors[1] < 1.2 * errors[3]
    assert len(merged) == 2


@HERE
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stay", [False, True])
def test_experts_of_one_a_run_beside_the_weights_as_one(
    level: Level, stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _here(level)
    model, alone = _wide()
    trunk = tiny.random_adapter(model, 1, 4)
    adapters: dict[str, Adapter] = {
        key: {name: LowRank(trunk[name].A, one[name].B, trunk[name].c) for name in trunk} for key, one in alone.items()
    }
    adapters["d"] = tiny.random_adapter(model, 9, 3)  # with an A of its own
    ids, errors, calls = tiny.passages(8)[0].tokens[None], [], []
    mixes = [mix(a=0.7, b=-0.4, c=1.1), mix(a=0.2, c=0.8), mix(a=0.5, d=0.5), mix(a=0.2, c=0.8)]
    monkeypatch.setattr(kernels, "narrow", _counted(kernels.narrow, calls))
    for at in (level, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run = executor(model, adapters, trunk)
        for chosen in mixes:
            exact = oracle(model, adapters, chosen, ids)
            with torch.inference_mode(), run.attached(run.load([chosen]), "stacked", stay):
                for _ in range(2):  # the second pass finds the factors gathered
                    errors.append((model(ids).logits.double() - exact).abs().mean())
        assert (len(calls) > 0) == (level > 0)
    here, gathered = errors[: 2 * len(mixes)], errors[2 * len(mixes) :]
    assert all(error < 1.2 * other for error, other in zip(here, gathered, strict=True))


@HERE
def test_a_merge_by_tiles_leaves_weights_that_it_cannot_take_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _here(2)
    model, adapters = _wide()
    one = next(iter(target_linears(model).values()))
    one.weight.data = one.weight.data.T.contiguous().T  # column by column
    merged: list[Any] = []
    monkeypatch.setattr(dense, "merge", _counted(dense.merge, merged))
    run, chosen, ids = executor(model, adapters), mix(a=0.7, b=-0.4), tiny.passages(9)[0].tokens[None]
    exact = oracle(model, adapters, chosen, ids)
    with torch.inference_mode(), run.attached(run.load([chosen]), "dense"):
        error = (model(ids).logits.double() - exact).abs().mean()
    assert error < 0.05
    assert not merged


@HERE
def test_a_buffer_is_written_anew_for_targets_that_the_next_mix_does_not_change() -> None:
    model, adapters = _wide()
    fewer = {name: update for name, update in adapters["b"].items() if not name.endswith("up_proj")}
    run, ids = executor(model, {"a": adapters["a"], "b": fewer}), tiny.passages(9)[0].tokens[None]
    alone = executor(model, {"b": fewer})
    with torch.inference_mode():
        with run.attached(run.load([mix(a=3.0)]), "dense"):
            first = model(ids).logits
        with run.attached(run.load([mix(b=1.0)]), "dense"):
            second = model(ids).logits
        with alone.attached(alone.load([mix(b=1.0)]), "dense"):
            assert torch.equal(second, model(ids).logits)
    assert not torch.equal(first, second)


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
            kernels.add([torch.zeros(1)], torch.ones(1, 1), torch.zeros(1, 1))
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
@pytest.mark.parametrize("way", ["stacked", "dense"])
@pytest.mark.parametrize("missing", ["q_proj", "gate_proj", "down_proj"])
def test_targets_that_no_expert_changes_are_left_out(
    level: Level, way: Way, missing: str, monkeypatch: pytest.MonkeyPatch
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
        with torch.inference_mode(), run.attached(run.load([chosen]), way):
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
