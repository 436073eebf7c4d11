"""The build: a corpus in, a bank out. Every stage leaves its result on disk before the next one starts."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.bank.files import write_json, write_table, write_tensors
from localmoe.bank.generations import commit
from localmoe.bank.lock import build_lock
from localmoe.bank.manifest import (
    BaseRecord,
    EncoderRecord,
    ExpertRecord,
    FileRecord,
    Kind,
    Manifest,
    Outcome,
    RouterRecord,
    generations,
)
from localmoe.bank.store import Bank
from localmoe.config import BuildConfig, as_dict
from localmoe.encoders import Encoder, encoder_mark, load_encoder
from localmoe.errors import ConfigError, TemporaryError, UsageError
from localmoe.lora import weight_of
from localmoe.models import context_length, fingerprint, remember, target_linears
from localmoe.routing import Centroids
from localmoe.train import clusters as clustering
from localmoe.train import experts as training
from localmoe.train.checks import AT_MOST, choose_beta, nearest_rows
from localmoe.train.clusters import Clusters
from localmoe.train.corpus import read_corpus
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.documents import Document
from localmoe.train.experts import AdapterResult, AdapterTask, Map
from localmoe.train.labels import label_clusters
from localmoe.train.progress import Event, Stage, Watch, unwatched
from localmoe.train.rows import Rows, read_rows
from localmoe.train.work import Work, collect

PREFIX_TOKENS = 50
"""β is chosen for the first tokens of the tune documents, as the evaluation will show them (specification)."""

_LABEL_TEXTS = 64
_LABEL_CHARACTERS = 4_000


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
    built-in one after the other. Raises CorpusError, ConfigError, LockedError, TemporaryError (disk full);
    experts that failed to train are in the manifest as `failed`.
    """
    path = Path(bank)
    _refuse_foreign_folder(path)
    started = time.time()
    with build_lock(path), _threads(config.train.threads):
        try:
            return _build(source, path, config, map, watch, started)
        finally:
            training.workplace.cache_clear()


