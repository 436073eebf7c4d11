"""Test-time training: an adapter fine-tuned for one prompt on its nearest train documents, then thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from localmoe.evaluate.baselines import fine_tuned_adapter, neighbours, trunk_of, trunk_tokens
from localmoe.evaluate.bench import Bench, Scores, methods
from localmoe.evaluate.protocol import Trial
from localmoe.lora import Adapter, attached
from localmoe.models import packed
from localmoe.packing import Passage, token_nll
from localmoe.runtime.engine import base_mix
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
    count = min(bench.config.ttt.documents, len(bench.trials))
    for place, trial in enumerate(bench.trials[:count]):
        name = f"{title}/{trial.document}.json"
        if not bench.work.has(name):
            bench.work.write_json(name, _one(bench, trial, start))
        one = bench.work.read_json(name)
        totals.append(one["nll"])
        search.append(one["search"])
        trained.append(one["train"])
        seen.append(one["tokens"])
        bench.watch(title, place + 1, count)
    added = tuple(a + b for a, b in zip(search, trained, strict=True))
    stages = {"search": tuple(search), "train": tuple(trained), "added": added}
    note = f"{sum(seen) / count:,.0f} tokens a prompt; optimiser reset for each"
    return Scores(tuple(range(count)), tuple(totals), before + round(sum(seen) / count), seconds=stages, note=note)


def _one(bench: Bench, trial: Trial, start: Adapter) -> dict[str, float]:
    passages, search = neighbours(bench, trial)
    nll, seconds = train_and_score(bench, passages, start, trial.passage)
    tokens = sum(passage.predicted for passage in passages)
    return {"nll": nll, "search": search, "train": seconds, "tokens": tokens}


def train_and_score(bench: Bench, passages: Sequence[Passage], start: Adapter, scored: Passage) -> tuple[float, float]:
    """Summed nll (nats) of `scored` after one AdamW step at a constant rate on each passage in turn, and the seconds.

    `start` itself stays as it was: the factors that are trained are copies.
    """
    engine, config = bench.engine, bench.build_config.train
    with engine.merged(base_mix(engine.bank)), attached(engine.model, start, True, True) as modules:
        begun = time.perf_counter()
        factors = [factor for module in modules.values() for factor in (module.A, module.B)]
        rate, decay = bench.config.ttt.rate, config.weight_decay
        optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=decay, fused=True)
        with packed(engine.model):
            for passage in passages:
                step_once(engine.model, [passage], factors, optimizer, config.clip)
            seconds = time.perf_counter() - begun
            return float(token_nll(engine.model, [scored])[0].double().sum()), seconds
