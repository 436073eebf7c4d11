"""Figures of clusters: experts on each other's documents, the elbow, routing accuracy, k-means, encoders (figure 6)."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch

from localmoe.errors import UsageError
from localmoe.evaluate.bench import public_train
from localmoe.evaluate.drawing import COLOURS, FAINT, MAP, Series, draw_series, ones_twos_fives, ticks
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import HeldOut, Material, Source
from localmoe.evaluate.statistics import perplexity
from localmoe.routing import similarities
from localmoe.runtime.engine import base_mix


@figures.register("6-left")
def matrix(material: Material) -> Figure:
    """Perplexity of every expert on the held-out documents of every cluster."""
    held = material.held_out()
    every = held.engine.router.centroids.experts
    places = np.unique(np.linspace(0, len(every) - 1, min(material.config.experts, len(every))).astype(int)).tolist()
    documents = {k: [place for place, own in enumerate(held.clusters) if own == k] for k in places}
    clusters = [k for k in places if documents[k]]
    counts = held.counts()
    rows: list[Row] = []
    for k in places:
        nll = held.nll([held.alone(every[k])] * len(held), f"figure 6: expert {every[k]}")
        for own in clusters:
            part = documents[own]
            value = perplexity([nll[place] for place in part], [counts[place] for place in part])
            row: Row = {"expert": every[k], "cluster": every[own], "documents": len(part), "perplexity": value}
            rows.append(row)
    logs = np.log([row["perplexity"] for row in rows]).reshape(len(places), len(clusters))
    gains = logs.mean(axis=0) - logs
    right = [int(gains[:, column].argmax()) == places.index(own) for column, own in enumerate(clusters)]

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        bound = float(np.abs(gains).max())
        image = axes.imshow(gains, cmap=MAP, vmin=-bound, vmax=bound, interpolation="nearest")
        axes.grid(visible=False)
        step = max(1, len(places) // 16)
        axes.set_yticks(range(0, len(places), step), [every[k] for k in places[::step]], fontsize=7.5)
        step = max(1, len(clusters) // 16)
        axes.set_xticks(range(0, len(clusters), step), [every[k] for k in clusters[::step]], fontsize=7.5, rotation=90)
        axes.set(xlabel="held-out documents nearest to this expert's centroid", ylabel="expert")
        canvas.colorbar(image, ax=axes, label="nats a token better than the mean expert", shrink=0.85)

    caption = (
        "Brighter is better, within a column. "
        f"The cluster's own expert is the best in {sum(right)} of {len(right)} columns. "
        f"Clusters without a held-out document have no column. {len(held)} documents."
    )
    return Figure("Experts on each other's clusters", caption, tuple(rows), held.settings(), draw, (6.4, 5.2))


@figures.register("6-middle")
def elbow(material: Material) -> Figure:
    """Inertia a document against the number of clusters."""
    from localmoe.train.clustering import bisect

    bank = material.source.engine.bank
    most = material.config.clusters
    if most is None:
        # access sets are clustered apart: the curve of the largest is the one of most documents
        curves = [part["curve"] for part in bank.clusters()["access_sets"]]
        curve = max(curves, key=len)
        documents = sum(1 for split in bank.documents()["split"].to_pylist() if split == "train")
    else:
        vectors, _ = _train_vectors(material.source)
        config = bank.manifest.settings().cluster
        curve = [list(point) for point in bisect(vectors, config, most).curve]
        documents = len(vectors)
    rows = tuple({"clusters": k, "inertia": inertia / documents, "diameter": widest} for k, inertia, widest in curve)

    def draw(canvas: Any) -> None:
        left, right = canvas.subplots(1, 2)
        x = [row["clusters"] for row in rows]
        for axes, key, label in (
            (left, "inertia", "inertia a document"),
            (right, "diameter", "widest cluster, bound 2·max‖φ − μ‖"),
        ):
            axes.plot(x, [row[key] for row in rows], "-", color=COLOURS[0])
            axes.set(xlabel="clusters K", ylabel=label, xscale="log")
            ticks(axes.xaxis, ones_twos_fives(1, rows[-1]["clusters"]))

    caption = f"Bisecting k-means of {documents:,} train documents, up to {rows[-1]['clusters']} clusters."
    settings = {"bank": material.source.name, "documents": documents, "clusters": rows[-1]["clusters"]}
    return Figure("The elbow", caption, rows, settings, draw, (7.0, 3.4))


@figures.register("6-right")
def routing_accuracy(material: Material) -> Figure:
    """Share of held-out documents whose own cluster is among the k nearest to the prefix."""
    held = material.held_out()
    rows = _accuracies(held)
    count = len(held.engine.router.centroids.experts)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        x = [row["k"] for row in rows]
        series = [
            Series(f"prefix of {held.prefix} tokens", x, [row["accuracy"] for row in rows], colour=COLOURS[0]),
            Series("by chance", x, [row["chance"] for row in rows], colour=FAINT, line=":"),
        ]
        draw_series(axes, series, "log", ones_twos_fives(1, count))
        axes.set(xlabel="k", ylabel="own cluster among the k nearest", ylim=(0, 1.03))

    caption = f"The own cluster: the centroid nearest to the whole document. {len(held)} documents, {count} experts."
    return Figure("Routing accuracy", caption, rows, held.settings(), draw)


def _accuracies(held: HeldOut) -> tuple[Row, ...]:
    """pass@k for every k."""
    scores = similarities(held.queries(), held.engine.router.centroids)
    own = torch.tensor(held.clusters)
    ranks = (scores.argsort(dim=1, descending=True, stable=True) == own[:, None]).int().argmax(dim=1)
    count = scores.shape[1]
    return tuple(
        {"k": k, "accuracy": float((ranks < k).double().mean()), "chance": k / count} for k in range(1, count + 1)
    )


@figures.register("clusterings")
def against_k_means(material: Material) -> Figure:
    """Bisecting k-means against k-means on the bank's own embeddings: inertia, balance, time."""
    from sklearn.cluster import KMeans

    from localmoe.train.clustering import bisect

    vectors, tokens = _train_vectors(material.source)
    manifest = material.source.engine.bank.manifest
    wanted = material.config.clusters if material.config.clusters is not None else len(manifest.experts)
    started = time.perf_counter()
    ours = bisect(vectors, manifest.settings().cluster, wanted)
    bisected = time.perf_counter()
    count = len(ours.means)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KMeans(count, n_init=4, random_state=material.evaluation.seed).fit(vectors.astype(np.float32))
    seconds = {"bisecting k-means": bisected - started, "k-means": time.perf_counter() - bisected}
    inertia = {"bisecting k-means": ours.curve[-1][1], "k-means": float(theirs.inertia_)}
    rows = [
        {"clustering": name, "inertia": inertia[name] / len(vectors)}
        | _balance(labels, tokens)
        | {"seconds": seconds[name]}
        for name, labels in (("bisecting k-means", ours.assignment), ("k-means", theirs.labels_))
    ]
    caption = (
        f"{len(vectors):,} train documents in {count} clusters, without a minimum of tokens. Sizes are in tokens, "
        "spread is their standard deviation over their mean. k-means is scikit-learn's, 4 starts."
    )
    settings = {"bank": material.source.name, "documents": len(vectors), "clusters": count}
    return Figure("Bisecting k-means against k-means", caption, tuple(rows), settings)