def _build(source: str | Path, path: Path, config: BuildConfig, map: Map, watch: Watch, started: float) -> Bank:
    model, tokenizer = training.workplace(config.base, config.revision)
    _check_passages(model, config)
    encoder = load_encoder(config.encoder)
    report = ReportBuilder()
    file, content, count = collect(path, _watched(read_corpus(source, config.corpus, report), watch))
    read = report.finish()
    mark, versions = fingerprint(model), _versions(model)
    settings = as_dict(config) | {"base": [mark.architecture, mark.weights], "encoder": encoder.fingerprint}
    key = _hash([settings, content, versions])
    finished = _finished(path, key)
    if finished is not None:
        file.unlink()
        generation = finished.manifest.generation
        watch(Event("commit", 1, 1, f"nothing changed since generation {generation}: nothing to do"))
        return finished
    work = Work(path, key)
    work.adopt("documents.parquet", file)
    for line in read.lines():
        watch(Event("read", count, count, line))
    rows = read_rows(work, tokenizer, config, lambda done: watch(Event("tokenize", done, count)))
    watch(Event("tokenize", count, count, _token_note(rows)))
    embeddings = _embed(work, encoder, rows, watch)
    clusters = _cluster(work, embeddings, rows, config, watch)
    _check_disk(path, model, config, len(clusters.access))
    plan = _plan(path, work, config, rows, clusters, embeddings)
    trunk = _train_trunk(plan, watch)
    experts = _expert_records(plan, _train_experts(plan, trunk, map, watch))
    base_id, encoder_id = _portable(config.base), _portable(config.encoder)
    manifest = Manifest(
        format=1,
        generation=0,
        recipe=config.train.recipe,
        base=BaseRecord(base_id, config.revision, mark.architecture, mark.weights),
        encoder=EncoderRecord(encoder_id, None, encoder.fingerprint, encoder.dim, encoder.prompt, encoder.max_tokens),
        router=_choose_router(plan, tokenizer, encoder, experts, watch),
        trunk=trunk.adapter if trunk is not None else None,
        trunk_outcome=trunk.outcome if trunk is not None and trunk.adapter is not None else None,
        experts=experts,
        files=_write_files(plan, embeddings, experts),
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
    remember(config.encoder, encoder_mark(encoder.fingerprint))
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


def _embed(work: Work, encoder: Encoder, rows: Rows, watch: Watch) -> np.ndarray:
    """φ of every document [n, d] fp32, memory-mapped, rows of zeros for those that the sample left out.

    A shard a batch of documents, so that it resumes.
    """
    used = np.array([split != "unused" for split in rows.split], dtype=bool)
    count, total = len(used), int(used.sum())
    first = 0
    shards = []
    for number, batch in enumerate(work.documents()):
        name = f"embeddings-{number:05d}.npy"
        mask = used[first : first + len(batch)]
        if not work.has(name):
            shard = np.zeros((len(batch), encoder.dim), dtype=np.float32)
            chosen = [document.query for document, wanted in zip(batch, mask, strict=True) if wanted]
            if chosen:
                shard[mask] = encoder.encode(chosen)
            work.write_array(name, shard)
        shards.append(name)
        first += len(batch)
        watch(Event("embed", int(used[:first].sum()), total))
    if not work.has("embeddings.npy"):
        target = np.lib.format.open_memmap(
            work.path / ".embeddings.npy", "w+", dtype=np.float32, shape=(count, encoder.dim)
        )
        first = 0
        for name in shards:
            shard = work.read_array(name)
            target[first : first + len(shard)] = shard
            first += len(shard)
        target.flush()
        os.replace(work.path / ".embeddings.npy", work.path / "embeddings.npy")
    return work.read_array("embeddings.npy")


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


@dataclass(frozen=True)
class _Plan:
    """What all trainings of a build share."""

    path: Path
    work: Work
    config: BuildConfig
    rows: Rows
    clusters: Clusters
    tune: list[tuple[int, ...]]
    """For every cluster the tune documents that its expert is checked on."""

    def task(self, name: str, seed: int, start: Any, train: list[int], tune: Iterable[int]) -> AdapterTask:
        config = self.config.train
        rate = config.learning_rate * (config.expert_rate if start is not None else 1.0)
        return AdapterTask(
            str(self.path),
            self.work.key,
            name,
            self.config.base,
            self.config.revision,
            _portable(self.config.base),
            config,
            rate,
            seed,
            start,
            tuple(train),
            tuple(tune),
        )

    def tokens(self, rows: Iterable[int]) -> int:
        return self.config.train.epochs * int(self.rows.tokens[list(rows)].sum())


def _plan(path: Path, work: Work, config: BuildConfig, rows: Rows, clusters: Clusters, embeddings: np.ndarray) -> _Plan:
    tune = rows.where("tune")
    best, similarity = clustering.nearest(clusters, embeddings[tune], [rows.access[row] for row in tune])
    known = best >= 0
    near = nearest_rows(best[known], similarity[known], len(clusters.access))
    reachable = [row for row, is_known in zip(tune, known, strict=True) if is_known]
    return _Plan(path, work, config, rows, clusters, [tuple(sorted(reachable[place] for place in p)) for p in near])


def _train_trunk(plan: _Plan, watch: Watch) -> AdapterResult | None:
    """One adapter over all public train documents, or None for recipe `paper` or without public documents."""
    if plan.config.train.recipe == "paper":
        return None
    public = plan.rows.where("train", ())
    if not public:
        if plan.config.train.recipe == "trunk-shared":
            raise ConfigError(
                "recipe 'trunk-shared' needs public documents, and all of them have an access set",
                "choose train.recipe=paper",
            )
        watch(Event("trunk", 1, 1, "no trunk: no document is public; experts start from the base"))
        return None
    tune = sorted(plan.rows.where("tune", ()), key=lambda row: plan.rows.ids[row])[:AT_MOST]
    task = plan.task("trunk", plan.config.seed, None, public, sorted(tune))
    total = plan.tokens(public)
    watch(Event("trunk", 0, total))
    result = training.run(task, _counted("trunk", total, watch))
    note = _outcome_note("the trunk", result.outcome, "the base")
    watch(Event("trunk", total, total, note))
    return result


def _train_experts(plan: _Plan, trunk: AdapterResult | None, map: Map, watch: Watch) -> list[AdapterResult]:
    start = trunk.adapter if trunk is not None else None
    ids = _expert_ids(len(plan.clusters.access))
    tasks = [
        plan.task(f"experts/{name}", plan.config.seed + 1 + k, start, plan.clusters.rows(k), plan.tune[k])
        for k, name in enumerate(ids)
    ]
    finished = sum(plan.work.has(training.result_file(task.name)) for task in tasks)
    total = sum(plan.tokens(task.train_rows) for task in tasks)
    if finished:
        watch(Event("experts", 0, total, f"going on: {finished} of {len(tasks)} experts are done"))
    run = training.run
    if map is builtins.map:
        progress = _counted("experts", total, watch)
        run = partial(training.run, progress=progress)
    results, done = [], 0
    for task, result in zip(tasks, map(run, tasks), strict=True):
        done += plan.tokens(task.train_rows)
        watch(Event("experts", done, total, _outcome_note(task.name, result.outcome, "where it started")))
        results.append(result)
        if map is builtins.map:
            progress.reset(done)
    return results


class _counted:  # noqa: N801 - used as a function
    """Progress of training in tokens, as events."""

    def __init__(self, stage: Stage, total: int, watch: Watch) -> None:
        self._stage, self._total, self._watch, self._done = stage, total, watch, 0

    def __call__(self, tokens: int, loss: float) -> None:
        self._done = min(self._total, self._done + tokens)
        self._watch(Event(self._stage, self._done, self._total))

    def reset(self, done: int) -> None:
        """What is finished for certain; a repeated or resumed training counted otherwise."""
        self._done = done


def _expert_records(plan: _Plan, results: list[AdapterResult]) -> tuple[ExpertRecord, ...]:
    labels = _labels(plan)
    ids = _expert_ids(len(results))
    records = []
    for k, result in enumerate(results):
        members = plan.clusters.rows(k)
        tags = sorted({tag for row in members for tag in plan.rows.tags[row]})
        records.append(
            ExpertRecord(
                ids[k],
                labels[k],
                k,
                len(members),
                int(plan.rows.tokens[members].sum()),
                plan.clusters.access[k],
                tuple(tags),
                result.outcome,
                result.adapter,
            )
        )
    return tuple(records)


def _labels(plan: _Plan) -> list[str]:
    """c-TF-IDF labels, each access set's from its own documents."""
    wanted = {row for k in range(len(plan.tune)) for row in plan.clusters.rows(k)[:_LABEL_TEXTS]}
    texts: dict[int, str] = {}
    first = 0
    for batch in plan.work.documents():
        for offset, document in enumerate(batch):
            if first + offset in wanted:
                texts[first + offset] = document.content[:_LABEL_CHARACTERS]
        first += len(batch)
    labels: list[str] = []
    for names in dict.fromkeys(plan.clusters.access):
        group = [k for k, access in enumerate(plan.clusters.access) if access == names]
        labels += label_clusters([[texts[r] for r in plan.clusters.rows(k)[:_LABEL_TEXTS]] for k in group])
    return labels


def _choose_router(
    plan: _Plan, tokenizer: Any, encoder: Encoder, experts: tuple[ExpertRecord, ...], watch: Watch
) -> RouterRecord:
    """β from the first tokens of public tune documents and public experts."""
    usable = [e for e in experts if not e.access and e.outcome.status in ("good", "unchecked")]
    chosen = Centroids(
        tuple(e.id for e in usable),
        torch.from_numpy(np.ascontiguousarray(plan.clusters.centroids[[e.row for e in usable]])),
        "",
    )
    tune = set(plan.rows.where("tune", ()))
    prefixes, first = [], 0
    for batch in plan.work.documents():
        for offset, document in enumerate(batch):
            if first + offset in tune:
                ids = tokenizer(document.query, verbose=False)["input_ids"][:PREFIX_TOKENS]
                prefixes.append(tokenizer.decode(ids, skip_special_tokens=True))
        first += len(batch)
    queries = encoder.encode(prefixes) if prefixes else np.zeros((0, encoder.dim), dtype=np.float32)
    record, note = choose_beta(queries, chosen, plan.config.route)
    watch(Event("route", 1, 1, note if note else f"β = {record.beta:.3g}: {record.active:.1f} experts a prompt"))
    return record


def _write_files(plan: _Plan, embeddings: np.ndarray, experts: tuple[ExpertRecord, ...]) -> dict[Kind, FileRecord]:
    """Everything but the adapters: centroids, clusters, and the documents that took part, in the order read."""
    import pyarrow

    rows, clusters = plan.rows, plan.clusters
    kept = [row for row, split in enumerate(rows.split) if split != "unused"]
    owner = [experts[k].id if k >= 0 else None for k in clusters.assignment[kept].tolist()]
    names = pyarrow.list_(pyarrow.string())
    table = pyarrow.table(
        {
            "id": [rows.ids[row] for row in kept],
            "source": [rows.sources[row] for row in kept],
            "split": [rows.split[row] for row in kept],
            "expert": pyarrow.array(owner, pyarrow.string()),
            "access": pyarrow.array([list(rows.access[row]) for row in kept], names),
            "tags": pyarrow.array([list(rows.tags[row]) for row in kept], names),
            "tokens": pyarrow.array(rows.tokens[kept].tolist(), pyarrow.int64()),
        }
    )
    path = plan.path
    files: dict[Kind, FileRecord] = {
        "centroids": write_tensors(
            path,
            "centroids",
            {"centroids": torch.from_numpy(clusters.centroids), "means": torch.from_numpy(clusters.means)},
        ),
        "clusters": write_json(path, "clusters", {"access_sets": clusters.trees}),
        "documents": write_table(path, "documents", table),
        "embeddings": write_tensors(
            path, "embeddings", {"embeddings": torch.from_numpy(embeddings[kept].astype(np.float16))}
        ),
    }
    if plan.config.keep_texts:
        wanted = set(kept)
        texts = [
            {"id": document.id, "text": document.content}
            for row, document in enumerate(d for batch in plan.work.documents() for d in batch)
            if row in wanted
        ]
        schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string())])
        files["texts"] = write_table(path, "texts", pyarrow.Table.from_pylist(texts, schema))
    return files


