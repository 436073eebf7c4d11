"""Recipe `joint`: the mixes that documents train by, and trunk and experts left in the bank with their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from localmoe.bank.manifest import Outcome
from localmoe.config import as_dict
from localmoe.lora import Adapter, mixed
from localmoe.packing import Passage
from localmoe.routing import Centroids, route
from localmoe.train.checks import Nll, choose_beta, document_nll, outcome, outcome_beyond_doubt
from localmoe.train.course import DivergedError, Progress
from localmoe.train.experts import (
    ATTEMPTS,
    AdapterResult,
    AdapterTask,
    left_in_bank,
    model_of,
    passages_of,
    result_file,
    tokens_of,
    tune_documents,
)
from localmoe.train.groundwork import Groundwork
from localmoe.train.joint import JointJob, JointTrained, Weights, train_jointly
from localmoe.train.prompts import suffix
from localmoe.train.rates import judges_of
from localmoe.train.shrinkage import search_share, shrunk
from localmoe.train.training import fresh_adapter
from localmoe.train.work import Work


@dataclass(frozen=True)
class Mixes:
    """Weights over `public_experts` by row: what documents train by, and the mixes of some tune documents' prompts."""

    documents: Mapping[int, Weights]
    prompts: Mapping[int, Weights]


def public_experts(ground: Groundwork) -> list[int]:
    """The clusters of public documents, whose experts are trained with the trunk."""
    return [k for k, access in enumerate(ground.clusters.access) if not access]


def mixes_of(ground: Groundwork, embeddings: np.ndarray, prompts: Mapping[str, np.ndarray]) -> Mixes:
    """The mixes of all public train and tune documents, by the router of the bank.

    embeddings: [n, d] of all documents; prompts: of `train` and `tune`, φ of the first tokens of its public documents.
    Half of a document's mix is that of the whole of it, half that of its first tokens: a prompt says less than a
    document does, and experts that had met whole documents alone would be merged by weights that they never saw.
    β is found as for the finished bank: on the first tokens of tune documents, for `route.active` experts (the bank's
    own is found anew if an expert turns out harmful, or if `search.active` chose another number).
    """
    experts = public_experts(ground)
    vectors, means = (torch.from_numpy(part[experts]) for part in (ground.clusters.centroids, ground.clusters.means))
    names = [ground.expert_ids[k] for k in experts]
    centroids = Centroids(tuple(names), vectors, "", means)
    record, _ = choose_beta(prompts["tune"], centroids, ground.config.route)
    config = replace(ground.config.route, beta=record.beta, active=max(1.0, record.wanted))
    place = {name: number for number, name in enumerate(names)}

    def mixes(vectors: np.ndarray) -> list[Weights]:
        queries = torch.nn.functional.normalize(torch.from_numpy(np.array(vectors)), dim=1)
        found = route(queries, centroids, config)
        pairs = (zip(mix.experts, mix.weights, strict=True) for mix in found)
        return [tuple((place[name], w) for name, w in mix) for mix in pairs]

    documents: dict[int, Weights] = {}
    by_prompt: dict[int, Weights] = {}
    for split in ("train", "tune"):
        rows = ground.rows.where(split, ())
        by_prompt |= zip(rows, mixes(prompts[split]), strict=True)
        documents |= {
            row: _halfway(mix, by_prompt[row]) for row, mix in zip(rows, mixes(embeddings[rows]), strict=True)
        }
    return Mixes(documents, {row: by_prompt[row] for row in judges_of(ground.rows)})


def _halfway(one: Weights, other: Weights) -> Weights:
    """The mean of two mixes."""
    total: dict[int, float] = {}
    for k, weight in (*one, *other):
        total[k] = total.get(k, 0.0) + weight / 2
    return tuple(sorted(total.items()))


def run_jointly(
    trunk: AdapterTask,
    experts: Sequence[AdapterTask],
    mixes: Mixes,
    expert_rate: float,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _sentence: None,
) -> AdapterResult:
    """The trunk's result and, left in the work folder, those of the experts, all trained in the same steps.

    What sets experts apart is kept as far as tune documents like it (`shrinkage`). An expert is good if those nearest
    to it are better off with their mixes than with the trunk (a lone one: than with the base). An interrupted training
    goes on from the state that was kept last; one that diverges is begun again at half the rate.
    """
    work = Work(Path(trunk.bank), trunk.key)
    if not work.has(result_file(trunk.name)):
        try:
            found, rate, attempts = _trained(
                work, job_of(work, trunk, len(experts), mixes, expert_rate), trunk, progress
            )
        except DivergedError as error:
            failed = AdapterResult(None, Outcome("failed", 0, None, None, error.what))
            work.write_json(result_file(trunk.name), as_dict(failed))
        else:
            share, told = search_share(model_of(trunk), found, judging(work, mixes))
            if told:
                say(_share_text(share, told))
            _keep(work, trunk, experts, mixes, shrunk(found, share), (rate, rate * expert_rate), attempts, share)
        for attempt in range(1, ATTEMPTS + 1):
            work.remove(_state(attempt))
    return TypeAdapter(AdapterResult).validate_python(work.read_json(result_file(trunk.name)))


