"""Records: what a finished build leaves in the bank beside its adapters; experts, router, and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from localmoe.bank.files import write_json, write_table, write_tensors, write_texts
from localmoe.bank.manifest import ExpertRecord, FileRecord, Kind, RouterRecord
from localmoe.routing import Centroids
from localmoe.train.activity import search_active
from localmoe.train.checks import choose_beta
from localmoe.train.experts import AdapterResult
from localmoe.train.groundwork import Groundwork
from localmoe.train.labels import label_clusters
from localmoe.train.progress import Event, Watch

_LABEL_TEXTS = 64
_LABEL_CHARACTERS = 4_000


def expert_records(ground: Groundwork, results: Sequence[AdapterResult]) -> tuple[ExpertRecord, ...]:
    """The expert of every cluster, with its label and what became of its training."""
    labels = _labels(ground)
    records = []
    for k, result in enumerate(results):
        members = ground.clusters.rows(k)
        records.append(
            ExpertRecord(
                id=ground.expert_ids[k],
                label=labels[k],
                row=k,
                documents=len(members),
                tokens=int(ground.rows.tokens[members].sum()),
                access=ground.clusters.access[k],
                tags=tuple(sorted({tag for row in members for tag in ground.rows.tags[row]})),
                outcome=result.outcome,
                adapter=result.adapter,
            )
        )
    return tuple(records)


def choose_router(
    ground: Groundwork, prompts: np.ndarray, experts: Sequence[ExpertRecord], watch: Watch
) -> RouterRecord:
    """The number of active experts, and β, from the first tokens of public tune documents [n, d] and public experts."""
    usable = [expert for expert in experts if not expert.access and expert.outcome.status in ("good", "unchecked")]
    rows = [expert.row for expert in usable]
    vectors, means = (torch.from_numpy(part[rows]) for part in (ground.clusters.centroids, ground.clusters.means))
    centroids = Centroids(tuple(expert.id for expert in usable), vectors, "", means)
    active = search_active(ground, ground.rows.where("tune", ()), prompts, centroids, usable, watch)
    record, note = choose_beta(prompts, centroids, replace(ground.config.route, active=active))
    found = f"β = {record.beta:.3g}: {record.active:.1f} experts a prompt" if record.active else ""
    watch(Event("route", 1, 1, "; ".join(part for part in (note, found) if part)))
    return record


def write_files(ground: Groundwork, embeddings: np.ndarray, experts: Sequence[ExpertRecord]) -> dict[Kind, FileRecord]:
    """Everything but the adapters: centroids, clusters, and the documents that took part, in the order read."""
    path, clusters = ground.path, ground.clusters
    kept = [row for row, split in enumerate(ground.rows.split) if split != "unused"]
    centroids = {"centroids": torch.from_numpy(clusters.centroids), "means": torch.from_numpy(clusters.means)}
    vectors = torch.from_numpy(embeddings[kept].astype(np.float16))
    files: dict[Kind, FileRecord] = {
        "centroids": write_tensors(path, "centroids", centroids),
        "clusters": write_json(path, "clusters", {"access_sets": clusters.trees}),
        "documents": write_table(path, "documents", _documents(ground, kept, experts)),
        "embeddings": write_tensors(path, "embeddings", {"embeddings": vectors}),
    }
    if ground.config.keep_texts:
        texts = (
            (document.id, document.content, [(turn.role, turn.content) for turn in document.messages])
            for _, document in ground.work.chosen(kept)
        )
        files["texts"] = write_texts(path, texts)
    return files


def _labels(ground: Groundwork) -> list[str]:
    """c-TF-IDF labels, each access set's from its own documents."""
    clusters = ground.clusters
    read = [clusters.rows(k)[:_LABEL_TEXTS] for k in range(len(clusters.access))]
    chosen = ground.work.chosen(row for rows in read for row in rows)
    texts = {row: document.content[:_LABEL_CHARACTERS] for row, document in chosen}
    labels: list[str] = []
    for names in dict.fromkeys(clusters.access):
        group = [rows for rows, access in zip(read, clusters.access, strict=True) if access == names]
        labels += label_clusters([[texts[row] for row in rows] for rows in group])
    return labels


def _documents(ground: Groundwork, kept: Sequence[int], experts: Sequence[ExpertRecord]) -> Any:
    """The pyarrow Table of the documents at these rows."""
    import pyarrow

    rows = ground.rows
    owner = [experts[k].id if k >= 0 else None for k in ground.clusters.assignment[kept].tolist()]
    names = pyarrow.list_(pyarrow.string())
    return pyarrow.table(
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