def adapter_bytes(model: Any, rank: int) -> int:
    """Bytes of one stored adapter: bf16 factors of every target linear."""
    return sum(2 * rank * sum(weight_of(module).shape) for module in target_linears(model).values())


def _check_passages(model: Any, config: BuildConfig) -> None:
    limit = context_length(model)
    if config.corpus.passage_tokens > limit:
        raise ConfigError(
            f"passages of {config.corpus.passage_tokens:,} tokens do not fit the base model's context of {limit:,}",
            f"set corpus.passage_tokens={limit} or less",
        )


def _check_disk(path: Path, model: Any, config: BuildConfig, clusters: int) -> None:
    need = (clusters + 1) * adapter_bytes(model, config.train.rank)
    free = shutil.disk_usage(path).free
    if free < need:
        raise TemporaryError(
            f"{clusters} experts of rank {config.train.rank} need {need / 2**20:,.0f} MiB in {path}, "
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


def _expert_ids(count: int) -> list[str]:
    width = max(2, len(str(count - 1)))
    return [f"e{k:0{width}d}" for k in range(count)]


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
    ours = ("manifest-", "work", "build.", "experts", "trunk-", ".tmp-")
    if path.is_dir() and any(path.iterdir()) and not generations(path):
        foreign = [entry.name for entry in path.iterdir() if not entry.name.startswith(ours)]
        known = ("centroids-", "documents-", "embeddings-", "texts-", "clusters-")
        foreign = [name for name in foreign if not name.startswith(known)]
        if foreign:
            raise UsageError(f"{path} holds other things, such as {foreign[0]!r}", "give a new folder for the bank")


def _portable(name: str) -> str:
    """A hub id as it is; of a folder its name alone, since a bank holds no paths."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
