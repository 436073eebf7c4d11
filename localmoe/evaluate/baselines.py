"""Methods without a router: the base, the trunk, one adapter fine-tuned on as many tokens, documents in the context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from localmoe.bank.adapters import write_adapter
from localmoe.bank.manifest import AdapterRecord, Training
from localmoe.bank.peft import read_adapter
from localmoe.config import TrainConfig, as_dict
from localmoe.errors import LocalMoEError
from localmoe.evaluate.bench import Bench, NotPossibleError, Scores, methods
from localmoe.evaluate.merged import time_generation
from localmoe.evaluate.protocol import Trial, score_alone
from localmoe.evaluate.statistics import perplexity
from localmoe.lora import Adapter
from localmoe.models import context_length, needs_transpose
from localmoe.packing import Passage
from localmoe.runtime.engine import base_mix
from localmoe.train.training import DivergedError, fresh_adapter, train

FINE_TUNED = "experts/fine-tuned"
_RECORD = "fine-tuned.json"


@methods.register("base")
def base(bench: Bench) -> Scores:
    """The base model as it is."""
    mixes = [base_mix(bench.engine.bank)] * len(bench.trials)
    return _alone(bench, None, 0, "base", time_generation(bench, mixes))


@methods.register("trunk")
def trunk(bench: Bench) -> Scores:
    """The adapter that all experts start from."""
    return _alone(bench, trunk_of(bench), _trunk_tokens(bench), "trunk")


@methods.register("fine-tuned")
def fine_tuned(bench: Bench) -> Scores:
    """One adapter on all train documents, as many tokens as trunk and experts together, rate and rank tuned on tune."""
    adapter, found = fine_tuned_adapter(bench)
    note = f"rate {found.rate:g}, rank {found.rank}, of {len(found.tried)} tried on {len(bench.tune)} tune documents"
    scores = _alone(bench, adapter, found.tokens, "fine-tuned")
    return replace(scores, note=note, detail={"tried": [as_dict(trial) for trial in found.tried]})


@dataclass(frozen=True)
class Tried:
    """One rate and rank, and the perplexity on the tune documents that they lead to; infinite if it diverged."""

    rate: float
    rank: int
    tokens: int
    perplexity: float


@dataclass(frozen=True)
class FineTuned:
    """The fine-tuned adapter, with the settings that were chosen and all that were tried."""

    adapter: AdapterRecord
    rate: float
    rank: int
    tokens: int
    seconds: float
    tried: tuple[Tried, ...]


def fine_tuned_adapter(bench: Bench) -> tuple[Adapter, FineTuned]:
    """The baseline's adapter: trained now, or read where an earlier run left it, a PEFT folder under `experts/`."""
    work = bench.work
    folder = work.path.parent.parent
    if not work.has(_RECORD):
        found = _fine_tune(bench, folder)
        work.write_json(_RECORD, as_dict(found))
    found = TypeAdapter(FineTuned).validate_python(work.read_json(_RECORD))
    return read_adapter(folder / found.adapter.folder)[0], found


def _fine_tune(bench: Bench, folder: Path) -> FineTuned:
    budget, passages, model = bench.bank_tokens, bench.train_passages(), bench.engine.model
    tried = _tune(bench, passages, min(budget, bench.config.fine_tune.tune_tokens))
    best = min(tried, key=lambda trial: trial.perplexity)
    config = _with_rank(bench, best.rank)
    done = 0

    def progress(tokens: int, _loss: float) -> None:
        nonlocal done
        done += tokens
        bench.watch("fine-tuned", min(done, budget), budget)

    started = time.perf_counter()
    with bench.engine.merged(base_mix(bench.engine.bank)):
        start = fresh_adapter(model, config, bench.config.seed)
        trained = train(model, passages, start, config, best.rate, bench.config.seed, progress=progress, tokens=budget)
    record = write_adapter(
        folder,
        FINE_TUNED,
        trained.adapter,
        bench.engine.bank.manifest.base.id,
        needs_transpose(model),
        Training(trained.tokens, trained.steps, trained.first_loss, trained.last_loss, best.rate, 1),
    )
    return FineTuned(record, best.rate, best.rank, trained.tokens, time.perf_counter() - started, tuple(tried))


def _tune(bench: Bench, passages: Sequence[Passage], tokens: int) -> list[Tried]:
    """Every rate at the bank's rank, beyond the edge as long as the edge is best; then the other ranks at the best."""
    config, bank = bench.config.fine_tune, bench.build_config.train
    factors = sorted(config.rates)
    tried = {factor: _try(bench, passages, bank.learning_rate * factor, bank.rank, tokens) for factor in factors}
    while True:
        best = min(tried, key=lambda factor: tried[factor].perplexity)
        beyond = best * 2 if best == max(tried) else best / 2 if best == min(tried) else None
        if beyond is None or len(tried) == 1 or len(tried) > len(factors) + 3:
            break
        tried[beyond] = _try(bench, passages, bank.learning_rate * beyond, bank.rank, tokens)
    others = [rank for rank in config.ranks if rank != bank.rank]
    return [*tried.values(), *(_try(bench, passages, tried[best].rate, rank, tokens) for rank in others)]


