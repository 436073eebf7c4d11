"""An evaluation: leak checks, every method on the same held-out documents, and how they compare; it resumes."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from localmoe.config import EvalConfig, as_dict
from localmoe.errors import ConfigError, LocalMoEError
from localmoe.evaluate import baselines, full, merged, ttt  # noqa: F401 - they register methods
from localmoe.evaluate.bench import (
    Bench,
    NotPossibleError,
    Scores,
    Watch,
    methods,
    public_train,
    trained_at,
    trained_tokens,
)
from localmoe.evaluate.gaps import closed_gaps
from localmoe.evaluate.leaks import check_leaks, duplicates_of_train
from localmoe.evaluate.protocol import Cut, Trial, trials_of
from localmoe.evaluate.results import (
    FILE,
    FORMAT,
    Check,
    ComparisonRow,
    MethodResult,
    Results,
    Spread,
    in_common,
    write_results,
)
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.evaluate.verdicts import verdict
from localmoe.identity import fingerprint
from localmoe.models import context_length
from localmoe.runtime.engine import Engine
from localmoe.train.clusters import explained
from localmoe.train.training import adapter_bytes
from localmoe.train.work import Work

DEFAULT = "merged"
"""The method that is what a bank does as it is shipped."""
BASELINES = ("fine-tuned", "trunk", "base", "ensemble", "ttt-trunk", "ttt-fine-tuned", "fine-tuned-full")
"""What every method is compared with, where they were scored."""
_OF_A_FINE_TUNE = ("rank", "alpha", "batch", "clip", "warmup", "weight_decay")
"""Settings of a bank's training that its fine-tuned baseline shares."""


class LeakError(LocalMoEError):
    """A leak check failed: no number of this evaluation would mean anything."""


def evaluate(engine: Engine, folder: Path, config: EvalConfig, watch: Watch, command: str = "") -> Results:
    """Evaluate a bank and leave `results.json` in a folder after every method; the same call again goes on.

    Documents near to a train document are left out first. Raises UnknownNameError for a method that is not known,
    LeakError if a check fails, CorpusError without held-out documents, UsageError for a bank without texts.
    """
    begun = time.perf_counter()
    wanted = [(name, methods[name]) for name in config.methods]
    cut = _cut(engine, config)
    engine.check_packing()
    without, note = _duplicates(engine, folder, config.near_duplicate, cut.length)
    checks = [Check("no test document stands in train", True, note)]
    everything = trials_of(engine, "test", cut, without=without)
    tune = trials_of(engine, "tune", cut, without=without)
    experts = _nearest_experts(engine, everything)
    trials, chosen = _chosen(everything, experts, config)
    checks += check_leaks(engine, trials, tune, cut)
    for check in checks:
        if not check.passed:
            raise LeakError(f"leak check failed: {check.name}: {check.found}", _set_aside(folder))
    keys = _key(engine, config, cut, trials), _training_key(engine, config, cut, tune)
    work, training = (Work(folder, key) for key in keys)
    bench = Bench(engine, config, cut, tuple(trials), tuple(tune), work, training, watch)
    results = _empty(bench, chosen, tuple(checks), command)
    scored: list[MethodResult] = []
    for name, method in wanted:
        try:
            scores = _kept(bench, name, lambda method=method: method(bench))
        except NotPossibleError as reason:
            checks.append(Check(f"{name} was left out", True, reason.what))
            continue
        scored.append(_result(name, method.__doc__, scores, bench, results))
        results = replace(results, methods=tuple(scored))
        results = replace(results, comparisons=_comparisons(results, config.seed))
        write_results(folder, replace(results, checks=tuple(checks)))
    results = replace(results, methods=tuple(_with_gap(method, results) for method in results.methods))
    results = replace(results, checks=tuple(checks), seconds=_seconds(bench, time.perf_counter() - begun))
    write_results(folder, results)
    return results


def _cut(engine: Engine, config: EvalConfig) -> Cut:
    limit = context_length(engine.model)
    if config.prefix >= min(limit, config.length):
        raise ConfigError(
            f"a prefix of {config.prefix} tokens leaves nothing of documents of {min(limit, config.length)} tokens",
            "choose a shorter --prefix",
        )
    query = config.prefix if config.query_prefix is None else config.query_prefix
    if query > config.prefix:
        raise ConfigError(
            f"a query of {query} tokens would read {query - config.prefix} tokens that count in the loss",
            "make query_prefix at most prefix",
        )
    return Cut(query, config.prefix, min(limit, config.length))


def _duplicates(engine: Engine, folder: Path, threshold: float, length: int) -> tuple[frozenset[str], str]:
    """`duplicates_of_train`, found once for a bank: all of its texts are read for it."""
    work, file = Work(folder, _hashed(engine, [engine.bank.manifest.digest, threshold, length])), "duplicates.json"
    if not work.has(file):
        found, note = duplicates_of_train(engine, threshold, length)
        work.write_json(file, {"documents": sorted(found), "note": note})
    kept = work.read_json(file)
    return frozenset(kept["documents"]), kept["note"]


