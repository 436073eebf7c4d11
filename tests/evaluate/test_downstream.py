"""Downstream tasks from end to end on a tiny bank, and comparisons against sums written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result
from lm_eval.tasks import TaskManager

from localmoe.cli import main
from localmoe.config import LmEvalConfig
from localmoe.errors import LocalMoEError, TemporaryError, UnknownNameError, UsageError
from localmoe.evaluate.downstream import Run, compare_runs, evaluate_downstream
from localmoe.evaluate.harness import LocalMoELM, Tasks, run_tasks
from localmoe.evaluate.local_tasks import local_tasks
from localmoe.runtime.engine import Engine, open_engine

PLAIN = LmEvalConfig(batch=2)


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture(autouse=True)
def _no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks a dozen programs about the machine after every run: two seconds each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quiz of eight questions on four topics, and four answers to find likely."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [" ".join(words[:2]) for words in tiny.TOPICS.values()]
    quiz = [
        {"query": f"Question: {tiny.sentence(topic, number, 4)}", "choices": choices, "gold": gold}
        for number in range(2)
        for gold, topic in enumerate(tiny.TOPICS)
    ]
    facts = [{"context": tiny.sentence(topic, 7, 5), "answer": tiny.sentence(topic, 8, 3)} for topic in tiny.TOPICS]
    for name, records in (("quiz", quiz), ("facts", facts)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def run_of(name: str, values: dict[tuple[str, str, str], list[Any]], groups: dict[str, list[str]] | None = None) -> Run:
    numbered = {place: dict(enumerate(found)) for place, found in values.items()}
    tasks = {task for task, _, _ in values}
    better = {task: {metric: metric == "acc" for t, metric, _ in values if t == task} for task in tasks}
    prompts = {(task, n): f"{task} {n}" for (task, _, _), found in values.items() for n in range(len(found))}
    return Run(name, {"higher_is_better": better, "group_subtasks": groups or {}}, numbered, prompts)


# --- comparisons --------------------------------------------------------------------------------------------------


def test_a_comparison_knows_which_way_is_better() -> None:
    low, high = [0.0] * 20, [1.0] * 20
    for metric, verdict in (("acc", "better"), ("nll", "worse")):
        (found,) = compare_runs(
            run_of("merged", {("t", metric, "none"): high}), run_of("base", {("t", metric, "none"): low})
        )
        assert found.verdict == verdict and found.found is not None and found.found.difference == 1.0
        data = found.as_dict()
        assert (data["method_value"], data["baseline_value"], data["interval"]) == (1.0, 0.0, [1.0, 1.0])
        json.dumps(data)


def test_sums_of_log_likelihoods_are_compared_per_byte() -> None:
    place = ("t", "bits_per_byte", "none")
    ours, theirs = [(-2.0, 4), (-3.0, 10)], [(-4.0, 4), (-3.5, 10)]
    (found,) = compare_runs(run_of("merged", {place: ours}), run_of("base", {place: theirs}))
    assert found.found is not None and not found.higher_is_better
    assert found.found.method == pytest.approx(5 / 14 / math.log(2))
    assert found.found.difference == pytest.approx(-2.5 / 14 / math.log(2))


def test_a_group_counts_every_document_once() -> None:
    place = {("a", "acc", "none"): [1.0, 1.0, 1.0], ("b", "acc", "none"): [0.0], ("b", "nll", "none"): [2.0]}
    groups = {"all": ["part", "b"], "part": ["a"], "t": []}
    rows = compare_runs(run_of("merged", place, groups), run_of("base", place, groups))
    means = {(row.task, row.metric): (row.found.method, row.found.documents) for row in rows if row.found is not None}
    assert means["all", "acc"] == (0.75, 4)
    assert means["part", "acc"] == means["a", "acc"] == (1.0, 3)


def test_what_has_no_mean_is_said_not_to_be_compared() -> None:
    runs = [run_of(name, {("t", "f1", "none"): [("gold", "answer")]}) for name in ("merged", "base")]
    (found,) = compare_runs(*runs)
    assert found.verdict == "not compared" and found.as_dict()["interval"] is None


def test_runs_on_other_documents_or_contexts_are_not_compared() -> None:
    place = ("t", "acc", "none")
    with pytest.raises(LocalMoEError, match="same documents"):
        compare_runs(run_of("merged", {place: [1.0]}), run_of("base", {place: [1.0, 0.0]}))
    other = run_of("base", {place: [1.0]})
    other.prompts["t", 0] = "another context"
    with pytest.raises(LocalMoEError, match="same documents"):
        compare_runs(run_of("merged", {place: [1.0]}), other)
    assert compare_runs(run_of("merged-chat", {place: [1.0]}), other)


# --- from end to end ----------------------------------------------------------------------------------------------


def test_bank_and_base_are_asked_the_same_with_and_without_the_chat_template(engine: Engine, data: Path) -> None:
    runs, compared = evaluate_downstream(
        engine, ["quiz", "facts_nll"], LmEvalConfig(batch=2, chat_template="both"), data=data
    )
    by_name = {run.name: run for run in runs}
    assert list(by_name) == ["merged", "base", "merged-chat", "base-chat"]
    assert {(row.method, row.baseline) for row in compared} == {
        ("merged", "base"),
        ("merged-chat", "base-chat"),
        ("merged-chat", "merged"),
        ("base-chat", "base"),
    }
    assert by_name["merged"].prompts == by_name["base"].prompts != by_name["merged-chat"].prompts
    for row in compared:
        for name, value in ((row.method, row.found.method), (row.baseline, row.found.baseline)) if row.found else ():
            assert value == pytest.approx(by_name[name].results["results"][row.task][f"{row.metric},{row.filter}"])
    routed = {name: run.results["config"]["localmoe"]["routing"] for name, run in by_name.items()}
    assert routed["merged"]["mixes"] == routed["merged-chat"]["mixes"] > 1
    assert routed["merged"]["route_on"] == "question" and routed["base"]["active_max"] == 0


def test_a_bank_is_compared_with_its_trunk_too(engine: Engine, data: Path) -> None:
    config = LmEvalConfig(limit=2, compare="both")
    runs, compared = evaluate_downstream(engine, ["facts_nll"], config, data=data)
    assert [run.name for run in runs] == ["merged", "base", "trunk"]
    assert [(row.method, row.baseline) for row in compared[::2]] == [("merged", "base"), ("merged", "trunk")]


def test_the_question_chooses_the_mix_whatever_stands_before_it(engine: Engine, data: Path) -> None:
    used = []
    for fewshot in (0, 2):
        lm = LocalMoELM(engine, route_on="question")
        run_tasks(lm, Tasks(local_tasks(data, ["quiz"])), LmEvalConfig(fewshot=fewshot, limit=4))
        used.append([mix for _, mix in lm._used])
    assert used[0] == used[1]
    assert used[0][0] == engine.route(f"Question: {tiny.sentence('sea', 0, 4)}\nAnswer:")


def test_results_are_left_in_the_harness_s_own_layout(engine: Engine, data: Path, tmp_path: Path) -> None:
    _, compared = evaluate_downstream(engine, ["facts_nll"], PLAIN, data=data, output=tmp_path)
    written = json.loads((tmp_path / "comparisons.json").read_text(encoding="utf-8"))
    assert written["comparisons"] == [row.as_dict() for row in compared]
    for name in ("bank-merged", "bank-base"):
        (results,) = (tmp_path / name).glob("results_*.json")
        (samples,) = (tmp_path / name).glob("samples_facts_nll_*.jsonl")
        assert "bits_per_byte,none" in json.loads(results.read_text(encoding="utf-8"))["results"]["facts_nll"]
        assert len(samples.read_text(encoding="utf-8").splitlines()) == len(tiny.TOPICS)


def test_a_cache_answers_the_same_run_and_no_other(engine: Engine, data: Path, tmp_path: Path) -> None:
    def asked(config: LmEvalConfig) -> tuple[dict[str, Any], int]:
        (run,), _ = evaluate_downstream(engine, ["facts_nll"], config, data=data, cache=tmp_path)
        return run.results["results"], run.results["config"]["localmoe"]["routing"]["requests"]

    alone = LmEvalConfig(compare="none")
    first, again = asked(alone), asked(alone)
    assert first[0] == again[0] and (first[1], again[1]) == (len(tiny.TOPICS), 0)
    other = asked(LmEvalConfig(compare="none", route_on="context"))
    assert other[1] == len(tiny.TOPICS)
    assert len(list(tmp_path.glob("*.db"))) == 2


def test_a_task_that_nobody_knows_and_one_whose_data_is_out_of_reach(
    engine: Engine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = "task: far_away\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"
    (tmp_path / "far_away.yaml").write_text(configuration, encoding="utf-8")
    index = TaskManager.__init__

    def few(self: TaskManager, include_defaults: bool) -> None:  # the harness's 10,000 take seconds to list
        index(self, include_path=str(tmp_path), include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", few)
    with pytest.raises(UnknownNameError, match="'faraway', did you mean 'far_away'"):
        evaluate_downstream(engine, ["quiz", "faraway"], PLAIN, data=data)
    with pytest.raises(UnknownNameError, match="'quizz', did you mean 'quiz'"):
        evaluate_downstream(engine, ["quizz"], PLAIN, data=data)
    with pytest.raises(TemporaryError, match="use files"):
        evaluate_downstream(engine, ["far_away"], PLAIN)


def test_a_base_without_a_chat_template_cannot_be_asked_through_one(engine: Engine, data: Path) -> None:
    template = engine.tokenizer.chat_template
    engine.tokenizer.chat_template = None
    try:
        with pytest.raises(UsageError, match="no chat template"):
            evaluate_downstream(engine, ["quiz"], LmEvalConfig(chat_template="on"), data=data)
    finally:
        engine.tokenizer.chat_template = template


def test_more_tokens_than_the_context_holds_are_a_usage_error(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="context holds 128"):
        evaluate_downstream(engine, ["sums"], PLAIN, data=tmp_path)


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture
def verb(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, data: Path) -> Any:
    def run(*arguments: str) -> Result:
        models = ["--base", str(tiny_base), "--encoder", str(tiny_encoder), "--data", str(data)]
        return CliRunner().invoke(main, ["lm-eval", str(tiny_bank), *models, *arguments])

    return run


def test_the_verb_prints_comparisons_as_a_table_and_as_json(verb: Any) -> None:
    shown = verb("--tasks", "facts_nll", "--limit", "3")
    assert shown.exit_code == 0, shown.stderr
    assert "bits_per_byte ↓" in shown.stdout and "routed on question, 3 requests" in shown.stdout
    data = json.loads(verb("--tasks", "facts_nll", "--limit", "3", "--json").stdout)
    assert {row["metric"] for row in data["comparisons"]} == {"bits_per_byte", "nll"}
    assert all(len(row["interval"]) == 2 and row["documents"] == 3 for row in data["comparisons"])
    assert list(data["runs"]) == ["merged", "base"] and data["runs"]["base"]["documents"] == {"facts_nll": 3}


def test_the_verb_shows_values_alone_where_nothing_is_compared(verb: Any) -> None:
    shown = verb("--tasks", "quiz, facts_nll", "--compare", "none", "--beta", "0")
    assert shown.exit_code == 0
    assert "± standard error" in shown.stdout and "1.0 experts a request" in shown.stdout


@pytest.mark.parametrize("options", [["--batch", "0"], ["--route-on", "answer"], ["--limit", "0"]])
def test_an_option_out_of_range_is_a_usage_error(verb: Any, options: list[str]) -> None:
    assert verb("--tasks", "quiz", *options).exit_code == 2
