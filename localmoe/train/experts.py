"""Experts: train one adapter, check it on tune documents, leave it in the bank with a record of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from localmoe.bank.adapters import write_adapter
from localmoe.bank.manifest import AdapterRecord, Outcome, Training
from localmoe.bank.peft import read_adapter
from localmoe.config import SHARED_A, TrainConfig, as_dict
from localmoe.errors import UsageError
from localmoe.lora import Adapter, weight_of
from localmoe.models import check_packing, load_model, load_tokenizer, needs_transpose, target_linears
from localmoe.packing import Passage
from localmoe.train.checks import Nll, document_nll, outcome
from localmoe.train.course import DivergedError, Job, Progress, Trained, batches_of
from localmoe.train.together import captured
from localmoe.train.training import fresh_adapter, train_all
from localmoe.train.work import Work

ATTEMPTS = 2
"""A training that diverges is repeated once, at half the rate."""
GENTLER = 0.25
"""An expert that is worse than the trunk it started from is trained once more, at this share of its rate."""
WAVE = 128
"""Experts that a GPU trains before they are kept, at most; an interruption loses them."""


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
    read: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Row → passages of it that the trunk has read already; they come last."""


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
    _check_weights(model, base)
    return model, load_tokenizer(base, revision)


def _check_weights(model: Any, base: str) -> None:
    """Raises UsageError for a base whose weights are packed by a library that alone multiplies with them."""
    for name, module in target_linears(model).items():
        if not weight_of(module).is_floating_point():
            raise UsageError(
                f"experts are not trained beside the quantised {base!r}: {name} is a {type(module).__name__}",
                "build the bank on the same base unquantised, then answer with --base THIS_ONE --base-variant",
            )


def forget() -> None:
    """Let go of the base and of the trunk that this process keeps for its tasks."""
    workplace.cache_clear()
    _read.cache_clear()


def result_file(name: str) -> str:
    """Where the work folder keeps the result of a task."""
    return f"{name}.json"


def run(task: AdapterTask, progress: Progress | None = None) -> AdapterResult:
    """The result of a task: from the work folder if it was finished before, else trained, checked and left there."""
    (result,) = run_all([task], progress)
    return result


def run_all(tasks: Sequence[AdapterTask], progress: Progress | None = None) -> Iterator[AdapterResult]:
    """The results of tasks of one build, in their order; on a GPU a wave of them is trained at once."""
    work = Work(Path(tasks[0].bank), tasks[0].key)
    finished = all(work.has(result_file(task.name)) for task in tasks)  # then no base is needed
    size = len(tasks) if finished else wave_size(model_of(tasks[0]))
    for first in range(0, len(tasks), size):
        wave = tasks[first : first + size]
        left = [task for task in wave if not work.has(result_file(task.name))]
        for task, made in zip(left, _made(work, left, progress), strict=True):
            work.write_json(result_file(task.name), as_dict(_result(task, made)))
        for task in wave:
            yield TypeAdapter(AdapterResult).validate_python(work.read_json(result_file(task.name)))


def wave_size(model: Any) -> int:
    """How many experts are trained before they are kept: on a CPU each is, since they take turns there."""
    return WAVE if captured(model) else 1


def rehearse(tasks: Sequence[AdapterTask], progress: Progress | None = None) -> list[dict[int, Nll]]:
    """The loss of each task's tune documents after its training, of which nothing is kept. Raises DivergedError."""
    work, losses = Work(Path(tasks[0].bank), tasks[0].key), []
    for task, training in zip(tasks, _train(work, tasks, progress, attempts=1), strict=True):
        if isinstance(training, DivergedError):
            raise training
        losses.append(document_nll(model_of(task), tune_documents(work, task), training.trained.adapter))
    return losses


@dataclass(frozen=True)
class _Training:
    """A training that ended well, at which rate, and how many were begun."""

    trained: Trained
    rate: float
    attempts: int


@dataclass(frozen=True)
class _Made:
    """A training, and what the tune documents say of it."""

    training: _Training
    outcome: Outcome


def _made(work: Work, tasks: Sequence[AdapterTask], progress: Progress | None) -> list[_Made | DivergedError]:
    """Trained and checked; an expert that is worse than its trunk once more, gently, and the better one is kept."""
    made = _checked(work, tasks, _train(work, tasks, progress))
    harmful = {
        number: replace(task, learning_rate=one.training.rate * GENTLER)
        for number, (task, one) in enumerate(zip(tasks, made, strict=True))
        if isinstance(one, _Made) and one.outcome.status == "harmful" and task.start is not None
    }
    gentle = list(harmful.values())
    again = _checked(work, gentle, _train(work, gentle, progress, attempts=1))
    for number, one in zip(harmful, again, strict=True):
        made[number] = _better(made[number], one)
    return made


def _better(first: _Made | DivergedError, second: _Made | DivergedError) -> _Made | DivergedError:
    """The first of two trainings, or the second, which counts as another attempt of the first."""
    if isinstance(first, DivergedError) or isinstance(second, DivergedError):
        return first
    second = replace(
        second, training=replace(second.training, attempts=first.training.attempts + second.training.attempts)
    )
    return min(first, second, key=lambda one: math.inf if one.outcome.nll is None else one.outcome.nll)