def _nearest_experts(engine: Engine, trials: Sequence[Trial]) -> list[str | None]:
    """For every document the expert whose centroid is nearest to all of it, by the bank's embeddings."""
    bank = engine.bank
    rows = {name: row for row, name in enumerate(bank.documents()["id"].to_pylist())}
    vectors = torch.from_numpy(bank.embeddings()[[rows[trial.document] for trial in trials]].astype(np.float32))
    centroids = engine.router.centroids
    if not centroids.experts:
        return [None] * len(trials)
    return [centroids.experts[k] for k in (vectors @ centroids.vectors.T).argmax(dim=1).tolist()]


def _chosen(
    trials: Sequence[Trial], experts: Sequence[str | None], config: EvalConfig
) -> tuple[list[Trial], tuple[str | None, ...]]:
    """At most so many of each expert, then at most so many in all; ids are random, so the first are a sample."""
    taken: dict[str | None, int] = {}
    kept: list[tuple[Trial, str | None]] = []
    for trial, expert in zip(trials, experts, strict=True):
        taken[expert] = taken.get(expert, 0) + 1
        if config.per_expert is None or taken[expert] <= config.per_expert:
            kept.append((trial, expert))
    kept = kept[: config.documents]
    return [trial for trial, _ in kept], tuple(expert for _, expert in kept)


def _set_aside(folder: Path) -> str:
    """Rename results of an earlier run, which look valid and are not; what to do next."""
    file = folder / FILE
    if not file.exists():
        return "mend or rebuild the bank"
    aside = file.with_name("results-before-the-leak.json")
    file.replace(aside)
    return f"mend or rebuild the bank; what an earlier run found is in {aside.name} now"


def _key(engine: Engine, config: EvalConfig, cut: Cut, trials: Sequence[Trial]) -> str:
    """A hash of all that decides the scores but the methods asked for, so that more of them can be added later."""
    values = as_dict(config) | {"methods": None, "cut": [cut.query, cut.prefix, cut.length]}
    documents = [trial.document for trial in trials]
    bank = [engine.bank.manifest.digest, as_dict(engine.config), engine.encoder.fingerprint]
    return _hashed(engine, [bank, values, documents])


def _training_key(engine: Engine, config: EvalConfig, cut: Cut, tune: Sequence[Trial]) -> str:
    """A hash of what decides the fine-tuned baseline, which takes longest.

    That is the text (ids are hashes of contents) and how it is cut, the bank's training settings, how many tokens it
    saw, and the documents that tune: another bank of the same corpus, with other experts, has the same baseline.
    """
    manifest, tuned = engine.bank.manifest, as_dict(config.fine_tune)
    del tuned["full_rates"]  # they decide another baseline, whose trials are named by their rate
    build = manifest.settings()
    train = {name: value for name, value in as_dict(build.train).items() if name in _OF_A_FINE_TUNE}
    public = sorted(public_train(engine.bank)[0])
    cuts = [as_dict(build.corpus), cut.query, cut.prefix, cut.length]
    rates = [trained_at(manifest), trained_tokens(manifest)]
    return _hashed(engine, [tuned, config.seed, train, public, cuts, rates, [trial.document for trial in tune]])


def _hashed(engine: Engine, values: list[Any]) -> str:
    """16 hex digits of settings, the base that is loaded, which may be a variant, and the versions that compute."""
    mark = fingerprint(engine.model)
    versions = [torch.__version__, *(version(name) for name in ("transformers", "localmoe"))]
    identity = [mark.architecture, mark.weights, versions, values]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _kept(bench: Bench, name: str, run: Any) -> Scores:
    """The scores of a method: from an earlier run, or made now and kept."""
    file = f"scores-{name}.json"
    if not bench.work.has(file):
        started = time.perf_counter()
        scores = run()
        bench.work.write_json(file, {"scores": as_dict(scores), "wall": time.perf_counter() - started})
    return TypeAdapter(Scores).validate_python(bench.work.read_json(file)["scores"])


def _seconds(bench: Bench, now: float) -> float:
    """Wall time of all methods, those of earlier runs too."""
    files = bench.work.path.glob("scores-*.json")
    walls = {file.stem: float(json.loads(file.read_text(encoding="utf-8"))["wall"]) for file in files}
    name = "scores-fine-tuned"
    if name in walls:  # its training may be older than what was scored of it
        walls[name] = max(walls[name], baselines.training_seconds(bench))
    return max(now, sum(walls.values()))


