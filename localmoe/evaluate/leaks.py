"""Leak checks: what would make an evaluation worth nothing, looked for before the first method runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from localmoe.evaluate.duplicates import exact_duplicates, near_duplicates
from localmoe.evaluate.protocol import Cut, Trial, mutated
from localmoe.evaluate.results import Check
from localmoe.runtime.engine import Engine

MUTATED = 32
"""Documents whose suffix is changed to see whether the mix changes."""

_TOLERANCE = 2e-3  # embeddings lie in fp16 in the bank, means in fp32


def duplicates_of_train(engine: Engine, threshold: float) -> tuple[frozenset[str], str]:
    """Ids of test and tune documents that stand, exactly or nearly, among the train documents too, and a sentence.

    Tune documents that stand among those of test are left out as well: they choose rates and β.
    """
    ids = _ids_by_split(engine)
    texts = {split: engine.bank.texts(names) for split, names in ids.items()}
    held_out, both = [*ids["test"], *ids["tune"]], [*texts["test"], *texts["tune"]]
    exact = {held_out[pair.place] for pair in exact_duplicates(both, texts["train"])}
    near = {held_out[pair.place] for pair in near_duplicates(both, texts["train"], threshold)} - exact
    counts = [
        f"{len(exact & set(ids[split]))} exact and {len(near & set(ids[split]))} near ones of {split}"
        for split in ("test", "tune")
    ]
    again = {ids["tune"][pair.place] for pair in near_duplicates(texts["tune"], texts["test"], threshold)}
    found = f"duplicates of train documents that are left out: {', '.join(counts)}"
    return frozenset(exact | near | again), f"{found}; {len(again - exact - near)} of tune that stand in test"


def _ids_by_split(engine: Engine) -> dict[str, list[str]]:
    table = engine.bank.documents()
    found: dict[str, list[str]] = {"train": [], "tune": [], "test": []}
    for name, split in zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True):
        found[split].append(name)
    return found


def check_leaks(engine: Engine, trials: Sequence[Trial], tune: Sequence[Trial], cut: Cut) -> list[Check]:
    """The checks that can fail an evaluation; what they find is a sentence each."""
    return [_mutation(engine, trials, cut), _splits(engine, trials, tune), _clusters(engine)]


def _mutation(engine: Engine, trials: Sequence[Trial], cut: Cut) -> Check:
    changed = [
        trial.document
        for trial in trials[:MUTATED]
        if engine.route(mutated(engine, trial, cut).prefix) != engine.route(trial.prefix)
    ]
    seen = min(MUTATED, len(trials))
    found = f"the mix changed with the suffix of {len(changed)} of {seen} documents"
    return Check("the suffix does not route", not changed, found)


def _splits(engine: Engine, trials: Sequence[Trial], tune: Sequence[Trial]) -> Check:
    train = set(_ids_by_split(engine)["train"])
    test, tuned = {trial.document for trial in trials}, {trial.document for trial in tune}
    shared = len(test & tuned) + len(test & train) + len(tuned & train)
    found = f"{len(test)} test and {len(tuned)} tune documents; {shared} are in two splits"
    return Check("train, tune and test are disjoint", shared == 0, found)


def _clusters(engine: Engine) -> Check:
    """Means of clusters, computed anew from the train documents that the bank names as their members."""
    bank = engine.bank
    table, embeddings, means = bank.documents(), bank.embeddings(), bank.means()
    owners, splits = table["expert"].to_pylist(), table["split"].to_pylist()
    outside = sum(owner is not None and split != "train" for owner, split in zip(owners, splits, strict=True))
    furthest = 0.0
    for expert in bank.manifest.experts:
        rows = [row for row, owner in enumerate(owners) if owner == expert.id]
        mean = torch.from_numpy(np.asarray(embeddings[rows], dtype=np.float32).mean(axis=0))
        furthest = max(furthest, float((mean - means[expert.row]).abs().max()))
    found = (
        f"{outside} documents outside train are in a cluster; means of train members differ by {furthest:.1e} at most"
    )
    return Check("clusters saw train documents alone", outside == 0 and furthest < _TOLERANCE, found)
