"""The build: a corpus in, a bank out. Every stage leaves its result on disk before the next one starts."""

from __future__ import annotations

import builtins
import hashlib
import json
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.bank.files import TEMPORARY
from localmoe.bank.generations import WORK, commit
from localmoe.bank.lock import build_lock
from localmoe.bank.manifest import SUFFIXES, AdapterRecord, BaseRecord, EncoderRecord, Manifest, Outcome, generations
from localmoe.bank.store import Bank
from localmoe.config import BuildConfig, as_dict
from localmoe.encoders import load_encoder, remember_encoder
from localmoe.errors import TemporaryError, UsageError
from localmoe.identity import fingerprint, remember
from localmoe.train import clusters as clustering
from localmoe.train import experts as training
from localmoe.train.checks import AT_MOST
from localmoe.train.clusters import Clusters
from localmoe.train.corpus import read_corpus
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.course import ORDER
from localmoe.train.documents import Document
from localmoe.train.embeddings import embed_documents, embed_prompts
from localmoe.train.experts import AdapterResult, AdapterTask, Map
from localmoe.train.groundwork import (
    TRUNK,
    Groundwork,
    check_settings,
    checked_on,
    expert_rate,
    name_in_bank,
    trunk_epochs,
)
from localmoe.train.joint import state_bytes
from localmoe.train.joint_rates import search_joint_rate
from localmoe.train.joint_tasks import Mixes, mixes_of, public_experts, run_jointly, tokens_kept
from localmoe.train.progress import Event, Stage, Watch, unwatched
from localmoe.train.rates import search_expert_rate, search_rate
from localmoe.train.records import choose_router, expert_records, write_files
from localmoe.train.rows import Rows, read_rows
from localmoe.train.training import adapter_bytes, threads
from localmoe.train.work import Work, collect


def build(
    source: str | Path,
    bank: str | Path,
    config: BuildConfig = BuildConfig(),  # noqa: B008 - frozen
    *,
    map: Map = builtins.map,
    watch: Watch = unwatched,
) -> Bank:
    """Cluster a corpus, train one expert a cluster, and commit them as a generation of the bank (Algorithm 1).

    source: a folder, a file, or a dataset id (see `CorpusConfig`); bank: the folder to make. The same call again
    goes on where the last one stopped; if nothing changed it does nothing. `map` runs the experts' trainings, the
    built-in one after the other; with recipe `joint` of those experts alone that have an access set. Raises
    CorpusError, ConfigError, LockedError, TemporaryError (disk full); experts that failed to train are in the manifest
    as `failed`.
    """
    path = Path(bank)
    _refuse_foreign_folder(path)
    started = time.time()
    with build_lock(path), threads(config.threads):
        try:
            return _build(source, path, config, map, watch, started)
        finally:
            training.forget()


def _build(source: str | Path, path: Path, config: BuildConfig, map: Map, watch: Watch, started: float) -> Bank:
    model, tokenizer = training.workplace(config.base, config.revision)
    check_settings(model, config)
    encoder = load_encoder(config.encoder, base=(model, tokenizer))
    report = ReportBuilder()
    file, content, count = collect(path, _watched(read_corpus(source, config.corpus, report), watch))
    read = report.finish()
    mark, versions = fingerprint(model), _versions(model)
    settings = as_dict(config) | {"base": [mark.architecture, mark.weights], "encoder": encoder.fingerprint}
    key = _hash([settings, content, versions])
    finished = _finished(path, key)
    if finished is not None:
        file.unlink()
        with suppress(OSError):  # it holds what another build left unfinished
            (path / WORK).rmdir()
        generation = finished.manifest.generation
        watch(Event("commit", 1, 1, f"nothing changed since generation {generation}: nothing to do"))
        return finished
    work = Work(path, key)
    work.adopt("documents.parquet", file)
    for line in read.lines():
        watch(Event("read", count, count, line))
    rows = read_rows(work, tokenizer, config, lambda done: watch(Event("tokenize", done, count)))
    watch(Event("tokenize", count, count, _token_note(rows)))
    embeddings = embed_documents(work, encoder, rows, watch)
    clusters = _cluster(work, embeddings, rows, config, watch)
    joint = config.train.recipe == "joint" and bool(rows.where("train", ()))
    prompts = {
        split: embed_prompts(work, tokenizer, encoder, rows.where(split, ()), split, watch)
        for split in (("train", "tune") if joint else ("tune",))
    }
    _check_disk(path, work, model, config, clusters)
    checked = checked_on(rows, clusters, embeddings)
    asked = config.train
    ground = Groundwork(path, work, config, rows, clusters, checked, asked.learning_rate, expert_rate(asked))
    ground = replace(ground, learning_rate=search_rate(ground, watch))
    mixes = mixes_of(ground, embeddings, prompts) if joint else None
    if mixes is not None:
        ground = replace(ground, expert_rate=search_joint_rate(ground, _trunk_task(ground), mixes, watch))
    trunk = _train_trunk(ground, mixes, watch)
    start = trunk.adapter if trunk is not None else None
    if start is not None and not joint:
        ground = replace(ground, read=training.passages_read(work, _trunk_task(ground)))
    ground = replace(ground, expert_rate=search_expert_rate(ground, start, watch))
    experts = expert_records(ground, _train_experts(ground, start, map, watch))
    base_id, encoder_id = name_in_bank(config.base), name_in_bank(config.encoder)
    manifest = Manifest(
        format=1,
        generation=0,
        recipe=config.train.recipe,
        base=BaseRecord(base_id, config.revision, mark.architecture, mark.weights),
        encoder=EncoderRecord(encoder_id, None, encoder.fingerprint, encoder.dim, encoder.prompt, encoder.max_tokens),
        router=choose_router(ground, prompts["tune"], experts, watch),
        trunk=trunk.adapter if trunk is not None else None,
        trunk_outcome=trunk.outcome if trunk is not None and trunk.adapter is not None else None,
        experts=experts,
        files=write_files(ground, embeddings, experts),
        config=as_dict(config) | {"base": base_id, "encoder": encoder_id},
        corpus=read.to_dict() | {"key": key} | rows.counts(),
        versions=versions,
        created={
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "seconds": round(time.time() - started, 1),
        },
    )
    committed = commit(path, manifest)
    work.discard()
    remember(config.base, mark)
    remember_encoder(encoder)
    watch(Event("commit", 1, 1, f"generation {committed.generation} of {path}"))
    return Bank.open(path)


