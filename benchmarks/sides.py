"""The sides that are compared: base alone, LocalMoE, `ttmerge`; each answers a text, and says where the time went."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import machine
import numpy as np
import torch
from material import BETA, TAU, Experts, StandIn, note, routing

TTMERGE = "0.0.4"


@dataclass(frozen=True)
class Times:
    """Seconds of one answer, from its text; `restore` is what is left to do after the last token."""

    embed: float
    select: float
    load: float
    merge: float
    first_token: float
    restore: float
    total: float

    def data(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


class Clock:
    """A stopping criterion that stops nothing, and notes when tokens come."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        int(ids[0, -1])  # a GPU's token has come when it can be read
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def generate(
    generator: Any, tokenizer: Any, text: str, new_tokens: int, device: str
) -> tuple[float, Clock, float, str]:
    """When it began, its clock, when it was back, and the text: transformers' own greedy generation."""
    clock = Clock()
    begun = time.perf_counter()
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    out = generator(ids, stopping_criteria=[clock], **greedy(ids, new_tokens))
    said = tokenizer.decode(out[0, ids.shape[1] :])
    machine.synchronise(device)
    return begun, clock, time.perf_counter(), said


def greedy(ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Arguments of transformers' `generate`: exactly `new_tokens` tokens, always the likeliest."""
    drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
    return {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, **drawn}


class BaseAlone:
    """The base model through transformers' `generate`."""

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device

    @torch.inference_mode()
    def answer(self, text: str, query: np.ndarray | None, new_tokens: int) -> Times:
        """The query is not used."""
        begun, clock, back, _ = generate(self.model.generate, self.tokenizer, text, new_tokens, self.device)
        return Times(0.0, 0.0, 0.0, 0.0, clock.first - begun, back - clock.last, back - begun)


class Ours:
    """LocalMoE's engine; every answer merges anew (the mix cache is off)."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        experts: Experts,
        encoder: Any | None,
        execution: str,
        device_bytes: int | None = None,
    ) -> None:
        from localmoe.config import ExecutionConfig
        from localmoe.runtime.calibration import planner
        from localmoe.runtime.engine import Engine

        self.encoder = StandIn(encoder)
        config = ExecutionConfig(execution=execution, mix_cache=False, device_bytes=device_bytes)
        self.engine = Engine(experts.bank, model, tokenizer, self.encoder, routing(), execution=config)
        self.executor = self.engine.executor
        self.last: Any = None
        if execution == "auto":
            self.executor.planner = planner(self.executor)

    def answer(self, text: str, query: np.ndarray | None, new_tokens: int) -> Times:
        """The answer of the mix that `query` gives; without one, of the base model through the same engine."""
        from localmoe.runtime.engine import base_mix

        mix = None if query is not None else base_mix(self.engine.bank)
        if query is not None:
            self.encoder.vector = query
        return self.answer_mix(text, mix, new_tokens)

    def answer_mix(self, text: str, mix: Any, new_tokens: int) -> Times:
        """The same for a mix that is known; None = it is routed first."""
        from localmoe.config import GenerateConfig

        begun = time.perf_counter()
        pieces = self.engine.start(text, GenerateConfig(max_new_tokens=new_tokens), mix)
        answer = pieces.answer("".join(pieces))
        total = time.perf_counter() - begun
        if pieces.mix.experts:
            self.last = pieces.choice
        if answer.new_tokens != new_tokens:
            raise RuntimeError(f"{answer.new_tokens} tokens were generated, not {new_tokens}")
        spent = answer.seconds
        return Times(
            spent.embed,
            spent.select,
            spent.load,
            spent.merge,
            spent.first_token,
            total - spent.total,
            total,
        )

    def select(self, query: np.ndarray) -> Any:
        """The mix of a query."""
        return self.engine.router.select(query[None])

    def own(self, mix: Any) -> Any:
        """The same mix, of this engine's bank."""
        return replace(mix, bank=self.engine.bank.manifest.digest)

    def switch(self, mix: Any) -> float:
        """Seconds from a mix to the model merged by it (`dense`)."""
        device = self.engine.model.device.type
        machine.synchronise(device)
        begun = time.perf_counter()
        with self.engine.merged(mix, "dense"):
            machine.synchronise(device)
            return time.perf_counter() - begun

    def stages(self, query: np.ndarray) -> dict[str, float]:
        """Seconds of select, load and merge (`dense`), each waited for; `all`: the three without waits between."""
        device, times = self.engine.model.device.type, [0.0] * 5
        machine.synchronise(device)
        times[0] = time.perf_counter()
        mix = self.select(query)
        times[1] = time.perf_counter()
        loaded = self.executor.load([mix])
        machine.synchronise(device)
        times[2] = time.perf_counter()
        with self.executor.attached(loaded, "dense"):
            machine.synchronise(device)
            times[3] = time.perf_counter()
        del loaded
        begun = time.perf_counter()
        with self.executor.attached(self.executor.load([self.select(query)]), "dense"):
            machine.synchronise(device)
            times[4] = time.perf_counter() - begun
        spent = [end - start for start, end in itertools.pairwise(times[:4])]
        return dict(zip(("select", "load", "merge", "all"), [*spent, times[4]], strict=True))

    @torch.inference_mode()
    def answer_batch(
        self, texts: Sequence[str], mixes: Sequence[Any], new_tokens: int, choice: Any = None
    ) -> list[str]:
        """Texts of equally many tokens, each with its own mix, in one batch; `choice`: executed so, not as planned."""
        executor = self.executor
        ids = self.engine.tokenizer(list(texts), return_tensors="pt")["input_ids"].to(self.engine.model.device)
        loaded = executor.load(mixes)
        self.last = executor.choose(loaded, *ids.shape, new_tokens) if choice is None else choice
        with executor.running(loaded, self.last) as running:

            def token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                if new_tokens > 1:
                    running.decode()
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

            out = self.engine.model.generate(ids, stopping_criteria=[token], **greedy(ids, new_tokens))
        return self.engine.tokenizer.batch_decode(out[:, ids.shape[1] :])

    def plan(self, texts: Sequence[str], mixes: Sequence[Any], new_tokens: int) -> Any:
        """What the planner predicts of a batch."""
        executor, loaded = self.executor, self.executor.load(mixes)
        tokens = len(self.engine.tokenizer(texts[0])["input_ids"])
        return executor.planner.plan(executor.work(loaded, len(texts), tokens, new_tokens))

    def forget(self) -> None:
        """Drop the experts from memory."""
        self.executor.forget()


class Ttmerge:
    """`ttmerge` on a base of its own, since it writes into it; stages are timed by wrapping its methods."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        experts: Experts,
        encoder: Any | None,
        device: str,
        in_memory: bool = True,
        on_device: bool = True,
        own_base: bool = True,
    ) -> None:
        TestTimeMergingModel = _ttmerge()
        self.encoder, self.tokenizer, self.device = StandIn(encoder), tokenizer, device
        self.model = TestTimeMergingModel(
            expert_embeddings=experts.bank.centroids(),
            tokenizer=tokenizer,
            encoder=self.encoder,
            base_model=copy.deepcopy(model) if own_base else model,
            adapter_location=str(experts.numbered),
            beta=BETA**0.5,
            tau=TAU,
            device=device,
            max_merge_count=1000,
            keep_in_memory=in_memory,
            keep_on_device=in_memory and on_device,
        )
        self.spent: dict[str, float] = {}
        self.active = 0
        self.model._load_merged_model = self._timed("prepare", self.model._load_merged_model)
        self.model._efficient_merge_adapters = self._timed("merge", self.model._efficient_merge_adapters, count=True)
        self.model._restore_original_weights = self._timed("restore", self.model._restore_original_weights)

    def answer(self, text: str, query: np.ndarray, new_tokens: int) -> Times:
        """Raises RuntimeError if the mix is not of as many experts as the query asks for."""
        import safetensors.torch

        self.encoder.vector, self.encoder.seconds = query, 0.0
        self.spent = {"prepare": 0.0, "merge": 0.0, "restore": 0.0, "load": 0.0}
        load_file = safetensors.torch.load_file
        safetensors.torch.load_file = self._timed("load", load_file)
        try:
            begun, clock, back, _ = generate(self.model.generate, self.tokenizer, text, new_tokens, self.device)
        finally:
            safetensors.torch.load_file = load_file
        wanted = int((query[:-1] > 0).sum())
        if self.active != wanted:
            raise RuntimeError(f"ttmerge merged {self.active} experts, not {wanted}")
        spent = self.spent
        select = spent["prepare"] - spent["merge"] - self.encoder.seconds
        merge = spent["merge"] - spent["load"]
        return Times(
            self.encoder.seconds,
            select,
            spent["load"],
            merge,
            clock.first - begun,
            spent["restore"],
            back - begun,
        )

    def stages(self, text: str, query: np.ndarray) -> dict[str, float]:
        """Seconds of select, load and merge, and of all three; of experts in main memory `merge` copies them."""
        times = self.answer(text, query, 1)
        spent = {"select": times.select, "load": times.load, "merge": times.merge}
        return {**spent, "all": sum(spent.values())}

    def _timed(self, name: str, function: Any, count: bool = False) -> Any:
        def work(*args: Any, **options: Any) -> Any:
            if count:
                self.active = len(args[0])
            begun = time.perf_counter()
            result = function(*args, **options)
            machine.synchronise(self.device)
            self.spent[name] += time.perf_counter() - begun
            return result

        return work


def drop_from_page_cache(experts: Experts, query: np.ndarray) -> None:
    """Ask the kernel to forget the files of a mix's experts; pages that are mapped stay."""
    for row in np.flatnonzero(query[:-1] > 0):
        for file in (experts.numbered / str(row)).iterdir():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _ttmerge() -> Any:
    """Its one class; installed by itself, in a folder that nothing else looks into, when first needed."""
    from localmoe.identity import home

    folder = home() / "benchmarks" / f"ttmerge-{TTMERGE}"
    if not (folder / "ttmerge").is_dir():
        note(f"installing ttmerge {TTMERGE} in {folder}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), f"ttmerge=={TTMERGE}"], check=True, stdout=sys.stderr)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from ttmerge import TestTimeMergingModel

    return TestTimeMergingModel
