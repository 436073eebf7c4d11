"""The plan of a build: what a corpus holds, the experts it would get, and the disk and the time that they need."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.config import BuildConfig, Recipe
from localmoe.encoders import Encoder, load_encoder
from localmoe.packing import Passage
from localmoe.train import clusters as clustering
from localmoe.train import experts as training
from localmoe.train.checks import AT_MOST, ENOUGH, document_nll
from localmoe.train.clustering import advised_clusters
from localmoe.train.clusters import FIRST, Clusters
from localmoe.train.corpus import read_corpus
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.groundwork import check_settings, expert_batch, expert_epochs, trunk_epochs
from localmoe.train.joint import JointJob, state_bytes, train_jointly
from localmoe.train.progress import Event, Stage, Watch, unwatched
from localmoe.train.rates import EXPERTS, judges_of
from localmoe.train.rows import Rows, read_rows
from localmoe.train.training import adapter_bytes, fresh_adapter, threads, train
from localmoe.train.work import Work, collect

EMBEDDED = 1_000
"""Documents that are embedded to see the clusters, and how fast the encoder is."""
STEPS = 10
"""Training steps that are timed, at most, ..."""
SECONDS = 15.0
"""... and for about so long; one at least."""

_BATCH = 64  # documents handed to the encoder between two looks at the clock


@dataclass(frozen=True)
class Times:
    """Seconds that each stage of a build would take on this machine, as it is now."""

    embed: float
    rates: float
    """Trials of the rates that are asked for; a best one at the edge takes more."""
    trunk: float
    experts: float
    checks: float
    tokens_per_second: float
    """Training speed at `train.batch` passages a step."""
    expert_tokens_per_second: float
    """Training speed at as many passages a step as the experts take."""

    @property
    def total(self) -> float:
        """All stages."""
        return self.embed + self.rates + self.trunk + self.experts + self.checks


@dataclass(frozen=True)
class Plan:
    """What `build` would do; `sizes` are train tokens a cluster, estimated from `embedded` documents."""

    notes: tuple[str, ...]
    """What was read and what was not, as sentences."""
    recipe: Recipe
    rank: int
    documents: dict[str, int]
    """By split: train, tune, test, unused (not sampled)."""
    tokens: dict[str, int]
    """By split; "unused" counts those in no passage too."""
    wanted: int
    """K as configured, or advised for so many tokens."""
    sizes: tuple[int, ...]
    embedded: int
    bank_bytes: int
    """What the finished bank takes."""
    work_bytes: int
    """What the build needs beside it while it runs."""
    training_bytes: int
    """Memory that experts take while they are trained with the trunk, the base aside; 0 for other recipes."""
    tokens_per_parameter: float
    """Train tokens for every number that one adapter can change: how full one adapter gets."""
    explained: float
    """Share of the embeddings' variance that lies between 16 clusters, beyond chance: how unlike documents are."""
    times: Times | None
    """None where the timing was skipped."""


SCARCE, AMPLE = 2.0, 10.0
"""Tokens for every parameter of an adapter below which text, above which room was seen to be scarce (choosing.md)."""


UNLIKE = 0.24
"""Variance between 16 clusters from which scarce text was seen to pay too (results/: from 0.25 on; level at 0.21)."""
FEW = 500
"""Train documents below which jointly trained experts were not seen to beat one adapter (choosing.md)."""


def advice(plan: Plan) -> str:
    """On which side of the border a corpus lies, where one adapter for all would do as well (docs/choosing.md)."""
    measure = f"{plan.tokens_per_parameter:.2g} train tokens for every parameter of an adapter"
    unlike = f"{FIRST} clusters hold {plan.explained:.0%} of the variance between documents"
    if plan.recipe == "joint":
        count = plan.documents.get("train", 0)
        if count < FEW:
            few = f"{count:,} documents to train on: so few were not seen to beat one adapter for all"
            return few if count <= FIRST else f"{few}; {unlike}"  # of so few nothing can be told
        if plan.tokens_per_parameter >= SCARCE:
            return (
                f"{measure}: more than rank {plan.rank} holds. Raise --rank first: experts beat a fine-tune of their "
                f"rank there, and one of a higher rank beat them; measure it: localmoe eval; {unlike}"
            )
        if plan.explained >= UNLIKE:
            return f"{unlike}: so unlike, experts were seen to pay, at a rank that is right; measure it: localmoe eval"
        return (
            f"{unlike}: so alike, experts at the default rate were level with one adapter for all, or hardly better; "
            "eager ones beat it where the base knew such text: --try-rate 0.5 --try-rate 1 --try-rate 2; measure it: "
            "localmoe eval"
        )
    if plan.tokens_per_parameter >= AMPLE:
        return f"{measure}: one adapter cannot hold all of it, so experts are likely to pay; {unlike}"
    if plan.tokens_per_parameter > SCARCE:
        return f"{measure}: between what was seen to pay and what was not, so measure it: localmoe eval; {unlike}"
    return (
        f"{measure}: text is scarce, and more passes of one adapter may teach as much as experts; "
        f"try train.trunk_epochs=3 or a lower rank, and measure it: localmoe eval; {unlike}"
    )


