"""Rates: which learning rate suits a corpus, by short trainings of one adapter that tune documents judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from localmoe.bank.manifest import AdapterRecord
from localmoe.train import experts as training
from localmoe.train.checks import ENOUGH, mean_nll
from localmoe.train.course import DivergedError, Progress
from localmoe.train.experts import AdapterTask
from localmoe.train.groundwork import TRUNK, Groundwork, trunk_epochs
from localmoe.train.progress import Event, Watch
from localmoe.train.rows import Rows

JUDGES = 64
"""Public tune documents that judge a rate, at most; the first passage of each."""
LEVEL = 0.005
"""Nats a token by which rates differ without being told apart."""
EXPERTS = 4
"""Experts that are trained to judge a rate of theirs, at most."""
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


def lowest_of_the_best(tried: Mapping[float, float]) -> float:
    """The lowest factor that is as good as the best one but for `LEVEL`: the bank trains for longer than a trial did,
    and longer trainings want lower rates."""
    least = min(tried.values())
    return min(factor for factor, nll in tried.items() if nll <= least + LEVEL)


def judges_of(rows: Rows) -> list[int]:
    """The tune documents that judge the trunk's rate, ascending; ids are random, so the first of them are a sample."""
    return sorted(sorted(rows.where("tune", ()), key=lambda row: rows.ids[row])[:JUDGES])


def search_rate(ground: Groundwork, watch: Watch) -> float:
    """The trunk's learning rate: `train.learning_rate`, times the lowest of the best `search.rates` if there are any.

    Each trial trains a fresh adapter on `search.tokens` tokens of the public documents, at a rate that falls to
    zero; the mean nll of public tune documents decides. Finished trials are kept in the work folder.
    """
    config, asked = ground.config.train, ground.config.search
    if not asked.rates:
        return config.learning_rate
    public = ground.rows.where("train", ())
    judges = judges_of(ground.rows)
    if not public or len(judges) < ENOUGH:
        why = f"{len(public)} documents to train on and {len(judges)} to tune on are public"
        watch(Event("rates", 1, 1, f"no rates were tried, {config.learning_rate:g} is used: {why}"))
        return config.learning_rate
    task = ground.task(TRUNK, ground.config.seed, None, public, judges)
    epochs = min(trunk_epochs(config), asked.tokens / ground.tokens(public, 1.0))
    task = replace(task, epochs=epochs, floor=0.0)

    def tasks(factor: float) -> list[AdapterTask]:
        return [replace(task, learning_rate=config.learning_rate * factor)]

    tried = _rehearsed(ground, "trunk", tasks, watch)
    best = lowest_of_the_best(tried)
    return config.learning_rate * told(tried, best, config.learning_rate, f"{len(judges)} tune documents", watch)


def search_expert_rate(ground: Groundwork, start: AdapterRecord | None, watch: Watch) -> float:
    """The rate of experts after a trunk, as a multiple of its: `train.expert_rate`, times the best of `search.rates`.

    Each trial trains a few experts, those with the most tune documents near them, and the mean nll of these documents
    decides. Experts that start from the base are trained at the trunk's rate, and nothing is tried; nor for recipe
    `joint`, where most are trained with the trunk (`joint_rates`).
    """
    asked, unit = ground.config.search, ground.expert_rate
    if not asked.rates or start is None or ground.config.train.recipe == "joint":
        return unit
    order = sorted(range(len(ground.tune)), key=lambda k: (-len(ground.tune[k]), k))
    chosen = [k for k in order if len(ground.tune[k]) >= ENOUGH][:EXPERTS]
    if not chosen:
        watch(Event("rates", 1, 1, f"{unit:g} of it for experts, not tried: they have no tune documents"))
        return unit

    def tasks(factor: float) -> list[AdapterTask]:
        at_rate = replace(ground, expert_rate=unit * factor)
        return [at_rate.expert_task(k, start) for k in chosen]

    tried = _rehearsed(ground, "experts", tasks, watch)
    best = min(tried, key=tried.__getitem__)
    judges = f"{sum(len(ground.tune[k]) for k in chosen)} tune documents of {len(chosen)} experts"
    return unit * told(tried, best, ground.learning_rate * unit, judges, watch)


def measured(
    ground: Groundwork,
    kind: str,
    tokens: Callable[[float], int],
    train: Callable[[float, Progress], float | None],
    watch: Watch,
) -> dict[float, float]:
    """Mean nll (nats a token) after the training that belongs to each of `search.rates`; infinite where one diverged.

    tokens: what it reads; train: the nll, None for one that diverged. What is found is kept in the work folder.
    """
    done, whole = 0, 0

    def progress(seen: int) -> None:
        nonlocal done
        done += seen
        watch(Event("rates", done, max(done, whole)))

    def measure(factor: float) -> float:
        nonlocal done, whole
        name, each = f"rates/{kind}-{factor:.6g}.json", tokens(factor)
        whole = max(each * len(ground.config.search.rates), done + each)
        if not ground.work.has(name):
            ground.work.write_json(name, train(factor, progress))
        value = ground.work.read_json(name)
        return math.inf if value is None else float(value)

    return best_of(ground.config.search.rates, measure)


def _rehearsed(
    ground: Groundwork, kind: str, tasks: Callable[[float], Sequence[AdapterTask]], watch: Watch
) -> dict[float, float]:
    """`measured` of trainings that the tasks' own tune documents judge."""

    def tokens(factor: float) -> int:
        return sum(ground.tokens(task.train_rows, task.epochs) for task in tasks(factor))

    return measured(ground, kind, tokens, lambda factor, progress: _mean(tasks(factor), progress), watch)


def _mean(tasks: Sequence[AdapterTask], progress: Progress) -> float | None:
    try:
        found = [nll for losses in training.rehearse(tasks, progress) for nll in losses.values()]
    except DivergedError:
        return None
    mean = mean_nll(found)
    return mean if math.isfinite(mean) else None


def told(tried: Mapping[float, float], best: float, unit: float, judges: str, watch: Watch) -> float:
    """The factor to build with, told with all that were tried; 1 where all diverged."""
    if not math.isfinite(tried[best]):
        watch(Event("rates", 1, 1, f"every rate diverged; {unit:g} is used"))
        return 1.0
    found = ", ".join(f"{unit * factor:g}: {nll:.3f}" for factor, nll in sorted(tried.items()))
    watch(Event("rates", 1, 1, f"rate {unit * best:g}, by nats a token on {judges} ({found})"))
    return best
