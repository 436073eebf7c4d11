"""Recipes compared: how long the trunk trains, where its rate stops, and how experts go on, at equal total tokens.

    python experiments/recipes.py CORPUS.jsonl MODEL ENCODER [--documents 1200] [--json PATH] SETTING ...

SETTING is e.g. `rank=16,clusters=8,rate=3e-3,trunk=1.5,expert=0.5,floor=0.5,expert_rate=1`: passes of the trunk and of
the experts, the share of the peak rate at which the trunk stops, and the experts' rate as a multiple of the peak. With
`joint=1,beta=0.06` trunk and experts are trained in the same steps, `trunk` passes long, documents by the mixes of the
whole of them at that β (a build takes half of a mix from their first tokens). Each is compared, on the suffixes of
held-out documents, with one adapter trained on all documents for as many passes, falling to zero: at the best of
`--rates` and `--batches` (as these very documents judge), or at its own.
For the laboratory model (experiments/laboratory.py), which trains in minutes, or for a GPU, where the trainings of all
settings run side by side.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from localmoe.config import ClusterConfig, TrainConfig
from localmoe.encoders import load_encoder
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.models import load_model, load_tokenizer, packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import sparse_softmax
from localmoe.train.clustering import bisect
from localmoe.train.course import Job, Trained, batches_of
from localmoe.train.joint import JointJob, train_jointly
from localmoe.train.training import fresh_adapter, train_all

TEST = 250
BETAS = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2)
_DOCUMENTS = 32  # scored by one forward pass


@dataclass(frozen=True)
class Whole:
    """A training on all documents."""

    rank: int
    batch: int
    rate: float
    passes: float
    floor: float


@dataclass(frozen=True)
class Setting:
    """One recipe."""

    rank: int = 16
    clusters: int = 8
    rate: float = 3e-3
    trunk: float = 1.0
    expert: float = 1.0
    floor: float = 1.0
    expert_rate: float = 1.0
    batch: int = 4
    expert_batch: int = 4
    expert_warmup: float = 0.05
    fresh: int = 0
    joint: int = 0
    beta: float = 0.06


@dataclass(frozen=True, eq=False)
class Laboratory:
    """Model and documents: train passages, test passages with labels on their suffixes, embeddings of both."""

    model: Any
    train: list[Passage]
    test: list[Passage]
    documents: np.ndarray
    queries: np.ndarray


def prepare(corpus: Path, model: str, encoder: str, documents: int, prefix: int, length: int) -> Laboratory:
    """The first documents of a corpus in a random order; queries are the prefixes alone."""
    tokenizer, sentence = load_tokenizer(model), load_encoder(encoder)
    opened = gzip.open(corpus, "rt", encoding="utf-8") if corpus.suffix == ".gz" else corpus.open(encoding="utf-8")
    with opened as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts = [text for text in texts if len(text) > 600]
    chosen = random.Random(0).sample(texts, min(len(texts), documents + TEST))[::-1]
    ids = [torch.tensor(row[:length]) for row in tokenizer(chosen, verbose=False)["input_ids"]]
    test = [Passage(row, torch.arange(len(row)) >= prefix) for row in ids[:TEST]]
    prefixes = [tokenizer.decode(row[:prefix], skip_special_tokens=True) for row in ids[:TEST]]
    passages = [Passage(row, torch.ones(len(row), dtype=torch.bool)) for row in ids[TEST:]]
    vectors = sentence.encode([text[:1000] for text in chosen[TEST:]])
    return Laboratory(load_model(model), passages, test, vectors, sentence.encode(prefixes))


def job(passages: list[Passage], start: Adapter, one: Whole, seed: int, warmup: float = 0.05) -> Job:
    """A training of so many passes over some passages."""
    config = TrainConfig(rank=one.rank, alpha=one.rank, batch=one.batch, warmup=warmup)
    tokens = round(one.passes * sum(passage.predicted for passage in passages))
    return Job(passages, start, config, one.rate, seed, tokens, one.floor)


class Beside(nn.Module):
    """A linear with all experts beside it, each row of the input with its own weight for each of them."""

    def __init__(self, base: nn.Module, updates: list[LowRank], weights: list[torch.Tensor]) -> None:
        super().__init__()
        like = weight_of(base)
        self.base, self.weights = base, weights
        self.A = torch.cat([update.A.to(like) for update in updates])
        self.B = torch.cat(
            [(update.B.to(like.device) * update.c.to(like.device)).to(like) for update in updates], dim=1
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, n, d_in] → [1, n, d_out]; weights[0]: [n, K · r]."""
        return self.base(x) + ((x @ self.A.t()) * self.weights[0]) @ self.B.t()


