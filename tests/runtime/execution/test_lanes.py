"""Batches of different mixes of experts that share one A: a sum for each row, against the formula in fp64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mixing import TOLERANCE, executor, mix, oracle

from localmoe.errors import UsageError
from localmoe.lora import Adapter, LowRank
from localmoe.routing import Mix
from localmoe.runtime.execution import TRUNK, Choice, kernels, workspace
from localmoe.runtime.execution.kernels import Level

HERE = pytest.mark.skipif(kernels.level() == 0, reason="no compiler when LocalMoE was installed, or no AVX-512 BF16")
MIXES = [mix(a=0.7, b=-0.4), mix(), mix(b=0.2, c=0.9), mix(a=0.7, b=-0.4), mix(c=0.4, trunk=0.6)]


@HERE
@settings(max_examples=60, deadline=None)
@example(rows=3, tokens=3, rank=5, d_out=130, threads=2, sets=2)
@given(*(st.integers(1, most) for most in (5, 5, 20, 300, 3, 4)))
def test_rows_are_widened_by_their_own_factor(
    rows: int, tokens: int, rank: int, d_out: int, threads: int, sets: int
) -> None:
    before, place = torch.get_num_threads(), 3
    chosen = np.random.default_rng(rows).integers(0, sets, rows)
    Bt = torch.randn(sets, rank * d_out + 7).bfloat16()[:, : rank * d_out].view(sets, rank, d_out)
    n, memory = torch.randn(rows * tokens, place + rank + 2), torch.randn(rows * tokens * d_out + 64).bfloat16()
    y, rest = memory[: rows * tokens * d_out].view(-1, d_out), memory[rows * tokens * d_out :].clone()
    own = n.double()[:, place : place + rank].view(rows, tokens, rank)
    expected = y.double().view(rows, tokens, d_out) + own @ Bt.double()[chosen]
    try:
        torch.set_num_threads(threads)
        kernels.widen_rows(y, Bt, chosen, n, place)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y.double().view(rows, tokens, d_out), expected, rtol=2**-8, atol=1e-4)
    assert torch.equal(memory[rows * tokens * d_out :], rest)


def _sharing(model: Any, few: Sequence[str] = ()) -> tuple[dict[str, Adapter], Adapter]:
    """Three experts that share the A of their trunk, whose ranks differ between targets; without the modules `few`."""
    drawn = {name: tiny.random_adapter(model, seed, 5) for seed, name in enumerate((TRUNK, "a", "b", "c"))}
    modules = [name for name in drawn["a"] if not name.endswith(tuple(few) or ("nothing",))]
    ranks = {name: 1 + place % 5 for place, name in enumerate(modules)}
    cut = {
        name: {m: LowRank(one[m].A[: ranks[m]], one[m].B[:, : ranks[m]], one[m].c[: ranks[m]]) for m in modules}
        for name, one in drawn.items()
    }
    trunk = cut.pop(TRUNK)
    return {k: {m: LowRank(trunk[m].A, u.B, u.c) for m, u in one.items()} for k, one in cut.items()}, trunk


def _all(model: Any, adapters: dict[str, Adapter], trunk: Adapter) -> dict[str, Adapter]:
    """Experts and trunk with updates of zero for modules that they leave alone, as the oracle wants them."""
    nothing = {m: LowRank(u.A * 0, u.B, u.c) for m, u in tiny.random_adapter(model, 0, 1).items()}
    return {name: nothing | one for name, one in (adapters | {TRUNK: trunk}).items()}


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.stack([tiny.passages(tokens, seed)[0].tokens for seed in range(rows)])


def _wide() -> Any:
    return tiny.causal_model("llama", **(tiny.LLAMA | {"intermediate_size": 64}))


def _exact(model: Any, adapters: dict[str, Adapter], mixes: Sequence[Mix], ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([oracle(model, adapters, one, row[None]) for one, row in zip(mixes, ids, strict=True)])


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("missing", [(), ("q_proj",), ("down_proj", "up_proj", "gate_proj")])
def test_every_row_has_the_logits_of_the_formula(missing: tuple[str, ...], stay: bool) -> None:
    model = _wide()
    adapters, trunk = _sharing(model, missing)
    run, ids = executor(model, adapters, trunk), _ids(len(MIXES), 7)
    for mixes in (MIXES, MIXES[1:4], MIXES[::-1]):  # in the same memory
        with torch.no_grad(), run.attached(run.load(mixes), "grouped", stay):
            logits = [model(ids[: len(mixes)]).logits.double() for _ in range(2)]
        expected = _exact(model, _all(model, adapters, trunk), mixes, ids[: len(mixes)])
        for found in logits:
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_rows_may_leave_and_the_same_batch_begin_again() -> None:
    model = _wide()
    adapters, trunk = _sharing(model)
    run, ids = executor(model, adapters, trunk), _ids(len(MIXES), 7)
    expected = _exact(model, adapters | {TRUNK: trunk}, MIXES, ids)
    for _ in range(2):
        with run.running(run.load(MIXES), Choice("grouped", "grouped")) as running:
            here = list(range(len(MIXES)))
            for left in (here, [4, 0, 3], [0, 2], [1]):
                running.keep(left)
                here = [here[row] for row in left]
                found = model(ids[here]).logits.double()
                torch.testing.assert_close(found, expected[here], rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_prompts_that_are_padded_on_the_left_have_the_logits_of_the_formula() -> None:
    model = _wide()
    adapters, trunk = _sharing(model)
    run, ids = executor(model, adapters, trunk), _ids(2, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with run.attached(run.load(MIXES[:3:2]), "grouped"):
        logits = model(ids, attention_mask=mask, position_ids=places).logits.double()
    for row, start in ((0, 3), (1, 0)):
        exact = oracle(model, adapters, MIXES[2 * row], ids[row : row + 1, start:])[0]
        torch.testing.assert_close(logits[row, start:], exact, rtol=TOLERANCE, atol=TOLERANCE)


@HERE
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("missing", [(), ("q_proj",), ("down_proj",)])
def test_kernels_are_as_exact_as_gathered_sums(
    level: Level, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if level > kernels.level():
        pytest.skip("this processor has no AMX")
    model = _wide().bfloat16()
    adapters, trunk = _sharing(model, missing)
    every, ids, found, calls = _all(model, adapters, trunk), _ids(len(MIXES), 9), [], list[int]()
    exact = _exact(model, every, MIXES, ids)
    widen = kernels.widen_rows
    monkeypatch.setattr(kernels, "widen_rows", lambda *given: calls.append(0) or widen(*given))
    for at in (level, 0):
        monkeypatch.setattr(kernels, "level", lambda at=at: at)
        run, errors = executor(model, adapters, trunk), []
        with torch.inference_mode(), run.running(run.load(MIXES), Choice("grouped", "grouped")) as running:
            first = model(ids[:, :6], use_cache=True)
            rest = [model(ids[:, [6]], past_key_values=first.past_key_values).logits]
            running.keep([4, 0])
            whole = model(ids[[4, 0]]).logits
        errors.append((torch.cat([first.logits, *rest], dim=1).double() - exact[:, :7]).abs().mean())
        errors.append((whole.double() - exact[[4, 0]]).abs().mean())
        found.append(errors)
        assert (len(calls) > 0) == (level > 0)
    assert all(error < 1.2 * other for error, other in zip(*found, strict=True))


@HERE
def test_equal_mixes_have_one_sum_and_what_is_held_is_counted() -> None:
    model = _wide().bfloat16()
    adapters, trunk = _sharing(model)
    run = executor(model, adapters, trunk)
    loaded, ids = run.load([MIXES[0], MIXES[2]] * 3), _ids(6, 4)
    with torch.inference_mode(), run.attached(loaded, "grouped", stay=True):
        model(ids)
        held = run.beside.staying.bytes
    assert loaded.active is not None
    assert held == 2 * loaded.active.experts[0].bytes


def test_gradients_go_through_the_sum_of_each_row() -> None:
    model = _wide().bfloat16()
    adapters, trunk = _sharing(model)
    inputs = model.get_input_embeddings()(_ids(5, 4)).detach()
    run, grads = executor(model, adapters, trunk), []
    for rows in ([0, 1, 2, 3, 4], [2], [3]):
        given = inputs[rows].clone().requires_grad_()
        with run.attached(run.load([MIXES[row] for row in rows]), "grouped"):
            model(inputs_embeds=given).logits.float().square().sum().backward()
        grads.append(given.grad)
    for alone, row in zip(grads[1:], (2, 3), strict=True):
        error = (grads[0][row].float() - alone[0].float()).norm() / alone.float().norm()
        assert error < 0.05  # bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_merged_model_where_layers_take_turns_in_memory(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_APART", 1)
    model = _wide().to(dtype)
    trunk, *drawn = (tiny.random_adapter(model, seed, 5) for seed in range(3))
    if shared:
        drawn = [{name: LowRank(trunk[name].A, update.B, update.c) for name, update in one.items()} for one in drawn]
    run = executor(model, dict(zip("ab", drawn, strict=True)), trunk if shared else None)
    given = model.get_input_embeddings()(_ids(1, 20)).detach().requires_grad_()
    found = {}
    for way in ("dense", "stacked"):
        given.grad = None
        with run.attached(run.load([mix(a=0.7, b=0.4)]), way):
            model(inputs_embeds=given).logits.float().square().sum().backward()
        found[way] = given.grad.float()  # type: ignore[union-attr]
    error = (found["stacked"] - found["dense"]).norm() / found["dense"].norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.1)


def test_rows_that_are_not_those_of_the_batch_are_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = _wide().to(dtype)
        adapters, trunk = _sharing(model)
        run = executor(model, adapters, trunk)
        loaded = run.load(MIXES[:2])
        with pytest.raises(UsageError, match="batch of 2"), torch.no_grad(), run.attached(loaded, "grouped"):
            model(_ids(3, 4))
