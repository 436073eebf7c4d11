"""Methods without a router: the base, the trunk, one adapter fine-tuned on as many tokens, documents in the context."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
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
from localmoe.evaluate.duplicates import near_duplicates
from localmoe.evaluate.merged import time_generation
from localmoe.evaluate.protocol import Trial, score_alone
from localmoe.evaluate.statistics import perplexity
from localmoe.lora import Adapter
from localmoe.models import context_length, needs_transpose
from localmoe.packing import Passage, token_nll
from localmoe.runtime.engine import base_mix
from localmoe.train.course import DivergedError, Trained
from localmoe.train.rates import best_of
from localmoe.train.training import fresh_adapter, train

FINE_TUNED = "experts/fine-tuned"
_RECORD = "fine-tuned.json"
DOUBLED = 3
"""How often the rank of the baseline is doubled, or halved, unasked, at most."""
_SPARE = 10  # neighbours beyond those asked for, in the place of near duplicates


@methods.register("base")
def base(bench: Bench) -> Scores:
    """The base model as it is."""
    mixes = [base_mix(bench.engine.bank)] * len(bench.trials)
    return _alone(bench, None, 0, "base", time_generation(bench, mixes))


@methods.register("trunk")
def trunk(bench: Bench) -> Scores:
    """One adapter for all: what experts start from, or of a joint bank the mean of its mixes."""
    return _alone(bench, trunk_of(bench), trunk_tokens(bench), "trunk")


@methods.register("fine-tuned")
def fine_tuned(bench: Bench) -> Scores:
    """One adapter on all train documents, as many tokens as trunk and experts together, its settings tuned on tune."""
    adapter, found = fine_tuned_adapter(bench)
    best, settings = found.setting, len({trial.setting for trial in found.tried})
    full = len(found.tried) - settings
    note = f"{best.text}, of {settings} settings tried on {len(bench.tune)} tune documents"
    note += f", {full} of them in full" if full else ""
    scores = _alone(bench, adapter, found.tokens, "fine-tuned")
    results = [{"tokens": trial.tokens, "perplexity": trial.perplexity} for trial in found.tried]
    tried = [as_dict(trial.setting) | result for trial, result in zip(found.tried, results, strict=True)]
    return replace(scores, note=note, detail={"tried": tried})


@dataclass(frozen=True)
class Setting:
    """What is tuned: peak rate, rank, and passages a step."""

    rate: float
    rank: int
    batch: int

    @property
    def text(self) -> str:
        """For people."""
        return f"rate {self.rate:g}, rank {self.rank}, {self.batch} passage{'s' if self.batch > 1 else ''} a step"


@dataclass(frozen=True)
class Tried:
    """One setting, and the perplexity on the tune documents that it leads to; infinite if it diverged."""

    setting: Setting
    tokens: int
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class FineTuned:
    """The fine-tuned adapter, with the settings that were chosen, all that were tried, and the seconds of it all."""

    adapter: AdapterRecord
    setting: Setting
    tokens: int
    seconds: float
    tried: tuple[Tried, ...]


def fine_tuned_adapter(bench: Bench) -> tuple[Adapter, FineTuned]:
    """The baseline's adapter: trained now, or read where an earlier run left it, a PEFT folder under `experts/`."""
    work = bench.training
    folder = work.path.parent.parent
    if not work.has(_RECORD):
        found = _fine_tune(bench, folder)
        work.write_json(_RECORD, as_dict(found))
    found = TypeAdapter(FineTuned).validate_python(work.read_json(_RECORD))
    return read_adapter(folder / found.adapter.folder)[0], found


def training_seconds(bench: Bench) -> float:
    """Seconds that the baseline took, its trials included, whenever that was; 0 where there is none."""
    return float(bench.training.read_json(_RECORD)["seconds"]) if bench.training.has(_RECORD) else 0.0


@dataclass(frozen=True)
class Finalist:
    """A setting trained in full, and the perplexity on the tune documents that it leads to."""

    adapter: AdapterRecord
    trial: Tried


def _fine_tune(bench: Bench, folder: Path) -> FineTuned:
    budget, passages = bench.bank_tokens, bench.train_passages()
    tried = _tune(bench, passages, min(budget, bench.config.fine_tune.tune_tokens))
    finalists = _finals(bench, passages, tried, budget, folder)
    best = min(finalists, key=lambda one: one.trial.perplexity)
    full = [one.trial for one in finalists] if len(finalists) > 1 else []
    seconds = sum(trial.seconds for trial in (*tried, *(one.trial for one in finalists)))
    return FineTuned(best.adapter, best.trial.setting, best.trial.tokens, seconds, (*tried, *full))