@torch.no_grad()
def score(lab: Laboratory, adapters: list[Adapter], weights: torch.Tensor | None = None) -> list[float]:
    """Suffix nll (nats) of test documents under their own mixes [n, K] of the adapters; none: of the first, for all."""
    if weights is None:
        weights, adapters = torch.ones(len(lab.test), 1), adapters[:1]
    rank, held = next(iter(adapters[0].values())).rank, [torch.zeros(0)]
    length = max(len(passage) for passage in lab.test)
    even = [evened(passage, length) for passage in lab.test[: len(weights)]]
    bases = {name: lab.model.get_submodule(name) for name in adapters[0]}
    totals: list[float] = []
    with packed(lab.model):
        try:
            for name, base in bases.items():
                lab.model.set_submodule(name, Beside(base, [adapter[name] for adapter in adapters], held))
            for first in range(0, len(even), _DOCUMENTS):
                rows = weights[first : first + _DOCUMENTS].repeat_interleave(rank, dim=1)
                held[0] = rows.repeat_interleave(length, dim=0).to(lab.model.device, lab.model.dtype)
                nll = token_nll(lab.model, even[first : first + _DOCUMENTS])
                totals += [float(one.double().sum()) for one in nll]
        finally:
            for name, base in bases.items():
                lab.model.set_submodule(name, base)
    return totals


def evened(passage: Passage, length: int) -> Passage:
    """Filled up with tokens that nothing is asked of: passages of one length go through attention together."""
    more = length - len(passage)
    return Passage(F.pad(passage.tokens, (0, more)), F.pad(passage.labels, (0, more)))


def on_all(lab: Laboratory, asked: Iterable[Whole]) -> dict[Whole, Adapter]:
    """Adapters trained on all documents; those that diverge are left out."""
    found: dict[Whole, Adapter] = {}
    asked = sorted(set(asked), key=lambda one: (one.rank, one.batch))
    for _, group in groupby(asked, key=lambda one: (one.rank, one.batch)):
        wholes = list(group)
        start = fresh_adapter(lab.model, TrainConfig(rank=wholes[0].rank, alpha=wholes[0].rank), 0)
        trained = train_all(lab.model, [job(lab.train, start, one, 0) for one in wholes])
        found |= {one: it.adapter for one, it in zip(wholes, trained, strict=True) if isinstance(it, Trained)}
    return found


def clusters_of(lab: Laboratory, count: int) -> tuple[np.ndarray, list[list[Passage]]]:
    """Centroids [K, d] and the passages of every cluster."""
    tokens = np.array([len(passage) for passage in lab.train])
    found = bisect(lab.documents, ClusterConfig(min_tokens=2000), count, tokens, 0)
    members = [np.flatnonzero(found.assignment == k) for k in range(len(found.centroids))]
    return found.centroids, [[lab.train[row] for row in rows] for rows in members]


def seen_by(lab: Laboratory, one: Whole) -> set[int]:
    """Identities of the passages that a training on all documents has read."""
    asked = job(lab.train, {}, one, 0)
    batches = batches_of(asked.passages, asked.config, asked.seed, asked.tokens)
    return {id(passage) for batch in batches for passage in batch}


