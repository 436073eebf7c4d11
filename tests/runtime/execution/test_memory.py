"""Memory of the ways to run a mix, counted in the bytes of what they hold; and of experts that nobody has used."""

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mixing import executor, mix

from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_tensors
from localmoe.bank.generations import commit
from localmoe.bank.store import Bank
from localmoe.config import ExecutionConfig
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.routing import Mix
from localmoe.runtime.execution import Executor, Way, kernels, workspace
from localmoe.runtime.router import routable_centroids

WIDER = tiny.LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
EXPERTS, RANK = 10, 2
NAMES = [f"e{number}" for number in range(EXPERTS)]
CONSTANT = 2 * 2**20
"""Bytes; what any way may take besides, whatever the base: where kernels lay tokens and tiles (1.1 MB a thread)."""
SHARED = [False, True]


@pytest.fixture(scope="module", params=["fp32, gathered", "bf16, with kernels if there are any"])
def model(request: pytest.FixtureRequest) -> Any:
    found = tiny.causal_model("llama", **WIDER)
    return found.bfloat16() if request.param.startswith("bf16") else found


def _executor(model: Any, shared: bool, **settings: Any) -> Executor:
    """Ten experts of rank 2; `shared`: of one A."""
    adapters = {name: tiny.random_adapter(model, seed, RANK) for seed, name in enumerate(NAMES)}
    if not shared:
        return executor(model, adapters, **settings)
    trunk = tiny.random_adapter(model, 99, RANK)
    with_one = {n: {m: LowRank(trunk[m].A, u.B, u.c) for m, u in a.items()} for n, a in adapters.items()}
    return executor(model, with_one, trunk, **settings)


def _sizes(run: Executor) -> tuple[int, int]:
    """Bytes of the base, and of its largest layer's linears."""
    layers = [sum(weight_of(target.module).nbytes for target in block.targets) for block in run.layout.blocks]
    return sum(parameter.nbytes for parameter in run.model.parameters()), max(layers)


@torch.no_grad()
def _answer(run: Executor, mixes: list[Mix], way: Way) -> None:
    """A prompt of five tokens and two more, all in one way."""
    loaded = run.load(mixes)
    with run.attached(loaded, way, stay=True):
        cache = run.model(torch.ones(len(mixes), 5, dtype=torch.long), use_cache=True).past_key_values
        for _ in range(2):
            run.model(torch.ones(len(mixes), 1, dtype=torch.long), past_key_values=cache, use_cache=True)


def _mix(seed: int) -> Mix:
    """All experts, with weights that no other seed gives."""
    return mix(**{name: 1 / (seed + place + 1) for place, name in enumerate(NAMES)})