def _checked(
    work: Work, tasks: Sequence[AdapterTask], trainings: Sequence[_Training | DivergedError]
) -> list[_Made | DivergedError]:
    """The trainings with what tune documents say of each, against where it started."""
    made: list[_Made | DivergedError] = []
    for task, training in zip(tasks, trainings, strict=True):
        if isinstance(training, DivergedError):
            made.append(training)
            continue
        model, documents = model_of(task), tune_documents(work, task)
        reference = document_nll(model, documents, _start(task))
        own = document_nll(model, documents, training.trained.adapter)
        made.append(_Made(training, outcome(own, reference)))
    return made


def _result(task: AdapterTask, made: _Made | DivergedError) -> AdapterResult:
    """The record of a task, its adapter written."""
    if isinstance(made, DivergedError):
        return AdapterResult(None, Outcome("failed", 0, None, None, made.what))
    training = made.training
    return left_in_bank(task, training.trained, training.rate, training.attempts, made.outcome)


def left_in_bank(
    task: AdapterTask, trained: Trained, rate: float, attempts: int, judged: Outcome, kept: float | None = None
) -> AdapterResult:
    """An adapter written into the bank, and the record of it; kept: as in `Training`."""
    losses = trained.first_loss, trained.last_loss
    record = write_adapter(
        Path(task.bank),
        task.name,
        trained.adapter,
        task.base_id,
        needs_transpose(model_of(task)),
        Training(trained.tokens, trained.steps, *losses, rate, attempts, kept),
    )
    return AdapterResult(record, judged)


def _train(
    work: Work, tasks: Sequence[AdapterTask], progress: Progress | None, attempts: int = ATTEMPTS
) -> list[_Training | DivergedError]:
    """A training for every task; what diverges is begun again at half the rate, `attempts` in all."""
    jobs = [_job(work, task) for task in tasks]
    freeze = any(task.config.recipe in SHARED_A and task.start is not None for task in tasks)
    found: list[_Training | DivergedError] = [DivergedError("no attempt was made")] * len(jobs)
    left = list(range(len(jobs)))
    for attempt in range(1, attempts + 1):
        if not left:
            break
        trained = train_all(model_of(tasks[0]), [jobs[number] for number in left], freeze, progress)
        for number, one in zip(left, trained, strict=True):
            rate = jobs[number].learning_rate
            found[number] = one if isinstance(one, DivergedError) else _Training(one, rate, attempt)
        left = [number for number in left if isinstance(found[number], DivergedError)]
        for number in left:
            jobs[number] = replace(jobs[number], learning_rate=jobs[number].learning_rate / 2)
    return found


def _job(work: Work, task: AdapterTask) -> Job:
    """The training that a task asks for."""
    new: list[Passage] = []
    read: list[Passage] = []
    for (row, place), passage in passages_of(work, task):
        (read if place in task.read.get(row, ()) else new).append(passage)
    start = _start(task)
    begin = start if start is not None else fresh_adapter(model_of(task), task.config, task.seed)
    tokens = tokens_of(task, [*new, *read])
    return Job(new, begin, task.config, task.learning_rate, task.seed, tokens, task.floor, read)


def passages_read(work: Work, task: AdapterTask) -> dict[int, frozenset[int]]:
    """Row → places of the passages that a training of less than one pass reads; nothing where it reads all of them."""
    if task.epochs >= 1:
        return {}
    everything = list(passages_of(work, task))
    places = {id(passage): place for place, passage in everything}
    passages = [passage for _, passage in everything]
    found: dict[int, set[int]] = {}
    for batch in batches_of(passages, task.config, task.seed, tokens_of(task, passages)):
        for row, place in (places[id(passage)] for passage in batch):
            found.setdefault(row, set()).add(place)
    return {row: frozenset(read) for row, read in found.items()}


def passages_of(work: Work, task: AdapterTask) -> Iterator[tuple[tuple[int, int], Passage]]:
    """The train passages, each with its row and its place in it."""
    for row, document in zip(task.train_rows, work.passages(task.train_rows), strict=True):
        for place, passage in enumerate(document):
            yield (row, place), passage


def tokens_of(task: AdapterTask, passages: Sequence[Passage]) -> int:
    """Label tokens that the task's passes over these passages see."""
    return round(task.epochs * sum(passage.predicted for passage in passages))


def model_of(task: AdapterTask) -> Any:
    """The base that a task trains beside."""
    return workplace(task.base, task.revision)[0]


def _start(task: AdapterTask) -> Adapter | None:
    """The trunk that a task starts from; none = from the base."""
    return _read(Path(task.bank) / task.start.folder) if task.start is not None else None


@lru_cache(maxsize=1)
def _read(folder: Path) -> Adapter:
    """An adapter, read once for all tasks that start from it."""
    return read_adapter(folder)[0]


def tune_documents(work: Work, task: AdapterTask) -> dict[int, tuple[Passage, ...]]:
    """The first passage of each tune document, by which an adapter is checked against the trunk (or the base)."""
    passages = work.passages(task.tune_rows)
    return {row: parts[:1] for row, parts in zip(task.tune_rows, passages, strict=True)}


Map = Callable[..., Any]
"""`map(function, tasks)`: the built-in one, an executor's, or Ray's."""
