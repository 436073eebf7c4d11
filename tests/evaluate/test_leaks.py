"""Leak checks: duplicates of what is trained on, a mix that reads what is scored, splits and clusters that overlap."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import localmoe
from localmoe.config import EvalConfig
from localmoe.evaluate import leaks
from localmoe.evaluate.bench import Bench
from localmoe.evaluate.leaks import check_leaks, duplicates_of_train
from localmoe.evaluate.protocol import Cut, trials_of
from localmoe.runtime.engine import Engine
from localmoe.train.work import Work


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture(scope="module")
def bench(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    cut = Cut(5, 5, 40)
    trials, tune = (tuple(trials_of(engine, split, cut)) for split in ("test", "tune"))
    work = Work(tmp_path_factory.mktemp("bench"), "key")
    return Bench(engine, EvalConfig(), cut, trials, tune, work, work, lambda *progress: None)


def test_a_router_that_reads_the_suffix_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = check_leaks(bench.engine, bench.trials, bench.tune, bench.cut)
    assert all(check.passed for check in passed)
    reading_all = tuple(replace(trial, prefix=trial.whole) for trial in bench.trials)
    monkeypatch.setattr(leaks, "mutated", lambda engine, trial, cut: replace(trial, prefix=trial.whole[::-1]))
    assert not check_leaks(bench.engine, reading_all, bench.tune, bench.cut)[0].passed


def test_a_prefix_that_reaches_into_what_is_scored_is_found_out(bench: Bench) -> None:
    longer = replace(bench.cut, query=bench.cut.prefix + 2)
    reaching = tuple(trials_of(bench.engine, "test", longer))
    assert not check_leaks(bench.engine, reaching, bench.tune, bench.cut)[0].passed


def test_a_tune_document_that_stands_in_test_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    table, texts = engine.bank.documents(), engine.bank.texts
    pairs = list(zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True))
    ids = {split: [name for name, where in pairs if where == split] for split in ("tune", "test")}
    twin, model = ids["tune"][0], ids["test"][0]
    before, _ = duplicates_of_train(engine, 0.7, 40)
    monkeypatch.setattr(engine.bank, "texts", lambda names: texts([model if name == twin else name for name in names]))
    after, note = duplicates_of_train(engine, 0.7, 40)
    assert after - before == {twin} and "1 of tune that stand in test" in note


def test_a_document_in_two_splits_is_found_out(bench: Bench) -> None:
    assert not check_leaks(bench.engine, bench.trials, bench.trials, bench.cut)[1].passed


def test_a_single_held_out_document_in_a_cluster_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    means, embeddings = bench.engine.bank.means(), bench.engine.bank.embeddings()
    counts = bench.engine.bank.documents()["expert"].to_pylist()
    for row, expert in enumerate(bench.engine.bank.manifest.experts):
        size = counts.count(expert.id)
        leaked = means.clone()
        leaked[row] += (torch.from_numpy(embeddings[0].astype("float32")) - leaked[row]) / (size + 1)
        monkeypatch.setattr(bench.engine.bank, "means", lambda leaked=leaked: leaked)
        owned = counts[0] == expert.id
        assert owned or not check_leaks(bench.engine, bench.trials, bench.tune, bench.cut)[2].passed


def test_means_of_other_documents_are_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    means = bench.engine.bank.means()
    monkeypatch.setattr(bench.engine.bank, "means", lambda: means.roll(1, 0))
    assert not check_leaks(bench.engine, bench.trials, bench.tune, bench.cut)[2].passed


def test_documents_that_begin_alike_are_left_out_where_only_beginnings_are_read(
    tmp_path: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    licence = tiny.sentence("law", 99, words=30)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(24):
        head = licence if number % 2 else tiny.sentence("sea", number, words=30)
        (corpus / f"{number:02d}.txt").write_text(f"{head} {tiny.sentence('sky', number, words=90)}")
    config = tiny.tiny_config(tiny_base, tiny_encoder)
    settings = replace(config.corpus, passage_tokens=24, passages_per_document=1, test_fraction=0.3)
    bank = localmoe.build(corpus, tmp_path / "bank", replace(config, corpus=settings)).path
    engine = localmoe.open(bank, str(tiny_base), str(tiny_encoder))
    table = engine.bank.documents()
    held_out = [
        name
        for name, split in zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True)
        if split in ("test", "tune")
    ]
    alike = {name for name, text in zip(held_out, engine.bank.texts(held_out), strict=True) if text.startswith(licence)}
    without, note = duplicates_of_train(engine, 0.7, 24)
    assert 0 < len(alike) < len(held_out)
    assert without == alike and "that begin alike" in note