def _token_note(rows: Rows) -> str:
    counts = rows.counts()
    documents, tokens = counts["split_documents"], counts["split_tokens"]
    parts = [
        f"{documents[name]:,} documents and {tokens[name]:,} tokens {purpose}"
        for name, purpose in (("train", "to train on"), ("tune", "to tune on"), ("test", "held out"))
        if name in documents
    ]
    return "; ".join(parts) + f"; {counts['unused_tokens'] + tokens.get('unused', 0):,} tokens not used"


def _cluster(work: Work, embeddings: np.ndarray, rows: Rows, config: BuildConfig, watch: Watch) -> Clusters:
    if work.has("clusters.json"):
        found = clustering.load(work)
    else:
        found = clustering.cluster(embeddings, rows.tokens, rows.train, rows.access, config.cluster, config.seed)
        clustering.save(work, found)
    count = len(found.access)
    wanted = config.cluster.clusters
    note = ""
    if wanted is not None and count < wanted:
        refused = sum(tree["refused"] for tree in found.trees)
        why = (
            f"{refused} splits were refused, since a child would have had fewer than "
            f"{config.cluster.min_tokens:,} tokens (cluster.min_tokens)"
            if refused
            else "there are no more different documents"
        )
        note = f"{count} clusters instead of {wanted}: {why}"
    watch(Event("cluster", count, count, note))
    return found


def _train_trunk(ground: Groundwork, mixes: Mixes | None, watch: Watch) -> AdapterResult | None:
    """One adapter over all public train documents, or None for recipe `paper` or without public documents."""
    if ground.config.train.recipe == "paper":
        return None
    public = ground.rows.where("train", ())
    if not public:
        watch(Event("trunk", 1, 1, "no trunk: no document is public; experts start from the base"))
        return None
    task = _trunk_task(ground)
    total = ground.tokens(public, trunk_epochs(ground.config.train))
    progress = _TokenProgress("trunk", total, watch)
    if mixes is not None:
        kept = tokens_kept(ground.work)
        going_on = f"; going on after {kept:,} tokens" if kept else ""
        watch(Event("trunk", kept, total, f"with {len(public_experts(ground))} experts, in the same steps{going_on}"))
        progress.reset(kept)
        beside = [ground.expert_task(k, None) for k in public_experts(ground)]
        result = run_jointly(
            task, beside, mixes, ground.expert_rate, progress, lambda said: watch(Event("trunk", total, total, said))
        )
    else:
        watch(Event("trunk", 0, total))
        result = training.run(task, progress)
    note = _outcome_note("the trunk", result.outcome, "the base")
    watch(Event("trunk", total, total, note))
    return result


