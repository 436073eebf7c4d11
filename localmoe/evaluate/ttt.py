"""Test-time training: an adapter fine-tuned for one prompt on its nearest train documents, then thrown away."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from localmoe.evaluate.baselines import fine_tuned_adapter, neighbours, trunk_of, trunk_tokens
from localmoe.evaluate.bench import Bench, Scores, methods
from localmoe.evaluate.protocol import Trial
from localmoe.lora import Adapter, LowRank, attached
from localmoe.models import packed
from localmoe.packing import Passage, token_nll
from localmoe.runtime.engine import base_mix
from localmoe.train.course import DivergedError
from localmoe.train.places import Places
from localmoe.train.rates import best_of
from localmoe.train.together import captured, step_through
from localmoe.train.training import fresh_adapter, step_once


@methods.register("ttt")
def ttt(bench: Bench) -> Scores:
    """Test-time training of a fresh adapter on the base."""
    return _trained(bench, fresh_adapter(bench.engine.model, bench.build_config.train, bench.config.seed), "ttt", 0)


@methods.register("ttt-trunk")
def ttt_trunk(bench: Bench) -> Scores:
    """Test-time training of a copy of the trunk."""
    return _trained(bench, trunk_of(bench), "ttt-trunk", trunk_tokens(bench))


@methods.register("ttt-fine-tuned")
def ttt_fine_tuned(bench: Bench) -> Scores:
    """Test-time training of a copy of the equal-token fine-tune."""
    start, found = fine_tuned_adapter(bench)
    return _trained(bench, start, "ttt-fine-tuned", found.tokens)


def _trained(bench: Bench, start: Adapter, title: str, before: int) -> Scores:
    """The first documents, one after the other; each is kept as soon as it is done."""
    totals, search, trained, seen = [], [], [], []
    model = bench.engine.model
    room = Places(model, start, 1) if captured(model) else None
    rate, tried = _rate(bench, start, title, room)
    count = min(bench.config.ttt.documents, len(bench.trials))
    for place, trial in enumerate(bench.trials[:count]):
        name = f"{title}/{trial.document}.json"
        if not bench.work.has(name):
            bench.work.write_json(name, _one(bench, trial, start, rate, room))
        one = bench.work.read_json(name)
        totals.append(one["nll"])
        search.append(one["search"])
        trained.append(one["train"])
        seen.append(one["tokens"])
        bench.watch(title, place + 1, count)
    added = tuple(a + b for a, b in zip(search, trained, strict=True))
    stages = {"search": tuple(search), "train": tuple(trained), "added": added}
    judges = min(bench.config.ttt.tune_documents, len(bench.tune))
    how = f"the best of {len(tried)} on {judges} tune documents" if tried else "not tuned"
    note = f"{sum(seen) / count:,.0f} tokens a prompt at {rate:g}, {how}; optimiser reset for each"
    tokens = before + round(sum(seen) / count)
    return Scores(tuple(range(count)), tuple(totals), tokens, seconds=stages, note=note, detail={"tried": tried})


def _rate(bench: Bench, start: Adapter, title: str, room: Places | None) -> tuple[float, list[dict[str, float]]]:
    """The rate for all prompts, with nats a token on the first tune documents at each that was tried."""
    asked = bench.config.ttt
    judges = bench.tune[: asked.tune_documents]
    if not asked.rates or not judges:
        return asked.rate, []
    tokens = sum(judge.passage.predicted for judge in judges)

    def measure(factor: float) -> float:
        name = f"{title}/rate-{asked.rate * factor:.6g}.json"
        if not bench.work.has(name):
            bench.watch(f"{title} at {asked.rate * factor:g}", 0, len(judges))
            try:
                totals = [_one(bench, judge, start, asked.rate * factor, room)["nll"] for judge in judges]
            except DivergedError:
                totals = [math.inf]
            bench.work.write_json(name, {"nll": sum(totals)})
        return float(bench.work.read_json(name)["nll"])

    found = best_of(asked.rates, measure)
    rows = [{"rate": asked.rate * factor, "nll": nll / tokens} for factor, nll in found.items()]
    return asked.rate * min(found, key=found.__getitem__), rows


def _one(bench: Bench, trial: Trial, start: Adapter, rate: float, room: Places | None) -> dict[str, float]:
    passages, search = neighbours(bench, trial)
    nll, seconds = train_and_score(bench, passages, start, trial.passage, rate, room)
    tokens = sum(passage.predicted for passage in passages)
    return {"nll": nll, "search": search, "train": seconds, "tokens": tokens}


def train_and_score(
    bench: Bench,
    passages: Sequence[Passage],
    start: Adapter,
    scored: Passage,
    rate: float,
    room: Places | None = None,
) -> tuple[float, float]:
    """Summed nll (nats) of `scored` after one AdamW step at a constant rate on each passage in turn, and the seconds.

    `start` itself stays as it was. room: where to train, the same for all prompts, so that steps captured for one serve
    the next; none = factors of its own, kernel by kernel.
    """
    engine = bench.engine
    with engine.merged(base_mix(engine.bank)):
        begun = time.perf_counter()
        if room is None:
            adapter = _stepped(bench, passages, start, rate)
        else:
            adapter = step_through(room, start, passages, bench.build_config.train, rate)
        seconds = time.perf_counter() - begun
        with attached(engine.model, adapter), packed(engine.model):
            return float(token_nll(engine.model, [scored])[0].double().sum()), seconds


def _stepped(bench: Bench, passages: Sequence[Passage], start: Adapter, rate: float) -> Adapter:
    """`start` after a step on each passage, the factors fp32."""
    model, config = bench.engine.model, bench.build_config.train
    with attached(model, start, True, True) as modules, packed(model):
        factors = [factor for module in modules.values() for factor in (module.A, module.B)]
        optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=config.weight_decay, fused=True)
        for passage in passages:
            step_once(model, [passage], factors, optimizer, config.clip)
        return {name: LowRank(it.A.detach(), it.B.detach(), start[name].c) for name, it in modules.items()}