@pytest.mark.parametrize("shared", SHARED)
def test_dense_takes_at_most_twice_the_base_and_one_layer(
    model: Any, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_APART", 0)  # 48 MiB, more than this whole model
    run = _executor(model, shared)
    base, layer = _sizes(run)
    for seed in range(3):
        _answer(run, [_mix(seed)], "dense")
        tiles = run.dense._tiles.bytes
        assert tiles <= CONSTANT and base + run.dense.bytes - tiles <= 2 * base + layer
    assert run.dense.bytes > base / 2


@pytest.mark.parametrize("shared", SHARED)
def test_beside_the_weights_there_are_the_experts_and_what_is_gathered_of_them(model: Any, shared: bool) -> None:
    run = _executor(model, shared)
    for way in ("stacked", "grouped"):
        for seed in range(3):
            mixes = [_mix(seed)] if way == "stacked" else [_mix(seed), _mix(seed + 10)]
            _answer(run, mixes, way)
            experts = run.load(mixes).active
            assert experts is not None and experts.experts
            held = sum(expert.bytes for expert in experts.experts)
            assert run.host.bytes == held
            where_they_lie = run.beside.level > 0 and not shared
            one = held / EXPERTS if shared and way == "stacked" else held  # experts of one A are summed
            buffer = run.beside.buffer.bytes
            assert buffer <= CONSTANT and run.beside.bytes - buffer <= (0 if where_they_lie else 1.01 * one)
    assert run.dense.bytes == 0


def test_what_passes_is_gathered_in_a_fixed_number_of_bytes_whatever_the_number_of_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.causal_model("llama", **WIDER)
    run = _executor(model, shared=False)
    active = run.load([_mix(0)]).active
    assert active is not None
    whole = sum(expert.bytes for expert in active.experts)
    for apart, most in ((0, whole / 4), (whole / 2, whole / 2), (whole, whole), (10 * whole, whole)):
        monkeypatch.setattr(workspace, "_APART", apart)
        passing = workspace.Workspace(run.layout, whole=False)
        for index in range(len(run.layout.blocks)):
            passing.fill(index, active)
        assert passing.bytes <= 1.01 * most


def test_more_merged_mixes_are_kept_within_the_bytes_that_were_given_for_them(model: Any) -> None:
    weights = sum(weight_of(target.module).nbytes for target in _executor(model, False).layout.targets)
    for more, copies in ((0, 1), (weights - 1, 1), (weights, 2), (3 * weights, 4)):
        run = _executor(model, shared=False, mix_cache_bytes=more)
        assert run.dense.bytes_missing == copies * weights
        for seed in range(6):
            _answer(run, [_mix(seed)], "dense")
        assert weights * copies == run.dense._copies.bytes
        assert [run.dense.holds(run.load([_mix(seed)]).key) for seed in range(6)] == [False] * (6 - copies) + [
            True
        ] * copies
        assert run.dense.bytes_missing == 0
        run.forget()
        assert run.dense._copies.bytes == weights and not run.dense.holds(run.load([_mix(5)]).key)


@pytest.mark.parametrize(("more", "merges"), [(0, [0, 1, 0, 1, 2, 0, 1]), (1, [0, 1, 2, 0, 1]), (2, [0, 1, 2])])
def test_mixes_that_take_turns_are_merged_again_only_where_there_is_no_memory_for_them(
    more: int, merges: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.causal_model("llama", **WIDER)
    run = _executor(model, shared=False)
    weights = run.dense.bytes_missing
    run = _executor(model, shared=False, mix_cache_bytes=more * weights)
    gathered: list[int] = []
    fill, ids = run.dense._workspaces[0].fill, torch.ones(1, 3, dtype=torch.long)

    def counted(index: int, active: Any, **options: Any) -> Any:
        gathered.append(round(2 / active.scalars[0]) if index == 0 else 0)  # an expert's own scale is 2
        return fill(index, active, **options)

    monkeypatch.setattr(run.dense._workspaces[0], "fill", counted)
    expected = [_logits(_executor(model, shared=False), seed, ids) for seed in range(3)]
    for seed in (0, 1, 0, 1, 2, 2, 0, 1):
        assert torch.equal(_logits(run, seed, ids), expected[seed])
    assert [first - 1 for first in gathered if first] == merges


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shared", SHARED)
def test_whatever_the_kernels_a_mix_that_is_kept_stays_as_it_was_merged(
    level: kernels.Level, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level > kernels.level():
        pytest.skip("no compiler when LocalMoE was installed, or another processor")
    model = tiny.causal_model("llama", **WIDER).bfloat16()
    monkeypatch.setattr(kernels, "level", lambda: level)
    ids = torch.ones(1, 3, dtype=torch.long)
    run = _executor(model, shared, mix_cache_bytes=10**9)
    assert run.dense._level == level
    expected = [_logits(_executor(model, shared), seed, ids) for seed in range(3)]
    for seed in (0, 1, 2, 0, 1, 2):
        assert torch.equal(_logits(run, seed, ids), expected[seed])


@torch.no_grad()
def _logits(run: Executor, seed: int, ids: torch.Tensor) -> torch.Tensor:
    with run.attached(run.load([_mix(seed)]), "dense"):
        logits: torch.Tensor = run.model(ids).logits
    return logits


def test_a_copy_that_was_not_finished_holds_no_mix() -> None:
    model = tiny.base("llama")
    run = _executor(model, shared=False, mix_cache_bytes=10**9)
    for seed in range(2):
        _answer(run, [_mix(seed)], "dense")
    key = run.load([_mix(2)]).key
    with pytest.raises(AttributeError):
        run.dense.write(None, key)  # type: ignore[arg-type]
    assert not run.dense.holds(key) and run.dense.holds(run.load([_mix(0)]).key)
    ids = torch.ones(1, 3, dtype=torch.long)
    for seed in (1, 2):
        assert torch.equal(_logits(run, seed, ids), _logits(_executor(model, shared=False), seed, ids))


def test_a_thousand_experts_on_disk_take_no_memory_until_they_are_used(
    tmp_path: Path, tiny_bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.base("llama")
    adapters = [tiny.random_adapter(model, seed, 16) for seed in range(3)]
    bank = _bank_of_a_thousand(tmp_path / "bank", Bank.open(tiny_bank), adapters)
    read: list[str] = []
    adapter = Bank.adapter
    monkeypatch.setattr(Bank, "adapter", lambda self, name: read.append(name) or adapter(self, name))
    tracemalloc.start()
    try:
        opened = Bank.open(bank)
        run, centroids = Executor(model, opened, ExecutionConfig()), routable_centroids(opened)
        run.prepare()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(centroids.experts) == 1000 and read == [] and run.host.bytes == 0
    assert taken < 20e6  # names and hashes; the experts themselves are hundreds of megabytes for a real base
    chosen = Mix(("x0001", "x0900"), (0.5, 0.5), "linear", opened.manifest.digest, None)
    run.load([chosen])
    assert sorted(read) == ["x0001", "x0900"]
    assert run.host.bytes == 2 * sum(u.A.nbytes + u.B.nbytes for u in adapters[0].values())


def _bank_of_a_thousand(path: Path, like: Bank, adapters: list[Adapter]) -> Path:
    """A bank whose experts are a few in turn, by a thousand names."""
    manifest, first, experts = like.manifest, like.manifest.experts[0], []
    records = [
        write_adapter(path, f"experts/x{row:04d}", adapter, "tiny", False) for row, adapter in enumerate(adapters)
    ]
    for row in range(1000):
        record = records[row % len(records)]
        folder = record.folder.replace(f"x{row % len(records):04d}", f"x{row:04d}")
        (path / folder).mkdir(exist_ok=True)
        for file in (path / record.folder).iterdir() if folder != record.folder else ():
            os.link(file, path / folder / file.name)
        own = replace(record, folder=folder)
        outcome = replace(first.outcome, status="good", reason=None)
        experts.append(replace(first, id=f"x{row:04d}", row=row, adapter=own, outcome=outcome))
    vectors = torch.nn.functional.normalize(torch.randn(1000, manifest.encoder.dim), dim=1)
    files = {"centroids": write_tensors(path, "centroids", {"centroids": vectors, "means": vectors.clone()})}
    plain = replace(manifest, generation=0, recipe="paper", trunk=None, trunk_outcome=None)
    commit(path, replace(plain, experts=tuple(experts), files=files))
    return path