def plan(source: str | Path, config: BuildConfig = BuildConfig(), probe: bool = True, watch: Watch = unwatched) -> Plan:  # noqa: B008
    """What `build` would make of a corpus; everything is written to a temporary folder, and removed.

    The clusters are those of at most `EMBEDDED` train documents, each standing for its share of all tokens. Times
    are measured (unless `probe` is false): the encoder on these documents, the base on a few real training steps.
    Raises what `build` raises for the same corpus and configuration.
    """
    with tempfile.TemporaryDirectory(prefix="localmoe-plan-") as folder:
        try:
            return _plan(source, Path(folder), config, probe, watch)
        finally:
            training.forget()


def _plan(source: str | Path, folder: Path, config: BuildConfig, probe: bool, watch: Watch) -> Plan:
    model, tokenizer = training.workplace(config.base, config.revision)
    check_settings(model, config)
    encoder = load_encoder(config.encoder, base=(model, tokenizer))
    report = ReportBuilder()
    file, _, count = collect(folder, read_corpus(source, config.corpus, report))
    work = Work(folder, "plan")
    work.adopt("documents.parquet", file)
    rows = read_rows(work, tokenizer, config, lambda done: watch(Event("tokenize", done, count)))
    chosen = _sample(np.flatnonzero(rows.train), EMBEDDED, config.seed)
    vectors, documents_per_second = _embed(work, encoder, chosen, watch)
    found = _cluster(vectors, chosen, rows, config)
    times = _times(model, work, rows, found, config, documents_per_second, watch) if probe else None
    texts = (work.path / "documents.parquet").stat().st_size
    passages = (work.path / "passages.parquet").stat().st_size
    counts = rows.counts()
    tokens = dict(counts["split_tokens"])
    tokens["unused"] = tokens.get("unused", 0) + counts["unused_tokens"]
    adapters = len(found.access) + (config.train.recipe != "paper")
    public = sum(not access for access in found.access) if config.train.recipe == "joint" else 0
    training_bytes = state_bytes(model, config.train.rank, public)
    return Plan(
        notes=tuple(report.finish().lines()),
        recipe=config.train.recipe,
        rank=config.train.rank,
        documents=counts["split_documents"],
        tokens=tokens,
        wanted=advised_clusters(tokens["train"], config.cluster),
        sizes=_sizes(found, chosen, rows),
        embedded=len(chosen),
        bank_bytes=adapters * adapter_bytes(model, config.train.rank)
        + count * 2 * encoder.dim
        + (texts if config.keep_texts else 0),
        work_bytes=texts + passages + 2 * (count + _prompts(rows, config)) * 4 * encoder.dim + 2 * training_bytes,
        training_bytes=training_bytes,
        tokens_per_parameter=tokens["train"] / (adapter_bytes(model, config.train.rank) / 2),
        explained=clustering.explained(vectors, config.cluster),
        times=times,
    )


def _prompts(rows: Rows, config: BuildConfig) -> int:
    """Documents of which the first tokens are embedded too."""
    return len(rows.where("tune", ())) + (len(rows.where("train", ())) if config.train.recipe == "joint" else 0)


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, ascending."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _embed(work: Work, encoder: Encoder, chosen: np.ndarray, watch: Watch) -> tuple[np.ndarray, float]:
    """φ of the chosen documents [m, d], and documents a second without the first batch, which warms up."""
    queries = [document.query for _, document in work.chosen(chosen.tolist())]
    parts, started = [encoder.encode(queries[:_BATCH])], time.perf_counter()
    if len(queries) <= _BATCH:
        parts = [encoder.encode(queries)]  # too few to leave any out: now it is warm
        return parts[0], len(queries) / (time.perf_counter() - started)
    for first in range(_BATCH, len(queries), _BATCH):
        parts.append(encoder.encode(queries[first : first + _BATCH]))
        watch(Event("embed", min(first + _BATCH, len(queries)), len(queries)))
    return np.concatenate(parts), (len(queries) - _BATCH) / (time.perf_counter() - started)


def _shares(chosen: np.ndarray, rows: Rows) -> np.ndarray:
    """Tokens that each chosen document stands for: its own, times all train tokens over the chosen ones' [m]."""
    own = rows.tokens[chosen]
    shares: np.ndarray = np.rint(own * (rows.tokens[rows.train].sum() / own.sum())).astype(np.int64)
    return shares


def _cluster(vectors: np.ndarray, chosen: np.ndarray, rows: Rows, config: BuildConfig) -> Clusters:
    access = [rows.access[row] for row in chosen]
    everything = np.ones(len(chosen), dtype=bool)
    return clustering.cluster(vectors, _shares(chosen, rows), everything, access, config.cluster, config.seed)


