"""Rates: which learning rate suits a corpus, by short trainings of one adapter that tune documents judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from localmoe.train import experts as training
from localmoe.train.checks import ENOUGH, document_nll
from localmoe.train.groundwork import Groundwork
from localmoe.train.progress import Event, Watch
from localmoe.train.training import DivergedError, Progress, fresh_adapter, train

JUDGES = 64
"""Public tune documents that judge a rate, at most; the first passage of each."""
WIDENED = 3
"""Rates tried beyond those asked for, at most."""


def best_of(factors: Sequence[float], measure: Callable[[float], float], step: float = 2.0) -> dict[float, float]:
    """`measure` of every factor, and of × or ÷ `step` beyond the edge for as long as the best one lies there.

    The smaller the better; a single factor is measured alone. Raises ValueError without one.
    """
    tried = {factor: measure(factor) for factor in sorted(factors)}
    for _ in range(WIDENED if len(tried) > 1 else 0):
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            break
        beyond = best * step if best == max(tried) else best / step
        tried[beyond] = measure(beyond)
    return tried


def search(ground: Groundwork, watch: Watch) -> float:
    """The learning rate to build with: `train.learning_rate` times the best of `search.rates`, if any are to be tried.

    Each trial trains a fresh adapter on `search.tokens` tokens of the public documents, at a rate that falls to
    zero; the mean nll of public tune documents decides. Finished trials are kept in the work folder.
    """
    config, asked = ground.config.train, ground.config.search
    if not asked.rates:
        return config.learning_rate
    public = ground.rows.where("train", ())
    judges = sorted(ground.rows.where("tune", ()), key=lambda row: ground.rows.ids[row])[:JUDGES]
    if not public or len(judges) < ENOUGH:
        why = f"{len(public)} documents to train on and {len(judges)} to tune on are public"
        watch(Event("rates", 1, 1, f"no rates were tried, {config.learning_rate:g} is used: {why}"))
        return config.learning_rate
    tokens = min(asked.tokens, ground.tokens(public, config.trunk_epochs))
    done, begun = 0, 0

    def progress(seen: int, _loss: float = 0.0) -> None:
        nonlocal done
        done += seen
        watch(Event("rates", done, max(done, tokens * max(begun, len(asked.rates)))))

    def measure(factor: float) -> float:
        nonlocal done, begun
        begun += 1
        nll = _tried(ground, config.learning_rate * factor, public, sorted(judges), tokens, progress)
        done = tokens * begun
        progress(0)
        return nll

    tried = best_of(asked.rates, measure)
    best = min(tried, key=tried.__getitem__)
    if not math.isfinite(tried[best]):
        watch(Event("rates", done, done, f"every rate diverged; {config.learning_rate:g} is used"))
        return config.learning_rate
    found = ", ".join(f"{config.learning_rate * factor:g}: {nll:.3f}" for factor, nll in sorted(tried.items()))
    rate = config.learning_rate * best
    watch(Event("rates", done, done, f"rate {rate:g}, by nats a token on {len(judges)} tune documents ({found})"))
    return rate


def _tried(
    ground: Groundwork, rate: float, public: Sequence[int], judges: Sequence[int], tokens: int, progress: Progress
) -> float:
    """Mean nll (nats a token) of the judges after a training at this rate; infinite if it diverged."""
    name = f"rates/{rate:.6g}.json"
    if not ground.work.has(name):
        ground.work.write_json(name, _measured(ground, rate, public, judges, tokens, progress))
    value = ground.work.read_json(name)
    return math.inf if value is None else float(value)


def _measured(
    ground: Groundwork, rate: float, public: Sequence[int], judges: Sequence[int], tokens: int, progress: Progress
) -> float | None:
    config, seed = ground.config.train, ground.config.seed
    model, _ = training.workplace(ground.config.base, ground.config.revision)
    passages = [passage for document in ground.work.passages(public) for passage in document]
    try:
        trained = train(
            model, passages, fresh_adapter(model, config, seed), config, rate, seed, tokens, progress=progress
        )
    except DivergedError:
        return None
    parts = ground.work.passages(judges)
    documents = {row: passages[:1] for row, passages in zip(judges, parts, strict=True)}
    nll = document_nll(model, documents, trained.adapter).values()
    mean = sum(one.total for one in nll) / max(1, sum(one.tokens for one in nll))
    return mean if math.isfinite(mean) else None
