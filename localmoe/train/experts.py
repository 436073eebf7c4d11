"""Experts: train one adapter, check it on tune documents, leave it in the bank with a record of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from localmoe.bank.adapters import write_adapter
from localmoe.bank.manifest import AdapterRecord, Outcome, Training
from localmoe.bank.peft import read_adapter
from localmoe.config import TrainConfig, as_dict
from localmoe.lora import Adapter
from localmoe.models import check_packing, load_model, load_tokenizer, needs_transpose
from localmoe.packing import Passage
from localmoe.train.checks import Nll, document_nll, outcome
from localmoe.train.training import DivergedError, Progress, Trained, fresh_adapter, train
from localmoe.train.work import Work

ATTEMPTS = 2
"""A training that diverges is repeated once, at half the rate."""
GENTLER = 0.25
"""An expert that is worse than the trunk it started from is trained once more, at this share of its rate."""


@dataclass(frozen=True)
class AdapterTask:
    """All that one worker needs to train and check one adapter; plain values, so that it can travel."""

    bank: str
    key: str
    name: str
    """"trunk" or "experts/<id>"."""
    base: str
    revision: str | None
    base_id: str
    config: TrainConfig
    learning_rate: float
    epochs: float
    floor: float
    """Share of the rate at the end of the training."""
    seed: int
    start: AdapterRecord | None
    """The trunk that it starts from; none = from the base."""
    train_rows: tuple[int, ...]
    tune_rows: tuple[int, ...]


@dataclass(frozen=True)
class AdapterResult:
    """What became of a task; `adapter` is none where training failed."""

    adapter: AdapterRecord | None
    outcome: Outcome


@lru_cache(maxsize=1)
def workplace(base: str, revision: str | None) -> tuple[Any, Any]:
    """Base model and tokenizer of this process, loaded once for all its tasks."""
    model = load_model(base, revision)
    check_packing(model)
    return model, load_tokenizer(base, revision)


def result_file(name: str) -> str:
    """Where the work folder keeps the result of a task."""
    return f"{name}.json"


def run(task: AdapterTask, progress: Progress | None = None) -> AdapterResult:
    """The result of a task: from the work folder if it was finished before, else trained, checked and left there."""
    work = Work(Path(task.bank), task.key)
    if work.has(result_file(task.name)):
        return TypeAdapter(AdapterResult).validate_python(work.read_json(result_file(task.name)))
    model, passages, start = _material(work, task)
    try:
        made = _made(model, work, task, passages, start, progress)
    except DivergedError as error:
        result = AdapterResult(None, Outcome("failed", 0, None, None, error.what))
    else:
        trained = made.trained
        record = write_adapter(
            Path(task.bank),
            task.name,
            trained.adapter,
            task.base_id,
            needs_transpose(model),
            Training(trained.tokens, trained.steps, trained.first_loss, trained.last_loss, made.rate, made.attempts),
        )
        result = AdapterResult(record, made.outcome)
    work.write_json(result_file(task.name), as_dict(result))
    return result


@dataclass(frozen=True)
class _Made:
    """A training that ended well, at which rate and attempt, and what the tune documents say of it."""

    trained: Trained
    rate: float
    attempts: int
    outcome: Outcome


def _made(
    model: Any,
    work: Work,
    task: AdapterTask,
    passages: list[Passage],
    start: Adapter | None,
    progress: Progress | None,
) -> _Made:
    """Trained and checked; an expert that is worse than its trunk once more, gently, and the better one is kept."""
    trained, rate, attempts = _train(model, task, passages, start, progress)
    documents = _tune_documents(work, task)
    reference = document_nll(model, documents, start)
    made = _Made(trained, rate, attempts, outcome(document_nll(model, documents, trained.adapter), reference))
    if made.outcome.status != "harmful" or start is None:
        return made
    try:
        trained, rate, more = _train(
            model, replace(task, learning_rate=rate * GENTLER), passages, start, progress, attempts=1
        )
    except DivergedError:
        return made
    checked = outcome(document_nll(model, documents, trained.adapter), reference)
    gentle = _Made(trained, rate, attempts + more, checked)
    return min(made, gentle, key=lambda one: math.inf if one.outcome.nll is None else one.outcome.nll)


def rehearse(task: AdapterTask, progress: Progress | None = None) -> dict[int, Nll]:
    """The loss of a task's tune documents after its training, of which nothing is kept. Raises DivergedError."""
    work = Work(Path(task.bank), task.key)
    model, passages, start = _material(work, task)
    trained, _, _ = _train(model, task, passages, start, progress, attempts=1)
    return document_nll(model, _tune_documents(work, task), trained.adapter)


def _train(
    model: Any,
    task: AdapterTask,
    passages: list[Passage],
    start: Adapter | None,
    progress: Progress | None,
    attempts: int = ATTEMPTS,
) -> tuple[Trained, float, int]:
    freeze = task.config.recipe == "trunk-shared" and start is not None
    begin = start if start is not None else fresh_adapter(model, task.config, task.seed)
    rate, tokens = task.learning_rate, round(task.epochs * sum(passage.predicted for passage in passages))
    for attempt in range(1, attempts + 1):
        try:
            return (
                train(model, passages, begin, task.config, rate, task.seed, tokens, freeze, progress, task.floor),
                rate,
                attempt,
            )
        except DivergedError:
            if attempt == attempts:
                raise
            rate /= 2
    raise AssertionError("unreachable")


def _material(work: Work, task: AdapterTask) -> tuple[Any, list[Passage], Adapter | None]:
    """The base, the passages to train on, and the trunk to start from; none = from the base."""
    model, _ = workplace(task.base, task.revision)
    start = read_adapter(Path(task.bank) / task.start.folder)[0] if task.start is not None else None
    return model, [passage for document in work.passages(task.train_rows) for passage in document], start


def _tune_documents(work: Work, task: AdapterTask) -> dict[int, tuple[Passage, ...]]:
    """The first passage of each tune document, by which an adapter is checked against the trunk (or the base)."""
    passages = work.passages(task.tune_rows)
    return {row: parts[:1] for row, parts in zip(task.tune_rows, passages, strict=True)}


Map = Callable[..., Any]
"""`map(function, tasks)`: the built-in one, an executor's, or Ray's."""
