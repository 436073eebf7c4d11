"""An evaluation of a tiny bank: what each method scores, what is compared, what fails it, and that it resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import localmoe
from localmoe.config import EvalConfig, FineTuneConfig, SearchConfig, TTTConfig
from localmoe.errors import ConfigError, UnknownNameError
from localmoe.evaluate import baselines, evaluation, leaks
from localmoe.evaluate.baselines import fine_tuned_adapter, nearest_documents
from localmoe.evaluate.bench import Bench, NotPossibleError, methods
from localmoe.evaluate.evaluation import LeakError, evaluate
from localmoe.evaluate.gaps import GAPS, closed_gap
from localmoe.evaluate.merged import by_router, ensemble_nll, exchanged
from localmoe.evaluate.protocol import Cut, Trial, score_alone, trials_of
from localmoe.evaluate.results import Results, read_results
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.evaluate.ttt import train_and_score
from localmoe.lora import LowRankLinear
from localmoe.models import target_linears
from localmoe.routing import Mix, mean_similarities, similarities
from localmoe.runtime.engine import Engine
from localmoe.train.course import DivergedError
from localmoe.train.places import Places
from localmoe.train.rates import WIDENED
from localmoe.train.work import Work

CONFIG = EvalConfig(
    methods=tuple(sorted(methods)),
    prefix=5,
    length=40,
    timed=1,
    ttt=TTTConfig(documents=2, neighbours=3),
    fine_tune=FineTuneConfig(rates=(1.0, 2.0), full_rates=(1e-3, 3e-3), tune_tokens=200),
)
RANK = 4  # of `tiny.tiny_config`
RATE = TTTConfig().rate


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(engine: Engine, folder: Path) -> Results:
    return evaluate(engine, folder, CONFIG, lambda *progress: None, command="localmoe eval tiny")


@pytest.fixture(scope="module")
def bench(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    cut = Cut(5, 5, 40)
    trials, tune = (tuple(trials_of(engine, split, cut)) for split in ("test", "tune"))
    work = Work(tmp_path_factory.mktemp("bench"), "key")
    return Bench(engine, CONFIG, cut, trials, tune, work, work, lambda *progress: None)


def test_every_method_is_scored_on_the_same_documents_and_tokens(results: Results) -> None:
    assert {method.name for method in results.methods} == set(methods)
    for method in results.methods:
        count = 2 if method.name.startswith("ttt") else len(results.documents)
        assert method.documents == tuple(range(count))
        assert all(math.isfinite(nll) and nll > 0 for nll in method.nll)
        tokens = sum(results.tokens[:count])
        assert method.perplexity == pytest.approx(math.exp(sum(method.nll) / tokens))
        assert method.bits_per_byte == pytest.approx(sum(method.nll) / math.log(2) / sum(results.bytes[:count]))


def test_what_is_written_is_read_again(results: Results, folder: Path) -> None:
    assert read_results(folder) == results


def test_results_tell_how_full_an_adapter_gets_and_how_unlike_documents_are(results: Results, engine: Engine) -> None:
    linears = target_linears(engine.model).values()
    rank = engine.bank.manifest.settings().train.rank
    parameters = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    assert results.corpus["tokens_per_parameter"] == results.corpus["split_tokens"]["train"] / parameters
    assert 0.3 < results.corpus["explained"] < 1  # four topics without a common word


def test_every_comparison_is_the_paired_bootstrap_of_its_two_methods(results: Results) -> None:
    nll = {method.name: dict(zip(method.documents, method.nll, strict=True)) for method in results.methods}
    assert {(row.method, row.baseline) for row in results.comparisons} >= {("merged", "fine-tuned"), ("ttt", "trunk")}
    for row in results.comparisons:
        both = sorted(nll[row.method].keys() & nll[row.baseline].keys())
        tokens = [results.tokens[place] for place in both]
        ours, theirs = ([nll[name][place] for place in both] for name in (row.method, row.baseline))
        found = compare(ours, theirs, tokens, CONFIG.seed)
        assert (row.gain, row.interval, row.documents) == (found.gain, (found.low, found.high), len(both))
        assert row.verdict and row.default == (row.method == "merged")


def test_the_fine_tuned_baseline_saw_as_many_tokens_as_trunk_and_experts_and_a_batch_at_most(
    results: Results, engine: Engine
) -> None:
    told = sum(record.training.tokens for record in engine.bank.manifest.adapters if record.training is not None)
    tuned, merged = results.method("fine-tuned"), results.method("merged")
    assert tuned is not None and merged is not None
    assert merged.training_tokens == told
    build = engine.bank.manifest.config
    batch = build["train"]["batch"] * build["corpus"]["passage_tokens"]
    assert told <= tuned.training_tokens < told + batch
    tried = tuned.detail["tried"]
    best = min(tried, key=lambda one: one["perplexity"])
    assert f"rate {best['rate']:g}" in tuned.note
    bank = build["train"]["batch"]
    found = 0.0
    for batch, asked in ((bank, 3), *((other, 2) for other in (1, 4) if other != bank)):
        rates = {one["rate"]: one["perplexity"] for one in tried if (one["batch"], one["rank"]) == (batch, RANK)}
        assert batch == bank or {found, found / 2} <= rates.keys()
        found_here = min(rates, key=rates.__getitem__)
        found = found_here if batch == bank else found
        assert len(rates) == asked + WIDENED or min(rates) < found_here < max(rates)  # a best one at the edge widens it


def test_the_baselines_rank_is_doubled_as_long_as_that_is_better_or_else_halved(results: Results) -> None:
    tuned = results.method("fine-tuned")
    assert tuned is not None
    tried, least = tuned.detail["tried"], {}
    for one in tried:
        least[one["rank"]] = min(one["perplexity"], least.get(one["rank"], math.inf))
    up = [rank for rank in least if rank > RANK]
    down = [rank for rank in least if rank < RANK]
    assert list(least) == [RANK, *up, *down] and up
    assert up == [RANK * 2**power for power in range(1, len(up) + 1)]
    assert down == [RANK // 2**power for power in range(1, len(down) + 1)]
    assert (least[2 * RANK] < least[RANK]) != bool(down)
    for ranks, most in ((up, baselines.DOUBLED), (down, min(baselines.DOUBLED, int(math.log2(RANK))))):
        losses = [least[RANK], *(least[rank] for rank in ranks)]
        assert losses[:-1] == sorted(losses[:-1], reverse=True)
        assert not ranks or len(ranks) == most or losses[-1] >= losses[-2]
    first = min((one for one in tried if one["rank"] == RANK), key=lambda one: one["perplexity"])
    for rank, factor in ((2 * RANK, 0.5), (RANK // 2, 2.0)):
        rates = {one["rate"] for one in tried if (one["rank"], one["batch"]) == (rank, first["batch"])}
        assert not rates or rates >= {first["rate"], first["rate"] * factor}


@pytest.mark.parametrize(
    ("best", "tried"), [(RANK, [8, 2]), (1, [8, 2, 1]), (2, [8, 2, 1]), (16, [8, 16, 32]), (512, [8, 16, 32])]
)
def test_ranks_are_climbed_towards_the_best_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, best: int, tried: list[int]
) -> None:
    def measured(
        _bench: Bench, _passages: object, setting: baselines.Setting, tokens: int
    ) -> baselines.Tried:  # every rank's best rate times its rank is the same
        distance = abs(math.log2(setting.rank / best)), abs(math.log2(setting.rate * setting.rank / (1e-2 * RANK)))
        return baselines.Tried(setting, tokens, 10 + distance[0] + 0.1 * distance[1], 0.0)

    monkeypatch.setattr(baselines, "_try", measured)
    found = baselines._tune(bench, [], 100)
    assert list(dict.fromkeys(one.setting.rank for one in found if one.setting.rank != RANK)) == tried
    for rank in tried:
        rates = [one.setting.rate for one in found if one.setting.rank == rank]
        assert min(abs(rate * rank / (1e-2 * RANK) - 1) for rate in rates) < 1e-9


def test_another_bank_of_the_same_text_has_the_same_baseline(
    tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    config, cut, keys = tiny.tiny_config(tiny_base, tiny_encoder, recipe="joint"), Cut(5, 5, 40), {}
    banks = {
        "own": config,
        "experts": replace(config, cluster=replace(config.cluster, clusters=3)),
        "rank": replace(config, train=replace(config.train, rank=2)),
    }
    for name, settings in banks.items():
        bank = localmoe.build(tiny_corpus, tmp_path / name, settings).path
        engine = localmoe.open(bank, str(tiny_base), str(tiny_encoder))
        keys[name] = evaluation._training_key(engine, CONFIG, cut, trials_of(engine, "tune", cut))
    assert keys["experts"] == keys["own"] != keys["rank"]


def test_results_that_a_leak_makes_void_are_set_aside(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(evaluation, "check_leaks", lambda *given: [leaks.Check("a check", False, "2 leaked")])
    with pytest.raises(LeakError) as error:
        evaluate(engine, tmp_path, CONFIG, lambda *progress: None)
    assert "results-before-the-leak.json" in str(error.value.remedy)
    assert [file.name for file in tmp_path.glob("*.json")] == ["results-before-the-leak.json"]


def test_the_time_of_an_evaluation_counts_a_training_of_an_earlier_run(bench: Bench, tmp_path: Path) -> None:
    own = replace(bench, work=Work(tmp_path, "scores"), training=Work(tmp_path, "training"))
    for name, wall in (("merged", 5.0), ("fine-tuned", 2.0)):
        own.work.write_json(f"scores-{name}.json", {"wall": wall})
    assert evaluation._seconds(own, 1.0) == 7.0
    own.training.write_json("fine-tuned.json", {"seconds": 100.0})
    assert evaluation._seconds(own, 1.0) == 105.0


def test_one_expert_active_is_the_nearest_router(results: Results) -> None:
    nearest, one = results.method("nearest"), results.method("merged-1")
    assert nearest is not None and one is not None
    assert one.nll == pytest.approx(nearest.nll) and one.active_max == 1


def test_members_finds_a_beta_of_its_own_for_the_number_of_experts_that_the_bank_wants(
    results: Results, bench: Bench
) -> None:
    members, own = results.method("members"), bench.engine.config
    assert members is not None and own.router == "sparse_softmax"
    scores = mean_similarities(bench.tune_queries, bench.engine.router.centroids)

    def active(beta: float) -> float:
        return float((torch.softmax(scores / beta, 1) > own.tau).sum(1).double().mean())

    assert active(members.detail["beta"]) <= own.active < active(members.detail["beta"] * 1.05)
    weights = torch.softmax(
        mean_similarities(bench.queries, bench.engine.router.centroids) / members.detail["beta"], 1
    ).sub(own.tau)
    best = weights.relu() / weights.relu().sum(1, keepdim=True)
    for row, (names, given) in zip(best, members.detail["mixes"], strict=True):
        known = dict(zip(bench.engine.router.centroids.experts, row.tolist(), strict=True))
        assert {name: weight for name, weight in known.items() if weight > 0} == pytest.approx(
            dict(zip(names, given, strict=True)), abs=1e-6
        )


def test_sift_weighs_the_nearest_experts_as_many_as_the_bank_wants(results: Results, bench: Bench) -> None:
    sift, centroids = results.method("sift"), bench.engine.router.centroids
    assert sift is not None and bench.engine.config.active == 2
    near = similarities(bench.queries, centroids)
    vectors, noise = centroids.vectors.double(), bench.engine.config.sift_lambda
    for row, (names, weights) in zip(near, sift.detail["mixes"], strict=True):
        chosen = row.argsort(descending=True)[:2].tolist()
        variance = [1.0]
        for count in (1, 2):
            k, phi = row[chosen[:count]], vectors[chosen[:count]]
            variance.append(float(1 - k @ torch.linalg.inv(phi @ phi.T + noise * torch.eye(count)) @ k))
        drops = [variance[0] - variance[1], variance[1] - variance[2]]
        expected = {centroids.experts[k]: drop / sum(drops) for k, drop in zip(chosen, drops, strict=True)}
        assert dict(zip(names, weights, strict=True)) == pytest.approx(expected, abs=1e-6)


def test_a_router_that_the_bank_ships_keeps_its_beta(engine: Engine, bench: Bench) -> None:
    shipped = replace(engine.config, router="members", beta=0.123)
    other = Engine(engine.bank, engine.model, engine.tokenizer, engine.encoder, shipped)
    assert by_router(replace(bench, engine=other), "members") == shipped
    assert by_router(replace(bench, engine=other), "sift") == replace(shipped, router="sift")


def test_an_ensemble_mixes_probabilities_not_logits(bench: Bench) -> None:
    trial, engine = bench.trials[0], bench.engine
    names = engine.router.centroids.experts[:3]
    mix = Mix(tuple(names), (0.5, 0.3, 0.2), "linear", engine.bank.manifest.digest, None)
    total = torch.zeros(len(trial.passage) - 5, dtype=torch.float64)
    for name, weight in zip(mix.experts, mix.weights, strict=True):
        alone = replace(mix, experts=(name,), weights=(1.0,))
        ids = trial.passage.tokens[None]
        with engine.merged(alone), torch.no_grad():
            log = engine.model(input_ids=ids).logits[0].double().log_softmax(-1)
        total += weight * log[4:-1].gather(1, ids[0, 5:, None])[:, 0].exp()
    assert ensemble_nll(bench, trial, mix).tolist() == pytest.approx((-total.log()).tolist(), rel=1e-4)


def test_the_null_control_exchanges_every_expert_and_keeps_the_weights(results: Results) -> None:
    null, merged = results.method("null"), results.method("merged")
    assert null is not None and merged is not None
    for (ours, weights), (theirs, kept) in zip(null.detail["mixes"], merged.detail["mixes"], strict=True):
        assert ours != theirs or len(ours) > 1
        assert sorted(weights) == sorted(kept)
    other = {"a": "b", "b": "c", "c": "a"}
    mix = Mix(("a", "c"), (0.75, 0.25), "linear", "", None)
    assert exchanged(mix, other) == Mix(("a", "b"), (0.25, 0.75), "linear", "", None)


def test_test_time_training_is_adamw_on_one_passage_after_the_other_and_leaves_no_trace(bench: Bench) -> None:
    engine = bench.engine
    trunk = engine.bank.trunk()
    assert trunk is not None
    before = tiny.checksum(engine.model)
    kept = {name: (update.A.clone(), update.B.clone()) for name, update in trunk.items()}
    passages = bench.train_passages(nearest_documents(bench, bench.trials[0], 3), most=1)
    untrained, _ = train_and_score(bench, [], trunk, bench.trials[0].passage, RATE)
    trained, seconds = train_and_score(bench, passages, trunk, bench.trials[0].passage, RATE)
    alone = replace(Mix((), (), "linear", "", None))
    assert untrained != pytest.approx(float(engine.token_nll(bench.trials[0].passage, alone).sum()))  # it is the trunk
    assert trained != untrained and seconds > 0
    again, _ = train_and_score(bench, passages, trunk, bench.trials[0].passage, RATE)
    assert again == trained  # the optimiser and the factors were new
    room = Places(engine.model, trunk, 1)
    there, _ = train_and_score(bench, passages, trunk, bench.trials[0].passage, RATE, room)
    assert there == pytest.approx(trained, abs=5e-2 * abs(trained - untrained))  # as on a GPU; factors rounded to bf16
    assert tiny.checksum(engine.model) == before
    assert all(torch.equal(update.A, kept[n][0]) and torch.equal(update.B, kept[n][1]) for n, update in trunk.items())


def test_the_rate_of_test_time_training_is_the_best_on_tune_documents(bench: Bench, tmp_path: Path) -> None:
    asked = TTTConfig(documents=1, neighbours=3, rate=1e-3, rates=(1.0, 4.0), tune_documents=2)
    own = replace(bench, config=replace(CONFIG, ttt=asked), work=Work(tmp_path, "key"))
    trunk = bench.engine.bank.trunk()
    assert trunk is not None

    def taught(trial: Trial, rate: float) -> float:
        passages = own.train_passages(nearest_documents(own, trial, 3), most=1)
        return train_and_score(own, passages, trunk, trial.passage, rate)[0]

    scores = methods["ttt-trunk"](own)
    tokens = sum(trial.passage.predicted for trial in own.tune[:2])
    tried = {one["rate"]: one["nll"] for one in scores.detail["tried"]}
    assert {1e-3, 4e-3} < set(tried)
    for rate, nll in tried.items():
        assert nll == pytest.approx(sum(taught(trial, rate) for trial in own.tune[:2]) / tokens)
    best = min(tried, key=tried.__getitem__)
    assert min(tried) < best < max(tried) or len(tried) == 2 + WIDENED
    assert scores.nll == pytest.approx([taught(own.trials[0], best)])
    assert f"at {best:g}, the best of {len(tried)} on 2 tune documents" in scores.note
    alone = methods["ttt-trunk"](replace(own, config=CONFIG, work=Work(tmp_path, "other")))
    assert f"at {RATE:g}, not tuned" in alone.note and alone.detail["tried"] == []


def test_neighbours_are_train_documents_by_similarity_without_twins_of_the_trial(bench: Bench) -> None:
    bank = bench.engine.bank
    table = bank.documents().to_pylist()
    train = {row["id"] for row in table if row["split"] == "train"}
    found = nearest_documents(bench, bench.trials[0], 5)
    assert len(found) == 5 and set(found) <= train
    vector = bench.engine.encoder.encode([bench.trials[0].prefix])[0]
    similarity = {
        row["id"]: float(e @ vector) for row, e in zip(table, bank.embeddings().astype("float32"), strict=True)
    }
    assert found == sorted(train, key=lambda name: -similarity[name])[:5]
    twin = replace(bench.trials[0], whole=bank.texts([found[0]])[0])
    assert nearest_documents(bench, twin, 5)[:4] == found[1:]


def test_the_baseline_is_trained_once_and_read_afterwards(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, found = fine_tuned_adapter(bench)
    monkeypatch.setattr("localmoe.evaluate.baselines.train", None)
    again, same = fine_tuned_adapter(bench)
    assert same == found
    assert all(torch.equal(adapter[name].B, again[name].B) for name in adapter)


def test_other_documents_train_no_other_baseline(
    engine: Engine, folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.evaluate.baselines.train", None)
    fewer = evaluate(engine, folder, replace(CONFIG, methods=("fine-tuned",), documents=2), lambda *progress: None)
    tuned, before = fewer.method("fine-tuned"), results.method("fine-tuned")
    assert tuned is not None and before is not None
    assert tuned.nll == pytest.approx(before.nll[:2], rel=1e-4) and tuned.note == before.note


def test_the_same_call_again_runs_no_method_and_more_can_be_added(
    engine: Engine, folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_given: object) -> None:
        raise AssertionError("what was finished ran again")

    for name in methods:
        monkeypatch.setitem(methods._functions, name, never)
    monkeypatch.setattr(evaluation, "duplicates_of_train", never)
    fewer = evaluate(engine, folder, replace(CONFIG, methods=("base", "merged")), lambda *progress: None)
    assert [method.nll for method in fewer.methods] == [
        method.nll for method in results.methods if method.name in ("base", "merged")
    ]
    assert fewer.checks[0] == results.checks[0]


def test_the_base_is_checked_by_itself_whatever_comes_first(
    engine: Engine, folder: Path, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def check(model: torch.nn.Module) -> None:
        seen.append(not any(isinstance(module, LowRankLinear) for module in model.modules()))

    monkeypatch.setattr("localmoe.models.check_packing", check)
    monkeypatch.setattr("localmoe.runtime.engine.check_packing", check)
    shutil.copytree(folder / "experts", tmp_path / "experts")
    for file in folder.glob("work/*/fine-tuned.json"):
        (tmp_path / "work" / file.parent.name).mkdir(parents=True)
        shutil.copy(file, tmp_path / "work" / file.parent.name)
    evaluate(engine, tmp_path, replace(CONFIG, methods=("fine-tuned",)), lambda *progress: None)
    assert seen[0]
    seen.clear()
    engine.score("the sea", "and the sky", Mix((), (), "linear", "", None))
    assert seen[0]


def test_a_leak_fails_the_evaluation(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "check_leaks", lambda *given: [leaks.Check("a check", False, "2 leaked")])
    with pytest.raises(LeakError, match="2 leaked"):
        evaluate(engine, tmp_path, CONFIG, lambda *progress: None)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prefix": 40}, "leaves nothing"),
        ({"query_prefix": 6}, "count in the loss"),
    ],
)
def test_a_cut_that_cannot_be_is_an_error(engine: Engine, tmp_path: Path, changes: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        evaluate(engine, tmp_path, replace(CONFIG, **changes), lambda *progress: None)


def test_an_unknown_method_is_an_error_before_anything_runs(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'merged'"):
        evaluate(engine, tmp_path, replace(CONFIG, methods=("base", "merge")), lambda *progress: None)
    assert not list(tmp_path.iterdir())


def test_what_a_bank_cannot_do_is_left_out_and_said(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(_bench: Bench) -> None:
        raise NotPossibleError("the bank has no trunk")

    monkeypatch.setitem(methods._functions, "trunk", impossible)
    found = evaluate(engine, tmp_path, replace(CONFIG, methods=("base", "trunk")), lambda *progress: None)
    assert [method.name for method in found.methods] == ["base"]
    assert found.checks[-1].name == "trunk was left out" and found.checks[-1].found == "the bank has no trunk"


def test_documents_are_limited_by_expert_and_in_all(engine: Engine, tmp_path: Path) -> None:
    few: Callable[..., Results] = lambda **changes: evaluate(  # noqa: E731
        engine, tmp_path, replace(CONFIG, methods=("base",), **changes), lambda *progress: None
    )
    assert len(few(documents=2).documents) == 2
    each = few(per_expert=1).experts
    assert len(each) == len(set(each))


def test_the_shipped_default_says_which_share_of_the_gap_it_closes(results: Results) -> None:
    merged = results.method("merged")
    assert merged is not None and merged.detail["gap"] == closed_gap(results, "merged", *GAPS["gap"])
    assert all("gap" not in method.detail for method in results.methods if not method.default)


def test_settings_that_diverge_are_infinitely_bad_and_all_of_them_leave_the_baseline_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = replace(bench, training=Work(tmp_path, "key"))
    for total in (1e6, math.nan):  # exp of it overflows; it is no number
        monkeypatch.setattr(baselines, "score_alone", lambda *_, total=total: [total] * len(apart.tune))
        with pytest.raises(NotPossibleError, match="diverged at every rate"):
            baselines.fine_tuned(replace(apart, training=Work(tmp_path, str(total))))


def test_a_setting_that_diverges_at_full_length_makes_way_for_the_next_best(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = baselines._train, []

    def train(given: Bench, passages: Any, setting: Any, tokens: int, title: str) -> Any:
        if title == "fine-tuned":
            full.append(setting)
            if len(full) == 1:
                raise DivergedError("the loss became nan")
        return real(given, passages, setting, tokens, title)

    monkeypatch.setattr(baselines, "_train", train)
    _, found = baselines.fine_tuned_adapter(replace(bench, training=Work(tmp_path, "key")))
    order = sorted(found.tried, key=lambda trial: trial.perplexity)
    assert full == [trial.setting for trial in order[:2]]
    assert found.setting == full[1] and found.adapter.training is not None and found.adapter.training.attempts == 2


def test_finalists_of_falling_rates_are_trained_in_full_and_tune_documents_choose(bench: Bench, tmp_path: Path) -> None:
    asked = replace(CONFIG, fine_tune=replace(CONFIG.fine_tune, finalists=2))
    own = replace(bench, config=asked, training=Work(tmp_path, "key"))
    scores = baselines.fine_tuned(own)
    adapter, found = fine_tuned_adapter(own)
    *trials, first, second = found.tried
    by_promise = sorted(trials, key=lambda trial: trial.perplexity)
    lower = [trial for trial in by_promise if trial.setting.rate < by_promise[0].setting.rate]
    assert (first.setting, second.setting) == (by_promise[0].setting, lower[0].setting)
    assert first.tokens >= bench.bank_tokens and second.tokens >= bench.bank_tokens
    best = min(first, second, key=lambda trial: trial.perplexity)
    assert found.setting == best.setting and found.tokens == best.tokens
    nll = score_alone(bench.engine, bench.tune, adapter, lambda _done: None)
    assert perplexity(nll, [trial.passage.predicted for trial in bench.tune]) == pytest.approx(best.perplexity)
    assert f"{best.setting.text}, of {len(trials)} settings tried" in scores.note and "2 of them in full" in scores.note
    assert found.seconds >= sum(trial.seconds for trial in found.tried)


def test_without_a_trunk_the_baseline_starts_from_the_rate_that_was_found_for_the_experts(
    tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path, bench: Bench, tmp_path: Path
) -> None:
    config = tiny.tiny_config(tiny_base, tiny_encoder)
    paper = replace(config, train=replace(config.train, recipe="paper"), search=SearchConfig((0.01, 0.02, 0.04), 300))
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", paper)
    rates = {one.training.learning_rate for one in bank.manifest.adapters if one.training is not None}
    assert rates != {config.train.learning_rate}
    engine = localmoe.open(bank.path, str(tiny_base), str(tiny_encoder))
    assert replace(bench, engine=engine).learning_rate == max(rates)


def test_a_bank_without_public_documents_is_evaluated_without_what_is_trained_on_them(
    tiny_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": f"{n}", "text": tiny.sentence("sea", n, words=30), "who": "hr"}) for n in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = tiny.tiny_config(tiny_base, tiny_encoder)
    corpus = replace(config.corpus, access_field="who")
    bank = localmoe.build(tmp_path / "all.jsonl", tmp_path / "bank", replace(config, corpus=corpus))
    engine = localmoe.open(bank.path, str(tiny_base), str(tiny_encoder))
    found = evaluate(engine, tmp_path / "eval", CONFIG, lambda *progress: None)
    assert "merged" in {method.name for method in found.methods}
    left_out = {check.name.split()[0] for check in found.checks if "left out" in check.name}
    assert left_out >= {"fine-tuned", "fine-tuned-full", "ttt", "ttt-trunk", "trunk", "context"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_is_evaluated(
    kind: str, tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    engine = localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder), quantised=kind)
    config = replace(
        CONFIG, methods=("base", "trunk", "merged", "fine-tuned", "fine-tuned-full", "ttt-trunk", "ttt-fine-tuned")
    )
    found = evaluate(engine, tmp_path, config, lambda *progress: None)
    assert {method.name for method in found.methods} == {
        "base",
        "trunk",
        "merged",
        "fine-tuned",
        "ttt-trunk",
        "ttt-fine-tuned",
    }
    assert found.checks[-1].name == "fine-tuned-full was left out"
