"""Local tasks: what the harness makes of files in a folder; its own processing is the oracle where it has one."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask

from localmoe.errors import CorpusError, UsageError
from localmoe.evaluate.local_tasks import TaskGroup, local_names, local_tasks

QUIZ = [
    {"query": f"Question: What is {n}?\n", "choices": ["one", "twenty-two", "three"], "gold": n % 3} for n in range(5)
]
SUMS = [{"question": f"{n} and {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(4)]


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    file = folder / name
    text = "".join(json.dumps(record) + "\n" for record in records)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def built(folder: Path, name: str, fewshot: int = 0, **changes: Any) -> Any:
    (configuration,) = local_tasks(folder, [name])
    assert isinstance(configuration, dict)
    task = ConfigurableTask(config=configuration | changes)
    task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    return task


def arguments(task: Any, document: int = 0) -> list[tuple[Any, ...]]:
    return [request.args for request in task.instances if request.doc_id == document]


@pytest.mark.parametrize(
    ("name", "record", "context", "continuations"),
    [
        (
            "quiz",
            {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
            "Question: Why?\nAnswer:",
            [" a", " b"],
        ),
        (
            "quiz",
            {"query": "They went to the", "choices": ["sea", "sky"], "gold": 0},
            "They went to the",
            [" sea", " sky"],
        ),
        (
            "quiz",
            {"query": "P.\nQuestion: is it?\n", "choices": ["no", "yes"], "gold": 0},
            "P.\nQuestion: is it?\nAnswer:",
            [" no", " yes"],
        ),
        ("quiz", {"query": "Q\nAnswer: ", "choices": ["A"], "gold": 0}, "Q\nAnswer:", [" A"]),
        ("sums_nll", {"question": "1+1?", "answer": "2\n#### 2"}, "Question: 1+1?\nAnswer:", [" 2\n#### 2"]),
        (
            "sums_nll",
            {"context": "1+1?", "chain_of_thought": "2", "answer": "2"},
            "Question: 1+1?\nAnswer:",
            [" 2\n#### 2"],
        ),
        (
            "facts_nll",
            {"context": "Question: Who?\nAnswer:", "answer": "I", "aliases": []},
            "Question: Who?\nAnswer:",
            [" I"],
        ),
        ("end", {"context": "I came and", "continuation": "saw"}, "I came and", [" saw"]),
        ("code_nll", {"prompt": "def f():\n", "canonical_solution": "  return 1"}, "def f():\n", ["  return 1"]),
        (
            "mbpp_nll",
            {"text": "Add.", "code": "a\r\nb", "test_list": ["assert 1", "assert 2"], "task_id": 11},
            "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\n"
            "assert 1\nassert 2\n[BEGIN]\n",
            ["a\nb"],
        ),
    ],
)
def test_prompts_are_the_harness_s_own(
    tmp_path: Path, name: str, record: dict[str, Any], context: str, continuations: list[str]
) -> None:
    task = built(write(tmp_path, f"{name.removesuffix('_nll')}.jsonl", [record]), name)
    assert arguments(task) == [(context, continuation) for continuation in continuations]


def test_choices_are_counted_as_the_harness_counts_them(tmp_path: Path) -> None:
    ours = built(write(tmp_path, "quiz.jsonl", QUIZ), "quiz")
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    theirs = built(tmp_path, "quiz", process_results=None, metric_list=metrics)
    for document, doc in enumerate(ours.eval_docs):
        for scores in ([-1.0, -8.0, -3.0], [-3.0, -4.0, -2.5], [-9.0, -10.0, -1.0 - document]):
            results = [(score, False) for score in scores]
            found = ours.process_results(doc, results)
            assert {name: found[name] for name in ("acc", "acc_norm")} == theirs.process_results(doc, results)
            total = sum(math.exp(score) for score in scores)
            assert sorted(found) == sorted(ours.aggregation())
            assert found["choice_nll"] == pytest.approx(-math.log(math.exp(scores[doc["gold"]]) / total))


def test_choices_in_the_context_are_asked_of_the_harness(tmp_path: Path) -> None:
    records = [{"context_options": ["Sea so sea", "Sea so sky"], "continuation": "is deep.", "gold": 1}]
    task = built(write(tmp_path, "schema.jsonl", records), "schema")
    assert arguments(task) == [("Sea so sea", " is deep."), ("Sea so sky", " is deep.")]
    assert task.process_results(records[0], [(-5.0, False), (-1.0, False)]) == {"acc": 1.0}


def test_a_reference_is_measured_in_bits_per_byte_and_nats(tmp_path: Path) -> None:
    task = built(write(tmp_path, "facts.jsonl", [{"context": "It is", "answer": "é"}]), "facts_nll")
    assert task.process_results(task.eval_docs[0], [(-3.0, True)]) == {"bits_per_byte": (-3.0, 2), "nll": 3.0}
    aggregate = task.aggregation()["bits_per_byte"]
    assert aggregate([(-3.0, 2), (-1.0, 6)]) == pytest.approx(4.0 / 8 / math.log(2))
    assert task.higher_is_better() == {"bits_per_byte": False, "nll": False}
    greedy = built(write(tmp_path, "end.jsonl", [{"context": "It is", "continuation": "x"}]), "end")
    assert greedy.process_results(greedy.eval_docs[0], [(-3.0, True)])["acc"] == 1.0


@pytest.mark.parametrize(
    ("written", "strict", "flexible"),
    [("So 6.\n#### 6", 1.0, 1.0), ("It is 6.", 0.0, 1.0), ("#### 7", 0.0, 0.0), ("none", 0.0, 0.0)],
)
def test_a_generation_is_compared_by_its_number(tmp_path: Path, written: str, strict: float, flexible: float) -> None:
    task = built(write(tmp_path, "sums.jsonl", SUMS), "sums")
    assert arguments(task, 3)[0][0] == "Question: 3 and 3?\nAnswer:"
    for request in task.instances:
        request.resps = [written]
    task.apply_filters()
    found = {
        name: task.process_results(task.eval_docs[3], [task.instances[3].filtered_resps[name]])["exact_match"]
        for name in ("strict-match", "flexible-extract")
    }
    assert found == {"strict-match": strict, "flexible-extract": flexible}


def test_examples_never_are_the_document_that_is_asked(tmp_path: Path) -> None:
    task = built(write(tmp_path, "sums.jsonl", SUMS), "sums_nll", fewshot=3)
    for document, doc in enumerate(task.eval_docs):
        ((context, _),) = arguments(task, document)
        assert context.count("Question:") == 4 and context.count(doc["question"]) == 1
        assert context.endswith(doc["question"])


def test_mbpp_is_its_test_split(tmp_path: Path) -> None:
    records = [{"text": "x", "code": f"{n}", "test_list": [], "task_id": n} for n in (10, 11, 510, 511)]
    task = built(write(tmp_path, "mbpp.jsonl", records), "mbpp_nll")
    assert [doc["answers"] for doc in task.eval_docs] == [["11"], ["510"]]


# --- MMLU ---------------------------------------------------------------------------------------------------------


def write_mmlu(folder: Path, sheets: dict[str, str]) -> Path:
    with tarfile.open(folder / "mmlu.tar.gz", "w:gz") as archive:
        for name, text in sheets.items():
            member = tarfile.TarInfo(f"mmlu/{name}.csv")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return folder


SHEETS = {
    "test/world_religions_test": 'question,choice0,choice1,choice2,choice3,answer\n"Who, then? ",a,b,c,d,2\n',
    "dev/world_religions_dev": "Why?,e,f,g,h,D\n",
    "test/anatomy_test": "Where?,i,j,k,l,A\nWhen?,m,n,o,p,B\n",
}


def test_mmlu_is_a_group_of_its_subjects_with_the_harness_s_prompt(tmp_path: Path) -> None:
    write_mmlu(tmp_path, SHEETS)
    (group,) = local_tasks(tmp_path, ["mmlu"])
    assert isinstance(group, TaskGroup)
    assert [task["task"] for task in group.tasks] == ["mmlu_anatomy", "mmlu_world_religions"]
    task = built(tmp_path, "mmlu_world_religions", fewshot=1)
    assert arguments(task)[1] == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "Why?\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\nWho, then?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        " B",
    )
    assert task.doc_to_text(task.eval_docs[0]).startswith("Who, then?")  # what it is routed on
    assert [doc["gold"] for doc in task.eval_docs] == [2]
    found = task.process_results(task.eval_docs[0], [(-1.0, False), (-2.0, False), (-0.5, False), (-9.0, False)])
    assert found["acc"] == 1.0 and sorted(found) == sorted(task.aggregation())
    assert [doc["gold"] for doc in built(tmp_path, "mmlu_anatomy").eval_docs] == [0, 1]


def test_a_subject_that_is_not_there_and_a_row_that_is_none_are_errors(tmp_path: Path) -> None:
    write_mmlu(tmp_path, SHEETS)
    with pytest.raises(CorpusError, match="no test questions on law"):
        local_tasks(tmp_path, ["mmlu_law"])
    write_mmlu(tmp_path, {"test/law_test": "Why?,a,b,c,d\n"})
    with pytest.raises(CorpusError, match=r"law_test.csv, row 1"):
        local_tasks(tmp_path, ["mmlu"])


# --- files --------------------------------------------------------------------------------------------------------


def test_a_name_is_a_file_whatever_its_underscores_and_else_the_harness_s(tmp_path: Path) -> None:
    write(tmp_path, "open_book_qa.jsonl", QUIZ)
    write(tmp_path, "Zipped.jsonl.gz", QUIZ)
    assert local_names(tmp_path) == ["Zipped", "open_book_qa"]
    found = local_tasks(tmp_path, ["openbookqa", "zipped", "hellaswag"])
    assert [task if isinstance(task, str) else task["task"] for task in found] == ["openbookqa", "zipped", "hellaswag"]
    assert isinstance(found[0], dict) and found[0]["metadata"]["file"] == "open_book_qa.jsonl"
    write(tmp_path, "openbook_qa.jsonl", QUIZ)
    with pytest.raises(UsageError, match=r"open_book_qa.jsonl or openbook_qa.jsonl"):
        local_tasks(tmp_path, ["openbookqa"])
    assert local_tasks(tmp_path, ["openbook_qa"])


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ('{"query": "a"', "x", "record 1 cannot be read"),
        ("", "x", "no records"),
        ('{"a": 1}\n{"b": 1}', "x", "record 2"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "x", "gold = 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "x_nll", "no task that is known"),
        ('{"prompt": "def", "canonical_solution": "f"}', "x", "no answers that a generation could be compared with"),
    ],
)
def test_a_file_that_is_no_task_says_what_is_wrong(tmp_path: Path, text: str, name: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        local_tasks(tmp_path, [name])


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        local_tasks(tmp_path / "nowhere", ["x"])