def _finals(
    bench: Bench, passages: Sequence[Passage], tried: Sequence[Tried], budget: int, folder: Path
) -> list[Finalist]:
    """The best settings trained on the whole budget, each at a lower rate than those before it.

    One that diverges at full length makes way for the next best.
    """
    finalists: list[Finalist] = []
    finite = [trial for trial in tried if math.isfinite(trial.perplexity)]
    for attempt, trial in enumerate(sorted(finite, key=lambda trial: trial.perplexity), 1):
        if any(trial.setting.rate >= one.trial.setting.rate for one in finalists):
            continue
        name = f"full-{trial.setting.rate:.6g}-{trial.setting.rank}-{trial.setting.batch}.json"
        try:
            if not bench.training.has(name):
                bench.training.write_json(
                    name, as_dict(_final(bench, passages, trial.setting, budget, folder, attempt))
                )
        except DivergedError:
            continue
        finalists.append(TypeAdapter(Finalist).validate_python(bench.training.read_json(name)))
        if len(finalists) == bench.config.fine_tune.finalists:
            break
    if not finalists:
        raise NotPossibleError(
            "fine-tuning diverged at every rate", "try lower ones: --set 'fine_tune.rates=[0.1,0.3]'"
        )
    return finalists


def _final(
    bench: Bench, passages: Sequence[Passage], setting: Setting, budget: int, folder: Path, attempt: int
) -> Finalist:
    started = time.perf_counter()
    trained = _train(bench, passages, setting, budget, "fine-tuned")
    record = write_adapter(
        folder,
        FINE_TUNED,
        trained.adapter,
        bench.engine.bank.manifest.base.id,
        needs_transpose(bench.engine.model),
        Training(trained.tokens, trained.steps, trained.first_loss, trained.last_loss, setting.rate, attempt),
    )
    found = _on_tune(bench, trained.adapter)
    return Finalist(record, Tried(setting, trained.tokens, found, time.perf_counter() - started))