def experts_of(
    lab: Laboratory, settings: list[Setting], known: dict[Whole, Adapter]
) -> list[tuple[np.ndarray, list[Adapter]]]:
    """Centroids [K, d] and experts of every setting; an expert that diverges is its trunk."""
    clusters = {count: clusters_of(lab, count) for count in {setting.clusters for setting in settings}}
    jobs: list[list[Job]] = []
    for setting in settings:
        one = Whole(setting.rank, setting.expert_batch, setting.rate * setting.expert_rate, setting.expert, 0.0)
        trunk, groups = known[trunk_of(setting)], clusters[setting.clusters][1]
        asked = [round(setting.expert * sum(passage.predicted for passage in group)) for group in groups]
        if setting.fresh:
            seen = seen_by(lab, trunk_of(setting))
            groups = [[passage for passage in group if id(passage) not in seen] or group for group in groups]
        made = [job(group, trunk, one, k + 1, setting.expert_warmup) for k, group in enumerate(groups)]
        jobs.append([replace(it, tokens=tokens) for it, tokens in zip(made, asked, strict=True)])
    trained: dict[int, list[Adapter]] = {}
    for rank in {setting.rank for setting in settings}:
        places = [place for place, setting in enumerate(settings) if setting.rank == rank]
        flat = iter(train_all(lab.model, [one for place in places for one in jobs[place]]))
        for place in places:
            results = [(one.start, next(flat)) for one in jobs[place]]
            trained[place] = [it.adapter if isinstance(it, Trained) else trunk for trunk, it in results]
    return [(clusters[setting.clusters][0], trained[place]) for place, setting in enumerate(settings)]


def jointly(lab: Laboratory, setting: Setting) -> tuple[np.ndarray, list[Adapter], Adapter]:
    """Centroids [K, d], experts and trunk of one joint training."""
    centroids, groups = clusters_of(lab, setting.clusters)
    scores = torch.from_numpy(lab.documents).double() @ torch.from_numpy(centroids).double().T
    mixes = [
        [(k, w) for k, w in enumerate(row) if w > 0] for row in sparse_softmax(scores, setting.beta, 0.01).tolist()
    ]
    config = TrainConfig(rank=setting.rank, alpha=setting.rank, batch=setting.batch)
    tokens = round(setting.trunk * sum(passage.predicted for passage in lab.train))
    passages = list(zip(lab.train, mixes, strict=True))
    rates = setting.rate, setting.expert_rate
    start = fresh_adapter(lab.model, config, 0)
    found = train_jointly(lab.model, JointJob(passages, len(groups), start, config, *rates, 0, tokens))
    return centroids, [expert.adapter for expert in found.experts], found.trunk.adapter


def test_time(lab: Laboratory, start: Adapter, count: int, neighbours: int, rate: float) -> list[float]:
    """Suffix nll of the first test documents, each after one step at a constant rate on each of its neighbours."""
    rank = next(iter(start.values())).rank
    nearest = np.argsort(-lab.queries[:count] @ lab.documents.T, axis=1)[:, :neighbours]
    one = Whole(rank, 1, rate, 1.0, 1.0)
    jobs = [job([lab.train[row] for row in rows], start, one, 0, warmup=0.0) for rows in nearest.tolist()]
    adapters = [it.adapter if isinstance(it, Trained) else start for it in train_all(lab.model, jobs)]
    return score(lab, adapters, torch.eye(len(jobs)))


def tuned_of(setting: Setting, rates: list[float] | None, batches: list[int] | None) -> list[Whole]:
    """The fine-tunes that a setting is compared with; of another batch than its own at a rate by the root of it."""
    passes = setting.trunk + (0 if setting.joint else setting.expert)
    return [
        Whole(setting.rank, batch, rate * math.sqrt(batch / setting.batch), passes, 0.0)
        for rate in ([setting.rate] if rates is None else rates)
        for batch in ([setting.batch] if batches is None else batches)
    ]


def trunk_of(setting: Setting) -> Whole:
    """The trunk of a setting."""
    return Whole(setting.rank, setting.batch, setting.rate, setting.trunk, 0.0 if setting.joint else setting.floor)


def measure(
    lab: Laboratory,
    setting: Setting,
    tuned: list[Whole],
    nll: dict[Whole, list[float]],
    trunk: list[float],
    centroids: np.ndarray,
    experts: list[Adapter],
) -> dict[str, Any]:
    """Perplexities of fine-tune, trunk and mixes, and the gain of each mix over the fine-tune."""
    counts = [passage.predicted for passage in lab.test]
    nll = {one: it for one, it in nll.items() if one in tuned}
    best = min(nll, key=lambda one: sum(nll[one]))
    scores = torch.from_numpy(lab.queries).double() @ torch.from_numpy(centroids).double().T
    uniform = torch.full_like(scores, 1 / len(experts))
    rows = []
    for beta in (*BETAS, None):
        weights = uniform if beta is None else sparse_softmax(scores, beta, 0.01)
        mine = score(lab, experts, weights)
        gain = asdict(compare(mine, nll[best], counts))
        active = float((weights > 0).sum(dim=1).double().mean())
        rows.append({"beta": beta, "active": active, "perplexity": perplexity(mine, counts), "gain": gain})
    return {
        "setting": asdict(setting),
        "experts": len(experts),
        "train_tokens": sum(len(passage) for passage in lab.train),
        "trunk": perplexity(trunk, counts),
        "fine_tuned": perplexity(nll[best], counts),
        "fine_tuned_as": asdict(best),
        "fine_tuned_all": [asdict(one) | {"perplexity": perplexity(it, counts)} for one, it in nll.items()],
        "merged": rows,
    }