def _regime(bench: Bench) -> dict[str, float]:
    """How full one adapter gets and how unlike documents are (docs/choosing.md); what is not known is left out."""
    bank, found = bench.engine.bank, {}
    tokens = bank.manifest.corpus.get("split_tokens", {}).get("train")
    if tokens is not None:
        parameters = adapter_bytes(bench.engine.model, bench.build_config.train.rank) / 2
        found["tokens_per_parameter"] = tokens / parameters
    rows = [row for row, split in enumerate(bank.documents()["split"].to_pylist()) if split == "train"]
    found["explained"] = explained(np.ascontiguousarray(bank.embeddings()[rows]), bench.build_config.cluster)
    return found


def _empty(bench: Bench, experts: tuple[str | None, ...], checks: tuple[Check, ...], command: str) -> Results:
    manifest, config = bench.engine.bank.manifest, bench.config
    return Results(
        format=FORMAT,
        corpus={
            "bank": manifest.digest,
            "prefix_tokens": bench.cut.prefix,
            "query_tokens": bench.cut.query,
            "length_tokens": bench.cut.length,
            "test_documents": len(bench.trials),
            "tune_documents": len(bench.tune),
            "bank_training_tokens": bench.bank_tokens,
        }
        | _regime(bench)
        | {name: value for name, value in manifest.corpus.items() if name.startswith("split_")},
        config={
            "eval": as_dict(config),
            "route": as_dict(bench.engine.config),
            "build": manifest.config,
            "trained": _trained(bench),
            "base": manifest.base.id,
            "base_variant": bench.engine.base_variant,
            "encoder": manifest.encoder.id,
            "experts": len(manifest.experts),
            "routable": len(bench.engine.bank.routable()),
            "versions": manifest.versions,
            "machine": _machine(),
            "command": command,
        },
        documents=tuple(trial.document for trial in bench.trials),
        experts=experts,
        tokens=tuple(trial.passage.predicted for trial in bench.trials),
        bytes=tuple(len(trial.suffix.encode()) for trial in bench.trials),
        methods=(),
        comparisons=(),
        checks=checks,
        seconds=0.0,
    )


def _trained(bench: Bench) -> dict[str, Any]:
    """The rates that trunk and experts were trained at, and the share of the experts that a joint trunk kept."""
    manifest = bench.engine.bank.manifest
    experts = [one.adapter.training for one in manifest.experts if one.adapter is not None]
    rates = sorted(record.learning_rate for record in experts if record is not None)
    trunk = None if manifest.trunk is None else manifest.trunk.training
    return {
        "learning_rate": trained_at(manifest),
        "expert_learning_rates": [rates[0], rates[-1]] if rates else [],
        "kept": None if trunk is None else trunk.kept,
    }


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _result(name: str, title: str | None, scores: Scores, bench: Bench, results: Results) -> MethodResult:
    tokens = [results.tokens[place] for place in scores.documents]
    size = sum(results.bytes[place] for place in scores.documents)
    active = [len(experts) for experts, _, _ in scores.mixes]
    per_token = [nll / count for nll, count in zip(scores.nll, tokens, strict=True)]
    return MethodResult(
        name=name,
        title=(title if title is not None else name).splitlines()[0].rstrip("."),
        default=name == DEFAULT,
        documents=scores.documents,
        nll=scores.nll,
        perplexity=perplexity(scores.nll, tokens),
        perplexity_documents=float(np.exp(np.mean(per_token))),
        bits_per_byte=float(sum(scores.nll) / np.log(2) / size) if size else float("nan"),
        training_tokens=scores.training_tokens,
        active_mean=float(np.mean(active)) if active else None,
        active_max=max(active) if active else None,
        fallbacks=float(np.mean([fallback for _, _, fallback in scores.mixes])) if scores.mixes else None,
        seconds={
            stage: Spread(float(np.median(values)), float(np.quantile(values, 0.95)))
            for stage, values in scores.seconds.items()
            if values
        },
        note=scores.note,
        detail=scores.detail | {"mixes": [[list(names), list(weights)] for names, weights, _ in scores.mixes]},
    )


def _comparisons(results: Results, seed: int) -> tuple[ComparisonRow, ...]:
    rows = []
    for name in BASELINES:
        baseline = results.method(name)
        if baseline is None:
            continue
        for method in results.methods:
            if method.name == name:
                continue
            places, (ours, theirs) = in_common([method, baseline])
            if not places:
                continue
            found = compare(ours, theirs, [results.tokens[place] for place in places], seed)
            interval = (found.low, found.high)
            row = ComparisonRow(method.name, name, method.default, found.gain, interval, found.documents, "")
            rows.append(replace(row, verdict=verdict(row, results)))
    return tuple(rows)


def _with_gap(method: MethodResult, results: Results) -> MethodResult:
    """What is shipped also says which share of the way to test-time training it goes."""
    return replace(method, detail=method.detail | closed_gaps(results, method.name)) if method.default else method