def _balance(labels: np.ndarray, tokens: np.ndarray) -> Row:
    sizes = np.bincount(labels, weights=tokens)
    return {
        "largest_share": float(sizes.max() / sizes.sum()),
        "largest": int(sizes.max()),
        "median": int(np.median(sizes)),
        "smallest": int(sizes.min()),
        "spread": float(sizes.std() / sizes.mean()),
    }


def _train_vectors(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [n, d] fp16 and tokens [n] of the public train documents."""
    bank = source.engine.bank
    rows = public_train(bank)[1]
    return np.ascontiguousarray(bank.embeddings()[rows]), np.array(bank.documents()["tokens"].to_pylist())[rows]


@figures.register("encoders")
def encoders(material: Material) -> Figure:
    """Banks of the same corpus that differ in their encoder: perplexity, gain over the base, routing accuracy."""
    if len(material.sources) < 2:
        raise UsageError(
            "encoders are compared between banks, and there is one", "give the others: --with BANK, may be repeated"
        )
    rows: list[Row] = []
    first: list[float] | None = None
    for held in material.every_held_out():
        source = held.source
        nll = held.nll(held.mixes(), f"{source.name}: merged")
        base = held.nll([base_mix(held.engine.bank)] * len(held), f"{source.name}: base")
        manifest, over_base = held.engine.bank.manifest, held.measured(nll, base)
        row: Row = {"bank": source.name, "encoder": manifest.encoder.id, "dimensions": manifest.encoder.dim}
        row |= {"experts": len(held.engine.router.centroids.experts), "perplexity": over_base["perplexity"]}
        row |= {f"over_base_{key}": over_base[key] for key in ("gain", "low", "high")}
        if first is not None:
            over_first = held.measured(nll, first)
            row |= {f"over_first_{key}": over_first[key] for key in ("gain", "low", "high")}
        else:
            first = nll
        rows.append(row | {"own_cluster_first": _accuracies(held)[0]["accuracy"], "documents": len(held)})
    caption = f"The shipped default of every bank on the same documents. The first bank is {rows[0]['bank']}."
    return Figure("Encoders", caption, tuple(rows), {"banks": [source.name for source in material.sources]})