def asked() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model")
    parser.add_argument("encoder")
    parser.add_argument("settings", nargs="+", type=setting_of)
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--prefix", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="*", help="the fine-tune's; none: each setting's own")
    parser.add_argument("--batches", type=int, nargs="*", help="the fine-tune's; none: each setting's own")
    parser.add_argument("--test-time", nargs=3, help="test documents, neighbours and rate, from the first trunk")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def setting_of(text: str) -> Setting:
    """`rank=16,clusters=8` as a setting."""
    kinds = {field.name: type(field.default) for field in fields(Setting)}
    pairs = dict(pair.split("=") for pair in text.split(",") if pair)
    return Setting(**{name: kinds[name](value) for name, value in pairs.items()})


def tell(one: dict[str, Any]) -> None:
    """One setting's results."""
    best = one["fine_tuned_as"]
    print(f"{one['setting']}: trunk {one['trunk']:.3f}, fine-tuned {one['fine_tuned']:.3f} as {best}")
    for row in one["merged"]:
        gain = row["gain"]
        shares = f"{gain['gain']:+.2%} [{gain['low']:+.2%}, {gain['high']:+.2%}]"
        print(f"  β {row['beta']!s:<5} {row['active']:4.1f} active  {row['perplexity']:.3f}  {shares}")


def tell_test_time(lab: Laboratory, options: argparse.Namespace, trunk: Adapter, nll: list[float]) -> None:
    """What test-time training from a trunk gains over it."""
    count, neighbours, rate = int(options.test_time[0]), int(options.test_time[1]), float(options.test_time[2])
    counts = [passage.predicted for passage in lab.test[:count]]
    gain = compare(test_time(lab, trunk, count, neighbours, rate), nll[:count], counts)
    print(f"test-time training from the first trunk: {gain.gain:+.2%} [{gain.low:+.2%}, {gain.high:+.2%}] over it")


def main() -> None:
    options, started = asked(), time.perf_counter()

    def clock(what: str) -> None:
        print(f"{what} after {time.perf_counter() - started:.0f} s", flush=True)

    lab = prepare(options.corpus, options.model, options.encoder, options.documents, options.prefix, options.length)
    tuned = {setting: tuned_of(setting, options.rates, options.batches) for setting in options.settings}
    clock("prepared")
    after = [setting for setting in tuned if not setting.joint]
    known = on_all(lab, [*map(trunk_of, after), *(one for each in tuned.values() for one in each)])
    nll = {one: score(lab, [adapter]) for one, adapter in known.items()}
    for one, values in nll.items():
        print(f"  {one}: {perplexity(values, [passage.predicted for passage in lab.test]):.3f}")
    clock(f"{len(known)} adapters on all documents")
    trained = [setting for setting in after if trunk_of(setting) in known]
    for setting in after:
        if setting not in trained:
            print(f"{setting}: the trunk diverged")
    if options.test_time is not None and trained:
        tell_test_time(lab, options, known[trunk_of(trained[0])], nll[trunk_of(trained[0])])
        clock("test-time training")
    made = experts_of(lab, trained, known)
    clock("experts")
    results: list[dict[str, Any]] = []

    def keep(setting: Setting, trunk: list[float], centroids: np.ndarray, experts: list[Adapter]) -> None:
        results.append(measure(lab, setting, tuned[setting], nll, trunk, centroids, experts))
        tell(results[-1])
        clock("measured")
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for setting, (centroids, experts) in zip(trained, made, strict=True):
        keep(setting, nll[trunk_of(setting)], centroids, experts)
    for setting in tuned:
        if setting.joint:
            centroids, experts, trunk = jointly(lab, setting)
            keep(setting, score(lab, [trunk]), centroids, experts)


if __name__ == "__main__":
    main()