def _try(bench: Bench, passages: Sequence[Passage], rate: float, rank: int, tokens: int) -> Tried:
    name = f"tried-{rate:.6g}-{rank}-{tokens}.json"
    if not bench.work.has(name):
        bench.work.write_json(name, as_dict(_tried(bench, passages, rate, rank, tokens)))
    return TypeAdapter(Tried).validate_python(bench.work.read_json(name))


def _tried(bench: Bench, passages: Sequence[Passage], rate: float, rank: int, tokens: int) -> Tried:
    model, config, done = bench.engine.model, _with_rank(bench, rank), 0

    def progress(count: int, _loss: float) -> None:
        nonlocal done
        done += count
        bench.watch(f"rate {rate:.2g}, rank {rank}", min(done, tokens), tokens)

    try:
        with bench.engine.merged(base_mix(bench.engine.bank)):
            start = fresh_adapter(model, config, bench.config.seed)
            trained = train(model, passages, start, config, rate, bench.config.seed, progress=progress, tokens=tokens)
    except DivergedError:
        return Tried(rate, rank, tokens, float("inf"))
    nll = score_alone(bench.engine, bench.tune, trained.adapter, lambda _done: None)
    return Tried(rate, rank, trained.tokens, perplexity(nll, [trial.passage.predicted for trial in bench.tune]))


def _with_rank(bench: Bench, rank: int) -> TrainConfig:
    """The bank's training with another rank; alpha/rank, the scale of an update, stays."""
    bank = bench.build_config.train
    return replace(bank, rank=rank, alpha=bank.alpha * rank / bank.rank)


@methods.register("context")
def context(bench: Bench) -> Scores:
    """The base with the nearest train documents before the prefix, the nearest last, as many as the context holds."""
    engine = bench.engine
    room = context_length(engine.model)
    trials, seconds = [], []
    for trial in bench.trials:
        started = time.perf_counter()
        left = min(room - len(trial.passage), bench.cut.length)
        before: list[torch.Tensor] = []
        for passage in nearest_passages(bench, trial, bench.config.ttt.neighbours):
            if len(passage) > left:
                break
            before.insert(0, passage.tokens)
            left -= len(passage)
        tokens = torch.cat([*before, trial.passage.tokens])
        labels = torch.cat([torch.zeros(sum(len(part) for part in before), dtype=torch.bool), trial.passage.labels])
        trials.append(replace(trial, passage=Passage(tokens, labels)))
        seconds.append(time.perf_counter() - started)
    scores = _alone(replace_trials(bench, trials), None, 0, "context")
    read = [len(trial.passage) - len(own.passage) for trial, own in zip(trials, bench.trials, strict=True)]
    note = f"{sum(read) / len(read):,.0f} tokens of neighbours a prompt"
    return replace(scores, note=note, seconds=scores.seconds | {"search": tuple(seconds)})


def replace_trials(bench: Bench, trials: Sequence[Trial]) -> Bench:
    """The same bench with other trials."""
    return Bench(bench.engine, bench.config, bench.cut, tuple(trials), bench.tune, bench.work, bench.watch)


def nearest_passages(bench: Bench, trial: Trial, count: int) -> list[Passage]:
    """First passages of the train documents nearest to the query, the most similar first."""
    return bench.train_passages(nearest_documents(bench, trial, count), most=1)


def nearest_documents(bench: Bench, trial: Trial, count: int) -> list[str]:
    """Ids of the public train documents nearest to the query; near duplicates of the trial itself are left out."""
    from localmoe.evaluate.duplicates import near_duplicates

    bank = bench.engine.bank
    vector = bench.engine.encoder.encode([trial.prefix])[0]
    table = bank.documents()
    names = table["id"].to_pylist()
    splits, access = table["split"].to_pylist(), table["access"].to_pylist()
    train = np.array([row for row, split in enumerate(splits) if split == "train" and not access[row]])
    similarity = bank.embeddings()[train].astype(np.float32) @ vector
    order = train[np.argsort(-similarity, kind="stable")[: count + 10]]
    found = [names[row] for row in order]
    twins = near_duplicates([trial.whole], bank.texts(found), bench.config.near_duplicate)
    left_out = {found[twin.other] for twin in twins}
    return [name for name in found if name not in left_out][:count]


def trunk_of(bench: Bench) -> Adapter:
    """The bank's trunk; raises NotPossibleError where it has none."""
    adapter = bench.engine.bank.trunk()
    if adapter is None:
        raise NotPossibleError("the bank has no trunk", "leave out trunk and ttt-trunk, or build with recipe trunk")
    return adapter


def _trunk_tokens(bench: Bench) -> int:
    record = bench.engine.bank.manifest.trunk
    if record is None or record.training is None:
        raise LocalMoEError("the bank does not say how many tokens its trunk saw")
    return record.training.tokens


def _alone(
    bench: Bench,
    adapter: Adapter | None,
    tokens: int,
    title: str,
    seconds: dict[str, tuple[float, ...]] | None = None,
) -> Scores:
    """Every suffix under the base, or under one adapter."""
    count = len(bench.trials)
    totals = score_alone(bench.engine, bench.trials, adapter, lambda done: bench.watch(title, done, count))
    return Scores(tuple(range(count)), tuple(totals), tokens, seconds={} if seconds is None else seconds)
