"""Leak checks: what would make an evaluation worth nothing, looked for before the first method runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from localmoe.evaluate.duplicates import exact_duplicates, near_duplicates
from localmoe.evaluate.protocol import Cut, Trial, document_in, mutated, query_tokens
from localmoe.evaluate.results import Check
from localmoe.runtime.engine import Engine
from localmoe.train.passages import tokenize

MUTATED = 32
"""Documents whose suffix is changed to see whether the mix changes."""

_CUT = "\ufffd"  # what is decoded of a character whose bytes were cut
_ROUNDING = 2.0**-11  # relative, of the embeddings, which lie in fp16 in the bank; means were taken before that


def duplicates_of_train(engine: Engine, threshold: float, length: int) -> tuple[frozenset[str], str]:
    """Ids of test and tune documents that stand, exactly or nearly, among the train documents too, and a sentence.

    Compared are whole texts, and what is seen of them: the first `length` tokens of a held-out document with every
    passage that was trained on, since files that differ may begin alike. Tune documents that stand among those of test
    are left out as well: they choose rates and β.
    """
    ids = _ids_by_split(engine)
    texts = {split: engine.bank.texts(names) for split, names in ids.items()}
    held_out, both = [*ids["test"], *ids["tune"]], [*texts["test"], *texts["tune"]]
    exact = {held_out[pair.place] for pair in exact_duplicates(both, texts["train"])}
    near = {held_out[pair.place] for pair in near_duplicates(both, texts["train"], threshold)} - exact
    seen = _beginnings(engine, held_out, length)
    again = {ids["tune"][pair.place] for pair in near_duplicates(texts["tune"], texts["test"], threshold)}
    begin = set()
    if seen is not None:
        pairs = near_duplicates(seen, _passages(engine, ids["train"]), threshold)
        begin = {held_out[pair.place] for pair in pairs} - exact - near
        tests = len(ids["test"])
        again |= {ids["tune"][pair.place] for pair in near_duplicates(seen[tests:], seen[:tests], threshold)}
    counts = [
        f"{len(exact & own)} exact and {len(near & own)} near ones of {split}, and {len(begin & own)} that begin alike"
        for split, own in ((split, set(ids[split])) for split in ("test", "tune"))
    ]
    left_out = exact | near | begin
    found = f"duplicates of train documents that are left out: {'; '.join(counts)}"
    return frozenset(left_out | again), f"{found}; {len(again - left_out)} of tune that stand in test"


def _beginnings(engine: Engine, ids: Sequence[str], length: int) -> list[str] | None:
    """What an evaluation sees of these documents, of a conversation all; None where whole texts were trained on too."""
    corpus = engine.bank.manifest.settings().corpus
    found, cut, longest = [], corpus.passages_per_document is not None, min(length, corpus.passage_tokens)
    for text, messages in engine.bank.contents(ids):
        tokens = [] if messages else engine.tokenizer(text, verbose=False)["input_ids"]
        cut = cut or len(tokens) > longest
        found.append(engine.tokenizer.decode(tokens[:length], skip_special_tokens=True) if tokens else text)
    return found if cut else None


def _passages(engine: Engine, ids: Sequence[str]) -> Iterator[str]:
    """Texts of the passages that train documents were cut into; a conversation is one."""
    corpus = engine.bank.manifest.settings().corpus
    for name, content in zip(ids, engine.bank.contents(ids), strict=True):
        document = document_in(name, *content)
        if document.messages:
            yield document.content
            continue
        for passage in tokenize(document, engine.tokenizer, corpus).passages:
            yield engine.tokenizer.decode(passage.tokens, skip_special_tokens=True)


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
    """The mix, and the tokens that choose it, are the same whatever is scored; of a text they lie before it."""
    changed = reaching = 0
    for trial in trials[:MUTATED]:
        other = mutated(engine, trial, cut)
        same = torch.equal(query_tokens(other, cut), query_tokens(trial, cut))
        changed += not same or engine.route(other.prefix) != engine.route(trial.prefix)
        free = trial.passage.tokens[~trial.passage.labels]
        before = engine.tokenizer.decode(free, skip_special_tokens=True)
        reaching += not trial.messages and not _spaceless(before).startswith(_spaceless(trial.prefix.rstrip(_CUT)))
    seen = min(MUTATED, len(trials))
    found = f"the mix changed with the suffix of {changed} of {seen} documents, and {reaching} prefixes reach into it"
    return Check("the suffix does not route", changed + reaching == 0, found)


def _spaceless(text: str) -> str:
    return "".join(text.split())


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
        members = np.asarray(embeddings[rows], dtype=np.float32)
        away = float((torch.from_numpy(members.mean(axis=0)) - means[expert.row]).abs().max())
        # errors of members are independent: four of their standard deviations' bounds, and all of it for few members
        allowed = _ROUNDING * float(np.abs(members).max()) * min(1.0, 4 / len(rows) ** 0.5) + 1e-6
        furthest = max(furthest, away / allowed)
    found = (
        f"{outside} documents outside train are in a cluster; means of train members differ by {furthest:.2f} of what "
        "rounding may do, at most"
    )
    return Check("clusters saw train documents alone", outside == 0 and furthest <= 1, found)