def _tune(bench: Bench, passages: Sequence[Passage], tokens: int) -> list[Tried]:
    """Every rate as the bank is trained, beyond the edge as long as the best lies there; other batches, then ranks.

    Another batch is tried at the best rate and at half of it, a higher rank at the best rate so far and half of it, a
    lower one at twice of it, and from there as far as it takes. Where no ranks are given: twice the bank's, and twice
    that as long as it is better; where twice is not better, half of it, and half of that, likewise.
    """
    config, bank, center = bench.config.fine_tune, bench.build_config.train, bench.learning_rate
    tried: list[Tried] = []

    def measure(factor: float, rank: int = bank.rank, batch: int = bank.batch) -> float:
        tried.append(_try(bench, passages, Setting(center * factor, rank, batch), tokens))
        return tried[-1].perplexity

    def improves(rank: int) -> bool:
        before = min(tried, key=lambda trial: trial.perplexity)
        at = before.setting.rate / center
        factors = (at / 2, at) if rank > bank.rank else (at, 2 * at)
        found = best_of(factors, partial(measure, rank=rank, batch=before.setting.batch))
        return min(found.values()) < before.perplexity

    found = best_of(config.rates, measure)
    best = min(found, key=found.__getitem__)
    for batch in config.batches:
        if batch != bank.batch:
            best_of((best / 2, best), partial(measure, batch=batch))
    if config.ranks is not None:
        for rank in config.ranks:
            if rank != bank.rank:
                improves(rank)
    elif not _climb(improves, [bank.rank * 2**power for power in range(1, DOUBLED + 1)]):
        _climb(improves, [bank.rank // 2**power for power in range(1, DOUBLED + 1) if bank.rank >= 2**power])
    return tried


def _climb(improves: Callable[[int], bool], ranks: Sequence[int]) -> bool:
    """Try ranks for as long as each is better than all before it; whether the first one was."""
    return bool(list(takewhile(improves, ranks)))


def _try(bench: Bench, passages: Sequence[Passage], setting: Setting, tokens: int) -> Tried:
    name = f"tried-{setting.rate:.6g}-{setting.rank}-{setting.batch}-{tokens}.json"
    if not bench.training.has(name):
        bench.training.write_json(name, as_dict(_tried(bench, passages, setting, tokens)))
    return TypeAdapter(Tried).validate_python(bench.training.read_json(name))


def _tried(bench: Bench, passages: Sequence[Passage], setting: Setting, tokens: int) -> Tried:
    started = time.perf_counter()
    try:
        trained = _train(bench, passages, setting, tokens, setting.text)
    except DivergedError:
        return Tried(setting, tokens, math.inf, time.perf_counter() - started)
    found = _on_tune(bench, trained.adapter)
    return Tried(setting, trained.tokens if math.isfinite(found) else tokens, found, time.perf_counter() - started)


def _on_tune(bench: Bench, adapter: Adapter) -> float:
    """The perplexity of the tune documents with an adapter; infinite where it is no number."""
    nll = score_alone(bench.engine, bench.tune, adapter, lambda _done: None)
    try:
        found = perplexity(nll, [trial.passage.predicted for trial in bench.tune])
    except OverflowError:  # exp of hundreds of nats a token
        return math.inf
    return math.inf if math.isnan(found) else found


def _train(bench: Bench, passages: Sequence[Passage], setting: Setting, tokens: int, title: str) -> Trained:
    """A fresh adapter on so many tokens of all documents, with the base to itself."""
    model, config, seed, done = bench.engine.model, _with(bench, setting), bench.config.seed, 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bench.watch(title, min(done, tokens), tokens)

    with bench.engine.merged(base_mix(bench.engine.bank)):
        start = fresh_adapter(model, config, seed)
        return train(model, passages, start, config, setting.rate, seed, progress=progress, tokens=tokens)


def _with(bench: Bench, setting: Setting) -> TrainConfig:
    """The bank's training with another rank and batch; alpha/rank, the scale of an update, stays."""
    bank = bench.build_config.train
    return replace(bank, rank=setting.rank, alpha=bank.alpha * setting.rank / bank.rank, batch=setting.batch)


@methods.register("context")
def context(bench: Bench) -> Scores:
    """The base with the nearest train documents before the prefix, the nearest last, as many as the context holds."""
    room = context_length(bench.engine.model)
    trials, seconds = [], []
    for trial in bench.trials:
        found, searched = neighbours(bench, trial)
        left = min(room - len(trial.passage), bench.cut.length)
        before: list[torch.Tensor] = []
        for passage in found:
            if len(passage) > left:
                break
            before.insert(0, passage.tokens)
            left -= len(passage)
        tokens = torch.cat([*before, trial.passage.tokens])
        labels = torch.cat([torch.zeros(sum(len(part) for part in before), dtype=torch.bool), trial.passage.labels])
        trials.append(replace(trial, passage=Passage(tokens, labels)))
        seconds.append(searched)
    scores = _alone(replace(bench, trials=tuple(trials)), None, 0, "context")
    pairs = list(zip(bench.trials, trials, strict=True))[: bench.config.timed]
    read_in = tuple(_forward_seconds(bench, other) - _forward_seconds(bench, own) for own, other in pairs)
    added = tuple(search + reading for search, reading in zip(seconds, read_in, strict=False))
    read = [len(trial.passage) - len(own.passage) for trial, own in zip(trials, bench.trials, strict=True)]
    note = f"{sum(read) / len(read):,.0f} tokens of neighbours a prompt"
    return replace(scores, note=note, seconds={"search": tuple(seconds), "read": read_in, "added": added})


def _forward_seconds(bench: Bench, trial: Trial) -> float:
    """Seconds in which the base reads a trial's tokens."""
    with bench.engine.merged(base_mix(bench.engine.bank)):
        started = time.perf_counter()
        token_nll(bench.engine.model, [trial.passage])
        return time.perf_counter() - started


def neighbours(bench: Bench, trial: Trial) -> tuple[list[Passage], float]:
    """First passages of the train documents nearest to the query, the most similar first, and the seconds it took.

    Leaving out near duplicates of the trial is part of the evaluation, not of the method: it is not timed.
    """
    count = bench.config.ttt.neighbours
    started = time.perf_counter()
    ranked = _ranked(bench, trial, count)
    found = time.perf_counter()
    kept = _without_twins(bench, trial, ranked)[:count]
    checked = time.perf_counter()
    passages = bench.train_passages(kept, most=1)
    return passages, found - started + time.perf_counter() - checked


def nearest_documents(bench: Bench, trial: Trial, count: int) -> list[str]:
    """Ids of the public train documents nearest to the query; near duplicates of the trial itself are left out."""
    return _without_twins(bench, trial, _ranked(bench, trial, count))[:count]


def _ranked(bench: Bench, trial: Trial, count: int) -> list[str]:
    """Ids of public train documents by similarity to the query, with some to spare."""
    names, rows = bench.public_train
    vector = bench.engine.encoder.encode([trial.prefix])[0]
    similarity = bench.engine.bank.embeddings()[rows].astype(np.float32) @ vector
    return [names[place] for place in np.argsort(-similarity, kind="stable")[: count + _SPARE].tolist()]


def _without_twins(bench: Bench, trial: Trial, found: list[str]) -> list[str]:
    twins = near_duplicates([trial.whole], bench.engine.bank.texts(found), bench.config.near_duplicate)
    left_out = {found[twin.other] for twin in twins}
    return [name for name in found if name not in left_out]


def trunk_of(bench: Bench) -> Adapter:
    """The bank's trunk; raises NotPossibleError where it has none."""
    adapter = bench.engine.bank.trunk()
    if adapter is None:
        raise NotPossibleError(
            "the bank has no trunk", "leave out trunk and ttt-trunk, or build by another recipe than paper"
        )
    return adapter


def trunk_tokens(bench: Bench) -> int:
    """Label tokens that the trunk was trained on."""
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
