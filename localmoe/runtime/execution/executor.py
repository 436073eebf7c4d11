"""The executor: from mixes to a model that runs with them, in one of three ways, over one base and one bank."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmoe.bank.store import Bank
from localmoe.config import ExecutionConfig
from localmoe.errors import BankError, UsageError
from localmoe.lora import Adapter, LowRank
from localmoe.merging import merge_adapters
from localmoe.routing import Mix
from localmoe.runtime.execution.beside import Beside
from localmoe.runtime.execution.cache import ExpertCache, quarter_of_memory
from localmoe.runtime.execution.choice import Choice, Planner, Way, Work, choose
from localmoe.runtime.execution.dense import DenseBuffer, is_plain
from localmoe.runtime.execution.layout import Layout, layout
from localmoe.runtime.execution.packed import PackedExpert, SharedFactors, moved, pack, shared_factors
from localmoe.runtime.execution.workspace import Active

TRUNK = "trunk"
"""Id of the bank's trunk in a mix, where no expert has that name."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """One mix, or a batch of them, with their experts in memory.

    active: None for mixes without experts (the base model). deltas: dense updates, of a merge method that is not
    low-rank; then dense is the only way. key: names the content, None if nothing may be kept for it.
    """

    mixes: tuple[Mix, ...]
    active: Active | None
    deltas: dict[str, Tensor] | None
    key: object

    @property
    def empty(self) -> bool:
        """Whether this is the base model."""
        return self.active is None and self.deltas is None


class Executor:
    """Runs a base model with mixes of a bank; the base's weights are only read. Not for several threads at once."""

    def __init__(self, model: Any, bank: Bank, config: ExecutionConfig) -> None:
        self.model = model
        self.bank = bank
        self.config = config
        self.host = ExpertCache(quarter_of_memory() if config.host_bytes is None else config.host_bytes)
        self.planner: Planner | None = None
        """What chooses with execution "auto"; None = fixed lengths of prompt and answer do."""
        self._device: ExpertCache | None = None
        self._once = threading.RLock()  # for what is made once, whoever needs it first

    @cached_property
    def layout(self) -> Layout:
        """The base's linears in the order of a forward pass."""
        _check_local(self.model)
        return layout(self.model)

    @property
    def ready(self) -> bool:
        """Whether the base's linears are known, which takes a forward."""
        return "layout" in self.__dict__

    def prepare(self) -> None:
        """Finds the base's linears, if they are not known yet."""
        _ = self.layout

    @cached_property
    def dense(self) -> DenseBuffer:
        """The second buffer, allocated when it is first written."""
        return DenseBuffer(self.layout, self.config.mix_cache_bytes if self.config.mix_cache else 0)

    @cached_property
    def beside(self) -> Beside:
        """What applies factors beside the weights."""
        return Beside(self.layout)

    @cached_property
    def plain(self) -> bool:
        """Whether all the base's weights can be merged into."""
        return all(is_plain(target.module) for target in self.layout.targets)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """In which forms the base's linears and their weights are kept."""
        modules = [target.module for target in self.layout.targets]
        return tuple(sorted({f"{type(module).__name__} {type(module.weight).__name__}" for module in modules}))

    def load(self, mixes: Sequence[Mix]) -> Loaded:
        """The experts of a batch of mixes, one mix a row, in memory; equal mixes are one.

        Raises BankError for a mix of another bank, UsageError for a batch of mixes whose method is not low-rank.
        """
        mixes = tuple(mixes)
        for mix in mixes:
            if mix.experts and mix.bank != self.bank.manifest.digest:
                raise BankError("the mix was routed in another bank", "route the prompt again in this one")
        if len({(mix.experts, mix.weights, mix.method) for mix in mixes}) == 1:
            mixes = mixes[:1]
        key = tuple(self.key(mix) for mix in mixes) if self.config.mix_cache else None
        pieces = [self._pieces(mix) for mix in mixes]
        deltas = [piece for piece in pieces if isinstance(piece, dict)]
        if deltas:
            if len(mixes) > 1:
                raise UsageError(
                    "a batch of different mixes needs a merge method that is low-rank", "choose the method 'linear'"
                )
            return Loaded(mixes, None, deltas[0], key)
        rows = [_summed(piece) for piece in pieces if not isinstance(piece, dict)]
        experts = list({id(expert): expert for row in rows for expert in row}.values())
        if not experts:
            return Loaded(mixes, None, None, key)
        weights = [[row.get(expert, 0.0) * expert.scale for expert in experts] for row in rows]
        wide = torch.tensor(weights, dtype=torch.float32, device="cpu")
        return Loaded(mixes, Active(tuple(experts), wide, by_row=len(mixes) > 1), None, key)

    def work(self, loaded: Loaded, rows: int, prompt_tokens: int, new_tokens: int) -> Work:
        """What there is to do, for `choose`."""
        active = loaded.active
        return Work(
            rows=rows,
            mixes=len({(mix.experts, mix.weights, mix.method) for mix in loaded.mixes}),
            experts=0 if active is None else len(active.experts),
            rank=0.0 if active is None else active.rank,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            shared=active is not None and active.shared is not None,
            plain=self.plain,
            held=self.dense.holds(loaded.key),
        )

    def choose(self, loaded: Loaded, rows: int, prompt_tokens: int, new_tokens: int) -> Choice:
        """The ways to execute it, as the configuration and `choose` have it."""
        if loaded.deltas is not None or loaded.empty:
            return Choice("dense", "dense")
        return choose(self.work(loaded, rows, prompt_tokens, new_tokens), self.config.execution, self.planner)

    @contextmanager
    def running(self, loaded: Loaded, choice: Choice) -> Iterator[Running]:
        """The model with the mixes, in the way chosen for the prompt, until `Running.decode` or the end."""
        run = Running(self, loaded, choice)
        try:
            run.prefill()
            yield run
        finally:
            run.close()

    @contextmanager
    def attached(self, loaded: Loaded, way: Way, stay: bool = False) -> Iterator[None]:
        """The model with the mixes in one way; `stay`: keep the factors gathered, since single tokens will follow.

        Raises UsageError for a way that cannot do it.
        """
        with ExitStack() as stack:
            stack.enter_context(_straight_head(self.model))
            if loaded.deltas is not None:
                if way != "dense":
                    raise UsageError(
                        f"the merge method {loaded.mixes[0].method!r} gives dense updates, which cannot be {way}",
                        "choose --execution dense or auto",
                    )
                self.dense.write_deltas(loaded.deltas, loaded.key)
                stack.enter_context(self.dense.attached())
            elif loaded.active is not None and way == "dense":
                if not loaded.active.single:
                    raise UsageError("different mixes cannot be merged into one model", "run them stacked or grouped")
                self.dense.write(loaded.active, loaded.key)
                stack.enter_context(self.dense.attached())
            elif loaded.active is not None:
                stack.enter_context(self.beside.attached(loaded.active, stay, loaded.key))
            yield

    def prefetch(self, experts: Iterable[str]) -> Future[None]:
        """Brings experts into memory in the background; errors are those of the future.

        Once the future is cancelled, the expert under way is the last.
        """
        wanted, done = list(experts), Future[None]()

        def work() -> None:
            failed: BaseException | None = None
            try:
                for expert in wanted:
                    if not threading.main_thread().is_alive():
                        done.cancel()
                    if done.cancelled():
                        break
                    self._expert(expert)
            except BaseException as error:  # handed to whoever waits
                failed = error
            if done.set_running_or_notify_cancel():
                done.set_result(None) if failed is None else done.set_exception(failed)

        # no daemon: a thread that the end of the program stops within torch would abort it
        threading.Thread(target=work, name="localmoe-prefetch").start()
        return done

    @property
    def roomy(self) -> bool:
        """Whether experts are kept in memory, and half of what is given for them is still free."""
        caches = [cache for cache in (self.host, self._device) if cache is not None]
        return all(0 < 2 * cache.bytes <= cache.limit for cache in caches)

    def forget(self) -> None:
        """Lets go of all experts in memory and of all mixes; a prefetch under way goes on."""
        self.host.clear()
        if self._device is not None:
            self._device.clear()
        self.forget_mixes()

    def forget_mixes(self) -> None:
        """Lets go of all merged and gathered mixes."""
        self.dense.forget()
        self.beside.held = None

    def key(self, mix: Mix) -> str:
        """Content hash of what decides the merged weights, in this bank."""
        return mix.key(self.bank.manifest.base.weights, self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        manifest = self.bank.manifest
        trunk = {} if manifest.trunk is None else {TRUNK: manifest.trunk.sha256}
        return trunk | {expert.id: expert.adapter.sha256 for expert in manifest.experts if expert.adapter is not None}

    @cached_property
    def _shared(self) -> SharedFactors | None:
        trunk = self.bank.trunk() if self.bank.manifest.shared_factors else None
        return None if trunk is None else shared_factors(trunk, self.layout)

    def _pieces(self, mix: Mix) -> list[tuple[PackedExpert, float]] | dict[str, Tensor]:
        """Packed experts and their weights, or dense updates."""
        if not mix.experts:
            return []
        if mix.method == "linear":
            return [(self._expert(name), weight) for name, weight in zip(mix.experts, mix.weights, strict=True)]
        merged = merge_adapters([self._adapter(name) for name in mix.experts], mix.weights, mix.method)
        low_rank = {name: update for name, update in merged.items() if isinstance(update, LowRank)}
        if len(low_rank) == len(merged):
            return [(self._placed(pack(low_rank, self.layout)), 1.0)]
        return {name: update.delta() if isinstance(update, LowRank) else update for name, update in merged.items()}

    def _expert(self, name: str) -> PackedExpert:
        if name not in self._hashes:
            self._adapter(name)  # raises for an expert that is unknown or failed
        key = self._hashes[name]
        device = self.layout.blocks[0].device
        if device.type == "cpu":
            return self.host.get(key, lambda: self._packed(name))
        with self._once:
            if self._device is None:
                self._device = ExpertCache(_device_bytes(self.config, device, self.dense.bytes_missing))
        return self._device.get(key, lambda: self._placed(self.host.get(key, lambda: self._packed(name))))

    def _placed(self, expert: PackedExpert) -> PackedExpert:
        """The expert where the base is."""
        return expert if self.layout.blocks[0].device.type == "cpu" else moved(expert, self.layout)

    def _packed(self, name: str) -> PackedExpert:
        with self._once:
            shared = self._shared
        return pack(self._adapter(name), self.layout, shared, pin=torch.cuda.is_available())

    def _adapter(self, name: str) -> Adapter:
        trunk = self.bank.trunk() if name == TRUNK and all(e.id != TRUNK for e in self.bank.manifest.experts) else None
        return self.bank.adapter(name) if trunk is None else trunk


class Running:
    """A model running with mixes: one way for the prompt, another for the tokens after it."""

    def __init__(self, executor: Executor, loaded: Loaded, choice: Choice) -> None:
        self.choice = choice
        self.merge_seconds = 0.0
        """Time spent on merging and attaching."""
        self._executor, self._loaded = executor, loaded
        self._stack = ExitStack()
        self._way: Way | None = None

    def prefill(self) -> None:
        """Goes the way chosen for the prompt."""
        self._use(self.choice.prefill, stay=self.choice.decode == self.choice.prefill)

    def decode(self) -> None:
        """Goes the way chosen for the tokens after it; nothing to do if it is the same."""
        self._use(self.choice.decode, stay=True)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some rows of the batch, in this order."""
        active = self._executor.beside.active
        if active is not None and active.by_row and list(rows) != list(range(len(active.weights))):
            self._executor.beside.keep(rows)

    def close(self) -> None:
        """Gives the model back."""
        self._stack.close()
        self._way = None

    def _use(self, way: Way, stay: bool) -> None:
        if way == self._way:
            return
        started = time.perf_counter()
        self.close()
        self._stack.enter_context(self._executor.attached(self._loaded, way, stay))
        self._way = way
        self.merge_seconds += time.perf_counter() - started


def _summed(pieces: Sequence[tuple[PackedExpert, float]]) -> dict[PackedExpert, float]:
    """Each expert's weight; experts of equal contents are one in memory, and count as often as they are there."""
    found: dict[PackedExpert, float] = {}
    for expert, weight in pieces:
        found[expert] = found.get(expert, 0.0) + weight
    return found


def rounded(mix: Mix, steps: int) -> Mix:
    """The mix with weights that are multiples of 1/steps, so that more prompts repeat a mix; zeros leave it.

    Weights are rounded down, then the largest remainders up, until the sum is what it was, itself rounded.
    """
    wanted = [weight * steps for weight in mix.weights]
    whole = [math.floor(weight) for weight in wanted]
    missing = round(sum(wanted)) - sum(whole)
    for place in sorted(range(len(whole)), key=lambda place: whole[place] - wanted[place])[:missing]:
        whole[place] += 1
    kept = [(expert, count / steps) for expert, count in zip(mix.experts, whole, strict=True) if count != 0]
    if not kept:
        return mix
    return replace(mix, experts=tuple(e for e, _ in kept), weights=tuple(w for _, w in kept))


@contextmanager
def _straight_head(model: Any) -> Iterator[None]:
    """The output head reads rows: a product with one strided row in three dimensions copies the whole weight first."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, x.shape[-1]), head.weight, head.bias).view(*x.shape[:-1], -1)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]


def _check_local(model: Any) -> None:
    """Raises UsageError for weights that are cut over devices (tensor-parallel)."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise UsageError(
                f"{name} is cut over several devices (tensor-parallel), and experts cannot be applied to a part",
                "load the base without a tp_plan; --device-map auto puts whole layers on devices",
            )


def _device_bytes(config: ExecutionConfig, device: torch.device, spoken_for: int) -> int:
    """Bytes for experts on a GPU: what is asked for, or half of what is free and not spoken for."""
    if config.device_bytes is not None:
        return config.device_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - spoken_for) // 2
