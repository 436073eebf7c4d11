"""Merging from graphs, on a processor: its streams do nothing, its graphs record the operations that write."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from mixing import TOLERANCE, executor, mix, oracle
from torch.utils._python_dispatch import TorchDispatchMode

from localmoe.lora import Adapter, LowRank
from localmoe.routing import Mix
from localmoe.runtime.execution import Executor, packed, replay, workspace
from localmoe.runtime.execution.dense import DenseBuffer

IDS = tiny.passages(9)[0].tokens[None]


class _Stream:
    """A stream for a machine that has none."""

    device = torch.device("cpu")

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> None:
        pass


class _Graph(TorchDispatchMode):
    """Operations that write are recorded and not done; one that would make memory fails."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        _Graph.made += 1
        self.recorded: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func._schema.is_mutable:
            self.recorded.append((func, args, kwargs))
            return kwargs.get("out", None if "_foreach" in func._schema.name else args[0])
        assert func.is_view or "detach" in func._schema.name, func
        return func(*args, **kwargs)

    def capture_begin(self, capture_error_mode: str) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs in self.recorded:
            func(*args, **kwargs)


class _Failing(_Graph):
    def capture_end(self) -> None:
        super().capture_end()
        raise RuntimeError("no graph today")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(DenseBuffer, "_side", _Stream())
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(packed, "views", lambda flat, sizes: flat.split_with_sizes(list(sizes)))
    monkeypatch.setattr(workspace, "join", lambda parts, out: torch.cat(list(parts), out=out))
    _Graph.made = 0
    yield


def _adapters(model: Any) -> dict[str, Adapter]:
    return {name: tiny.random_adapter(model, seed) for seed, name in enumerate("abcd", start=1)}


@torch.no_grad()
def _check(run: Executor, model: Any, adapters: dict[str, Adapter], chosen: Mix) -> None:
    with run.attached(run.load([chosen]), "dense"):
        logits = run.model(IDS).logits.double()
    torch.testing.assert_close(logits, oracle(model, adapters, chosen, IDS), rtol=TOLERANCE, atol=TOLERANCE)


SAME = [mix(a=0.7, b=-0.4), mix(b=0.1, c=1.0), mix(a=1.2, d=0.3), mix(c=-0.2, d=0.9)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mixes_of_one_kind_share_a_graph(name: str) -> None:
    model = tiny.base(name)
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    for chosen in SAME:
        _check(run, model, adapters, chosen)
    assert _Graph.made == 1
    before = run.dense.bytes
    run.forget()
    _check(run, model, adapters, SAME[0])
    assert _Graph.made == 1
    assert run.dense.bytes == before


def test_mixes_of_several_numbers_take_turns_and_graphs_of_memory_that_moved_are_dropped() -> None:
    model = tiny.base("llama")
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    for _ in range(3):
        _check(run, model, adapters, SAME[0])
    assert _Graph.made == 1
    larger = mix(a=0.5, b=0.4, c=-1.0)  # needs more memory
    for chosen in [larger, *SAME, larger, mix(d=0.8), larger, SAME[0], mix(a=-0.8), mix(b=1.0)]:
        _check(run, model, adapters, chosen)
    assert _Graph.made == 1 + 3
    assert len(run.dense._graphs.graphs) == 3


def test_graphs_follow_weights_that_moved() -> None:
    model = tiny.base("llama")
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    for chosen in SAME[:3]:
        _check(run, model, adapters, chosen)
    for both in (model, run.model):
        weight = both.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data * 2
    for chosen in SAME:
        _check(run, model, adapters, chosen)
    assert _Graph.made == 2


def test_what_another_kind_has_changed_is_the_bases_again() -> None:
    model = tiny.base("llama")
    adapters, part = _adapters(model), tiny.random_adapter(model, 7)
    first = next(iter(part))
    part[first] = LowRank(part[first].A, torch.zeros_like(part[first].B), part[first].c)
    less = {name: update for name, update in part.items() if name != first}
    run = executor(copy.deepcopy(model), adapters | {"p": less}, mix_cache=False)
    adapters["p"] = part
    for chosen in [mix(p=1.0), mix(p=-1.0), mix(a=0.6), mix(p=1.0), mix(a=0.4), mix(p=0.3), mix(p=0.2), mix(a=0.1)]:
        _check(run, model, adapters, chosen)


def test_no_more_than_so_many_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "KINDS", 1)
    model = tiny.base("llama")
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    for _ in range(2):
        for chosen in (mix(a=0.5, b=0.4), mix(c=1.0), mix(b=1.0)):
            _check(run, model, adapters, chosen)
    assert len(run.dense._graphs.graphs) == len(run.dense._stage._laid) == 1


def test_where_capturing_fails_merging_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Failing)
    model = tiny.base("llama")
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    _check(run, model, adapters, SAME[0])
    with pytest.warns(UserWarning, match="no graph today"):
        _check(run, model, adapters, SAME[1])
    for chosen in SAME:
        _check(run, model, adapters, chosen)
    assert _Graph.made == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_that_share_a_and_experts_without_room_are_merged_where_they_lie(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.base(name)
    trunk = tiny.random_adapter(model, 9)
    sharing = {
        letter: {module: LowRank(trunk[module].A, update.B, update.c) for module, update in adapter.items()}
        for letter, adapter in _adapters(model).items()
    }
    run = executor(copy.deepcopy(model), sharing, trunk, mix_cache=False)
    for chosen in SAME:
        _check(run, model, sharing, chosen)
    assert run.dense._stage.memory.nbytes == 0
    adapters = _adapters(model)
    run = executor(copy.deepcopy(model), adapters, mix_cache=False)
    monkeypatch.setattr(replay.Stage, "_holds", lambda stage, size: False)
    for chosen in SAME:
        _check(run, model, adapters, chosen)
    assert _Graph.made == 0