def job_of(work: Work, trunk: AdapterTask, count: int, mixes: Mixes, expert_rate: float) -> JointJob:
    """The training of a trunk and `count` experts on the trunk's documents; expert_rate: a multiple of its rate."""
    passages = list(passages_of(work, trunk))
    return JointJob(
        [(passage, mixes.documents[row]) for (row, _), passage in passages],
        count,
        fresh_adapter(model_of(trunk), trunk.config, trunk.seed),
        trunk.config,
        trunk.learning_rate,
        expert_rate,
        trunk.seed,
        tokens_of(trunk, [passage for _, passage in passages]),
    )


def _trained(
    work: Work, job: JointJob, trunk: AdapterTask, progress: Progress | None
) -> tuple[JointTrained, float, int]:
    """The training, the trunk's rate in it, and how many were begun."""
    for attempt in range(_begun(work), ATTEMPTS + 1):
        name = _state(attempt)
        kept = work.read_state(name) if work.has(name) else None
        at_rate = replace(job, rate=job.rate / 2 ** (attempt - 1))
        work.remove(_state(attempt - 1))
        try:
            found = train_jointly(model_of(trunk), at_rate, progress, partial(work.write_state, name), kept)
        except DivergedError as error:
            diverged = error
            continue
        return found, at_rate.rate, attempt
    raise diverged


def judging(work: Work, mixes: Mixes) -> list[tuple[Passage, Weights]]:
    """What follows the first tokens of some tune documents, with the mixes of these: as an evaluation will have it."""
    rows = sorted(mixes.prompts)
    found = zip(rows, work.passages(rows), strict=True)
    passages = ((suffix(parts[0]), mixes.prompts[row]) for row, parts in found if parts)
    return [(passage, weights) for passage, weights in passages if passage.predicted > 0]


def _share_text(share: float, told: Mapping[float, float]) -> str:
    tried = ", ".join(f"{one:g}: {nll:.4f}" for one, nll in told.items())
    return f"experts keep {share:.0%} of what sets them apart, by nats a token on tune documents ({tried})"


def tokens_kept(work: Work) -> int:
    """Label tokens that an interrupted training has seen, as far as its state was kept."""
    name = _state(_begun(work))
    return int(work.read_state(name)["seen"]) if work.has(name) else 0


def _begun(work: Work) -> int:
    """The attempt that goes on."""
    return max((attempt for attempt in range(1, ATTEMPTS + 1) if work.has(_state(attempt))), default=1)


def _state(attempt: int) -> str:
    return f"joint-{attempt}.pt"


def _keep(
    work: Work,
    trunk: AdapterTask,
    experts: Sequence[AdapterTask],
    mixes: Mixes,
    found: JointTrained,
    rates: tuple[float, float],
    attempts: int,
    share: float,
) -> None:
    """Adapters and results, the trunk's last: it says that all are there; rates: the trunk's and the experts'.

    A lone expert is the trunk, so that both are judged against the base.
    """
    reference = found.trunk.adapter if len(experts) > 1 else None
    own = [expert.adapter for expert in found.experts]
    for task, one in zip(experts, found.experts, strict=True):
        judged = _judged(
            work, task, reference, lambda row: mixed([(own[k], weight) for k, weight in mixes.documents[row]])
        )
        result = left_in_bank(task, one, rates[1], attempts, judged, share)
        work.write_json(result_file(task.name), as_dict(result))
    judged = _judged(work, trunk, None, lambda _row: found.trunk.adapter)
    work.write_json(result_file(trunk.name), as_dict(left_in_bank(trunk, found.trunk, rates[0], attempts, judged)))


def _judged(work: Work, task: AdapterTask, reference: Adapter | None, adapter_of: Callable[[int], Adapter]) -> Outcome:
    """What the task's tune documents say of the adapter that each of them would get."""
    model, documents = model_of(task), tune_documents(work, task)
    own: dict[int, Nll] = {}
    other: dict[int, Nll] = {}
    for row, passages in documents.items():  # one by one both times: how many run together changes the last digits
        own |= document_nll(model, {row: passages}, adapter_of(row))
        other |= document_nll(model, {row: passages}, reference)
    return outcome(own, other) if reference is None else outcome_beyond_doubt(own, other)