def _train_experts(ground: Groundwork, start: AdapterRecord | None, map: Map, watch: Watch) -> list[AdapterResult]:
    tasks = [ground.expert_task(k, start) for k in range(len(ground.expert_ids))]
    with_trunk = (
        {tasks[k].name for k in public_experts(ground)}
        if ground.config.train.recipe == "joint" and start is not None
        else set()
    )
    alone = [task for task in tasks if task.name not in with_trunk]
    finished = [task for task in alone if ground.work.has(training.result_file(task.name))]
    total = sum(ground.tokens(task.train_rows, task.epochs) for task in alone)
    reference = "the base" if start is None else "the trunk"
    if finished:
        watch(Event("experts", 0, total, f"going on: {len(finished)} of {len(alone)} experts are done"))
    progress = _TokenProgress("experts", total, watch)
    model, _ = training.workplace(ground.config.base, ground.config.revision)
    many = map is builtins.map and training.wave_size(model) > 1
    if many:
        progress.reset(sum(ground.tokens(task.train_rows, task.epochs) for task in finished))
    run = training.run_all(tasks, progress) if map is builtins.map else map(training.run, tasks)
    results, done = [], 0
    for task, result in zip(tasks, run, strict=True):
        done += ground.tokens(task.train_rows, task.epochs) if task.name not in with_trunk else 0
        shown = max(done, progress.done) if many else done  # all of a wave have trained before the first is told
        note = _outcome_note(task.name, result.outcome, reference)
        watch(Event("experts", shown if alone else 1, total if alone else 1, note))
        results.append(result)
        progress.reset(shown)
    return results


def _trunk_task(ground: Groundwork) -> AdapterTask:
    """The task to train the trunk on all public documents; some of the public tune documents check it."""
    tune = sorted(ground.rows.where("tune", ()), key=lambda row: ground.rows.ids[row])[:AT_MOST]
    return ground.task(TRUNK, ground.config.seed, None, ground.rows.where("train", ()), sorted(tune))


class _TokenProgress:
    """Progress of training in tokens, as events."""

    def __init__(self, stage: Stage, total: int, watch: Watch) -> None:
        self._stage, self._total, self._watch, self.done = stage, total, watch, 0

    def __call__(self, tokens: int) -> None:
        self.done = min(self._total, self.done + tokens)
        self._watch(Event(self._stage, self.done, self._total))

    def reset(self, done: int) -> None:
        """What is finished for certain; a repeated or resumed training counted otherwise."""
        self.done = done


def _check_disk(path: Path, work: Work, model: Any, config: BuildConfig, clusters: Clusters) -> None:
    experts = len(clusters.access)
    need = (experts + 1) * adapter_bytes(model, config.train.rank)
    if config.train.recipe == "joint" and not work.has(training.result_file(TRUNK)):
        public = sum(not access for access in clusters.access)  # a state is written beside the one before it
        need += (1 if tokens_kept(work) else 2) * state_bytes(model, config.train.rank, public)
    free = shutil.disk_usage(path).free
    if free < need:
        raise TemporaryError(
            f"{experts} experts of rank {config.train.rank} need {need / 2**20:,.0f} MiB in {path}, "
            f"and {free / 2**20:,.0f} MiB are free",
            "free some space, choose another folder, or lower cluster.clusters or train.rank; "
            "the same command goes on from here",
        )


def _outcome_note(name: str, outcome: Outcome, reference: str) -> str:
    name = name.removeprefix("experts/")
    if outcome.status == "failed":
        return f"{name} failed: {outcome.reason}"
    if outcome.nll is None or outcome.reference_nll is None:
        return f"{name}: {outcome.status} ({outcome.reason})"
    change = outcome.nll - outcome.reference_nll
    return f"{name}: {outcome.status}, {change:+.3f} nats a token against {reference} on {outcome.documents} documents"


def _watched(documents: Iterable[Document], watch: Watch) -> Iterator[Document]:
    for count, document in enumerate(documents, 1):
        yield document
        if count % 256 == 0:
            watch(Event("read", count, 0))


def _versions(model: Any) -> dict[str, str]:
    """What, beside configuration and data, decides the bytes of a build."""
    packages = ("localmoe", "torch", "transformers", "sentence-transformers", "numpy", "scikit-learn")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(model.device.type),
        "dtype": str(model.dtype),
        "threads": str(torch.get_num_threads()),
        "training": str(ORDER),
    }


def _finished(path: Path, key: str) -> Bank | None:
    """The bank, if its current generation is the result of just this build."""
    if not generations(path):
        return None
    bank = Bank.open(path)
    return bank if bank.manifest.corpus.get("key") == key else None


def _refuse_foreign_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", "give a folder for the bank")
    ours = ("manifest-", WORK, "build.", "experts", "trunk-", TEMPORARY, *(f"{kind}-" for kind in SUFFIXES))
    if path.is_dir() and not generations(path):
        foreign = [entry.name for entry in path.iterdir() if not entry.name.startswith(ours)]
        if foreign:
            raise UsageError(f"{path} holds other things, such as {foreign[0]!r}", "give a new folder for the bank")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