def _sizes(found: Clusters, chosen: np.ndarray, rows: Rows) -> tuple[int, ...]:
    shares = _shares(chosen, rows)
    return tuple(int(shares[found.rows(k)].sum()) for k in range(len(found.access)))


def _times(
    model: Any, work: Work, rows: Rows, found: Clusters, config: BuildConfig, documents_per_second: float, watch: Watch
) -> Times:
    after_trunk = config.train.recipe != "paper" and bool(rows.where("train", ()))
    with threads(config.threads):
        speed, expert_speed, check_speed = _probe(model, work, rows, config, len(found.access), watch)
    everything, public = (int(rows.tokens[part].sum()) for part in (rows.train, rows.where("train", ())))
    joint = config.train.recipe == "joint"
    train_tokens = expert_epochs(config.train, after_trunk) * (everything - (public if joint else 0))
    public = round(trunk_epochs(config.train) * public)
    tried = min(config.search.tokens, public) / speed if len(judges_of(rows)) >= ENOUGH else 0.0
    tune = rows.where("tune")
    if joint and len(found.access) > 1:
        tried *= 2  # experts' rates too, together with the trunk
    elif after_trunk and len(tune) >= ENOUGH:
        tried += train_tokens * min(1.0, EXPERTS / max(1, len(found.access))) / expert_speed
    length = float(np.minimum(rows.tokens[tune], config.corpus.passage_tokens).mean()) if tune else 0.0
    checked = min(AT_MOST, len(tune)) + min(AT_MOST * len(found.access), len(tune))
    prompts = _prompts(rows, config)  # shorter than documents, but the base's tokenizer cuts them
    return Times(
        embed=(len(rows.ids) - len(rows.where("unused")) + prompts) / documents_per_second,
        rates=len(config.search.rates) * tried,
        trunk=0.0 if config.train.recipe == "paper" else public / speed,
        experts=train_tokens / expert_speed,
        checks=2 * checked * length / check_speed,
        tokens_per_second=speed,
        expert_tokens_per_second=expert_speed,
    )


class _Enough(Exception):  # noqa: N818 - the way out of the training loop, not an error
    pass


def _probe(
    model: Any, work: Work, rows: Rows, config: BuildConfig, experts: int, watch: Watch
) -> tuple[float, float, float]:
    """Tokens a second: of training on real passages as a trunk and as an expert, and of checking."""
    after_trunk = config.train.recipe != "paper" and bool(rows.where("train", ()))
    batch, other = config.train.batch, expert_batch(config.train, after_trunk)
    chosen = _sample(np.flatnonzero(rows.train), (STEPS + 1) * max(batch, other), config.seed)
    passages = [passage for document in work.passages(chosen.tolist()) for passage in document]
    while len(passages) < 2 * max(batch, other):
        passages += passages
    joint = config.train.recipe == "joint"
    mixed = round(min(config.route.active, (experts + 1) / 2)) if joint and after_trunk else 0
    speed = _speed(model, passages, config, batch, "trunk", watch, mixed)
    none_alone = joint and len(rows.where("train", ())) == int(rows.train.sum())
    expert_speed = speed if other == batch or none_alone else _speed(model, passages, config, other, "experts", watch)
    return speed, expert_speed, _check_speed(model, passages[: 2 * batch])


def _speed(
    model: Any, passages: list[Passage], config: BuildConfig, batch: int, stage: Stage, watch: Watch, mixed: int = 0
) -> float:
    """Tokens a second at so many passages a step, after one step to warm up; jointly, each teaching `mixed` experts."""
    ends: list[tuple[float, int]] = []

    def progress(tokens: int) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # a step returns as soon as it is launched
        ends.append((time.perf_counter(), tokens))
        watch(Event(stage, sum(tokens for _, tokens in ends), 0))
        if len(ends) > STEPS or (len(ends) > 1 and ends[-1][0] - ends[0][0] > SECONDS):
            raise _Enough

    watch(Event(stage, 0, 0, f"timing at most {STEPS} steps"))
    start, settings = fresh_adapter(model, config.train, config.seed), replace(config.train, batch=batch)
    rate, seed = config.train.learning_rate, config.seed
    with suppress(_Enough):
        if mixed:
            most = 2 * mixed  # about as many experts as there are: a mix holds half of them at most
            taught = ([(place + k) % most for k in range(mixed)] for place in range(len(passages)))
            mixes = [(p, [(k, 1 / mixed) for k in experts]) for p, experts in zip(passages, taught, strict=True)]
            tokens = sum(passage.predicted for passage in passages)
            train_jointly(model, JointJob(mixes, most, start, settings, rate, 1.0, seed, tokens), progress)
        else:
            train(model, passages, start, settings, rate, seed, progress=progress)
    return sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0])


def _check_speed(model: Any, passages: list[Passage]) -> float:
    started = time.perf_counter()
    nll = document_nll(model, dict(enumerate([passage] for passage in passages)), None)
    return sum(one.tokens for one in nll.values()) / (time.perf_counter() - started)
