"""Recipes compared: how long the trunk trains, where its rate stops, and how experts go on, at equal total tokens.

    python experiments/recipes.py CORPUS.jsonl MODEL ENCODER [--documents 1200] [--json PATH] SETTING ...

SETTING is e.g. `rank=16,clusters=8,rate=3e-3,trunk=1.5,expert=0.5,floor=0.5,expert_rate=1`: passes of the trunk and of
the experts, the share of the peak rate at which the trunk stops, and the experts' rate as a multiple of the peak. Each
is compared, on the suffixes of held-out documents, with one adapter trained on all documents for `trunk` + `expert`
passes, falling to zero: at the best of `--rates` (as these very documents judge), or at its own `rate`.
Made for the laboratory model (experiments/laboratory.py), which trains in minutes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.config import ClusterConfig, TrainConfig
from localmoe.encoders import load_encoder
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.lora import Adapter, attached, stack
from localmoe.models import load_model, load_tokenizer, packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import sparse_softmax
from localmoe.train.clustering import bisect
from localmoe.train.training import fresh_adapter, train

TEST, LENGTH = 250, 256
BETAS = (0.0, 0.03, 0.06, 0.1)
Known = dict[tuple[int, int, float, float, float], Adapter]
"""Adapters trained on all documents, by rank, batch, rate, passes and floor."""


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


@dataclass(frozen=True, eq=False)
class Laboratory:
    """Model and documents: train passages, test passages with labels on their suffixes, embeddings of both."""

    model: Any
    train: list[Passage]
    test: list[Passage]
    documents: np.ndarray
    queries: np.ndarray


def prepare(corpus: Path, model: str, encoder: str, documents: int, prefix: int) -> Laboratory:
    """The first documents of a corpus in a random order; queries are the prefixes alone."""
    tokenizer, sentence = load_tokenizer(model), load_encoder(encoder)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").split("\n") if line]
    chosen = random.Random(0).sample([text for text in texts if len(text) > 600], documents + TEST)
    ids = [torch.tensor(row[:LENGTH]) for row in tokenizer(chosen, verbose=False)["input_ids"]]
    passages = [Passage(row, torch.ones(len(row), dtype=torch.bool)) for row in ids[:documents]]
    test = [Passage(row, torch.arange(len(row)) >= prefix) for row in ids[documents:]]
    prefixes = [tokenizer.decode(row[:prefix], skip_special_tokens=True) for row in ids[documents:]]
    vectors = sentence.encode([text[:1000] for text in chosen[:documents]])
    return Laboratory(load_model(model), passages, test, vectors, sentence.encode(prefixes))


def fit(
    lab: Laboratory,
    passages: list[Passage],
    start: Adapter,
    setting: Setting,
    rate: float,
    passes: float,
    floor: float,
    seed: int,
    expert: bool = False,
) -> Adapter:
    """One training run; that of an expert has a batch and a warm-up of its own."""
    batch, warmup = (setting.expert_batch, setting.expert_warmup) if expert else (setting.batch, 0.05)
    config = TrainConfig(rank=setting.rank, alpha=setting.rank, batch=batch, warmup=warmup)
    tokens = round(passes * sum(passage.predicted for passage in passages))
    return train(lab.model, passages, start, config, rate, seed, tokens, floor=floor).adapter


def score(lab: Laboratory, adapters: list[Adapter], weights: torch.Tensor | None) -> list[float]:
    """Suffix nll (nats) of every test document under its own mix [n, K] of the adapters; none: the first for all."""
    totals = []
    for place, passage in enumerate(lab.test):
        row = [1.0] if weights is None else weights[place].tolist()
        kept = [(adapters[k], weight) for k, weight in enumerate(row) if weight > 0]
        mixed = {name: stack([adapter[name].scaled(weight) for adapter, weight in kept]) for name in adapters[0]}
        with attached(lab.model, mixed), packed(lab.model):
            totals.append(float(token_nll(lab.model, [passage])[0].double().sum()))
    return totals


def on_all(lab: Laboratory, setting: Setting, rate: float, passes: float, floor: float, known: Known) -> Adapter:
    """One adapter trained on all documents; `known` keeps it for other settings."""
    key = (setting.rank, setting.batch, rate, passes, floor)
    if key not in known:
        fresh = fresh_adapter(lab.model, TrainConfig(rank=setting.rank, alpha=setting.rank), 0)
        known[key] = fit(lab, lab.train, fresh, setting, rate, passes, floor, 0)
    return known[key]


def measure(lab: Laboratory, setting: Setting, rates: list[float], known: Known) -> dict[str, Any]:
    """Perplexities of fine-tune, trunk and mixes, and the gain of each mix over the fine-tune."""
    passes = setting.trunk + setting.expert
    tuned = {rate: score(lab, [on_all(lab, setting, rate, passes, 0.0, known)], None) for rate in rates}
    best = min(tuned, key=lambda rate: sum(tuned[rate]))
    baseline = tuned[best]
    trunk = on_all(lab, setting, setting.rate, setting.trunk, setting.floor, known)
    tokens = np.array([len(passage) for passage in lab.train])
    found = bisect(lab.documents, ClusterConfig(min_tokens=2000), setting.clusters, tokens, 0)
    experts = []
    for k in range(len(found.centroids)):
        members = [lab.train[row] for row in np.flatnonzero(found.assignment == k)]
        rate = setting.rate * setting.expert_rate
        experts.append(fit(lab, members, trunk, setting, rate, setting.expert, 0.0, k + 1, expert=True))
    counts = [passage.predicted for passage in lab.test]
    scores = torch.from_numpy(lab.queries).double() @ torch.from_numpy(found.centroids).double().T
    rows = []
    for beta in BETAS:
        weights = sparse_softmax(scores, beta, 0.01)
        nll = score(lab, experts, weights)
        gain = asdict(compare(nll, baseline, counts))
        active = float((weights > 0).sum(dim=1).double().mean())
        rows.append({"beta": beta, "active": active, "perplexity": perplexity(nll, counts), "gain": gain})
    return {
        "setting": asdict(setting),
        "experts": len(experts),
        "train_tokens": int(tokens.sum()),
        "trunk": perplexity(score(lab, [trunk], None), counts),
        "fine_tuned": perplexity(baseline, counts),
        "fine_tuned_rate": best,
        "merged": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model")
    parser.add_argument("encoder")
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--prefix", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="*", help="the fine-tune's; none: each setting's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lab = prepare(options.corpus, options.model, options.encoder, options.documents, options.prefix)
    kinds = {field.name: type(field.default) for field in fields(Setting)}
    results: list[dict[str, Any]] = []
    known: Known = {}
    for text in options.settings:
        pairs = [pair.split("=") for pair in text.split(",") if pair]
        setting = Setting(**{name: kinds[name](value) for name, value in pairs})
        one = measure(lab, setting, [setting.rate] if options.rates is None else options.rates, known)
        results.append(one)
        tuned = f"fine-tuned {one['fine_tuned']:.3f} at {one['fine_tuned_rate']}"
        print(f"{text}: trunk {one['trunk']:.3f}, {tuned}")
        for row in one["merged"]:
            gain = row["gain"]
            print(
                f"  β {row['beta']:<5} {row['active']:4.1f} active  {row['perplexity']:.3f}  "
                f"{gain['gain']:+.2%} [{gain['low']:+.2%}, {gain['high']:+.2%}]",
                flush=True,
            )
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
