"""Local tasks: configurations of lm-evaluation-harness for files in a folder, so that no hub is needed.

Records are those of the ICL sets of llm-foundry ({query, choices, gold}, {context, answer}, ...), GSM8K, HumanEval and
MBPP as JSONL, and MMLU as an archive of CSV files. Prompts are the harness's own where it has the task.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import CorpusError, UsageError

Task = dict[str, Any]
Record = dict[str, Any]

LIKELIHOOD = "_nll"
"""NAME_nll: how likely the reference answers of NAME are."""

_MBPP_TEST = range(11, 511)  # the authors' split; the others are examples, tune and train
_MOST_TOKENS = 256  # of a generated answer
_LETTERS = ["A", "B", "C", "D"]
_UP = {"aggregation": "mean", "higher_is_better": True}
_DOWN = {"aggregation": "mean", "higher_is_better": False}
_ACCURACY = {"metric": "acc"} | _UP


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are also reported together, every document counting once."""

    name: str
    tasks: list[Task]


def local_tasks(folder: Path, names: Sequence[str]) -> list[Task | TaskGroup | str]:
    """A configuration for every name that the folder has a file for; other names are left to the harness.

    Raises CorpusError for a file that cannot be read as what it seems to be, UsageError for a name that fits two files.
    """
    return [_local(folder, name) for name in names]


def local_names(folder: Path) -> list[str]:
    """Names that `local_tasks` knows, without the subjects of MMLU."""
    names = [_stem(file) for file in _files(folder)]
    return sorted({*names, *(["mmlu"] if _mmlu(folder) is not None else [])})


def _local(folder: Path, name: str) -> Task | TaskGroup | str:
    archive = _mmlu(folder)
    if archive is not None and (name == "mmlu" or name.startswith("mmlu_")):
        return _mmlu_tasks(archive, name.removeprefix("mmlu").removeprefix("_"))
    wanted = name.removesuffix(LIKELIHOOD)
    found = [file for file in _files(folder) if _stem(file) == wanted]
    if not found:
        found = [file for file in _files(folder) if _plain(_stem(file)) == _plain(wanted)]
    if len(found) > 1:
        raise UsageError(f"{name!r} may be {' or '.join(file.name for file in found)}", "name the task as its file")
    return _task(found[0], name) if found else name


def _task(file: Path, name: str) -> Task:
    records = _records(file)
    fields = records[0].keys()
    if name.endswith(LIKELIHOOD):
        task = _reference_task(file, records)
    elif {"query", "choices", "gold"} <= fields:
        task = _choice_task(records)
    elif {"context_options", "continuation", "gold"} <= fields:
        task = _schema_task(records)
    elif {"context", "continuation"} <= fields:
        task = _reference_task(file, records)
        task |= {"process_results": _continuation_results, "metric_list": [*task["metric_list"], _ACCURACY]}
    else:
        task = _number_task(file, records)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "task": name,
        "test_split": "test",
        "fewshot_split": "test",  # examples come from the file itself, never the document that is asked
        "metadata": {"version": 1.0, "file": file.name, "sha256": digest},
    } | task


# --- kinds of tasks -----------------------------------------------------------------------------------------------


def _choice_task(records: list[Record]) -> Task:
    for number, record in enumerate(records, 1):
        if not isinstance(record["gold"], int) or not 0 <= record["gold"] < len(record["choices"]):
            raise CorpusError(f"record {number}: gold = {record['gold']!r} is not the place of one of its choices")
    rows = [
        {"question": _asking(record["query"]), "choices": record["choices"], "gold": record["gold"]}
        for record in records
    ]
    return {
        "custom_dataset": _dataset({"test": rows}),
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "process_results": _choice_results,
        "metric_list": [_ACCURACY, {"metric": "acc_norm"} | _UP, {"metric": "choice_nll"} | _DOWN],
    }


def _choice_results(doc: Record, results: list[tuple[float, bool]]) -> dict[str, float]:
    """acc, acc_norm (by characters) as the harness counts them; choice_nll = −log softmax(ll)[gold], in nats."""
    scores = [score for score, _greedy in results]
    by_length = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return {
        "acc": float(scores.index(top) == doc["gold"]),
        "acc_norm": float(by_length.index(max(by_length)) == doc["gold"]),
        "choice_nll": total - scores[doc["gold"]],
    }


def _letter_results(doc: Record, results: list[tuple[float, bool]]) -> dict[str, float]:
    """The same of choices that are letters: without acc_norm, since all are as long."""
    found = _choice_results(doc, results)
    return {name: found[name] for name in ("acc", "choice_nll")}


def _schema_task(records: list[Record]) -> Task:
    """Choices that stand in the context, e.g. Winograd's."""
    rows = [{key: record[key] for key in ("context_options", "continuation", "gold")} for record in records]
    return {
        "custom_dataset": _dataset({"test": rows}),
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [_ACCURACY],
    }


def _reference_task(file: Path, records: list[Record]) -> Task:
    """The likelihood of a reference answer: a choice of one, so that the harness sets its delimiter as for choices."""
    pairs, delimiter = _references(file, records)
    return {
        "custom_dataset": _dataset({"test": [{"question": q, "answers": [a], "gold": 0} for q, a in pairs]}),
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "answers",
        "doc_to_target": "gold",
        "target_delimiter": delimiter,
        "process_results": _reference_results,
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "nll"} | _DOWN,
        ],
    }


def _reference_results(doc: Record, results: list[tuple[float, bool]]) -> dict[str, Any]:
    """bits_per_byte of all answers together; nll = −ll of one answer, in nats."""
    ((score, _greedy),) = results
    return {"bits_per_byte": (score, len(doc["answers"][0].encode())), "nll": -score}


def _continuation_results(doc: Record, results: list[tuple[float, bool]]) -> dict[str, Any]:
    """The same, and acc: whether greedy decoding would write the answer."""
    return _reference_results(doc, results) | {"acc": float(results[0][1])}


def _number_task(file: Path, records: list[Record]) -> Task:
    """GSM8K and its like: generate, and compare the number after ####."""
    pairs, _ = _references(file, records)
    if not all("####" in answer for _, answer in pairs):
        raise UsageError(
            f"{file.name} has no answers that a generation could be compared with (a number after ####)",
            f"ask how likely its answers are: {_stem(file)}{LIKELIHOOD}",
        )
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    first = {"function": "take_first"}
    strict = {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}
    flexible = {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    return {
        "custom_dataset": _dataset({"test": [{"question": q, "answer": a} for q, a in pairs]}),
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": _MOST_TOKENS,
        },
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": ignored} | _UP],
        "filter_list": [
            {"name": "strict-match", "filter": [strict, first]},
            {"name": "flexible-extract", "filter": [flexible, first]},
        ],
    }


def _mmlu_tasks(archive: Path, subject: str) -> Task | TaskGroup:
    sheets: dict[str, dict[str, list[Record]]] = {}
    with tarfile.open(archive) as files:
        for member in files:
            named = re.search(r"(?:^|/)(test|dev)/(\w+)_\1\.csv$", member.name)
            if named is not None and subject in ("", named[2]):
                stream = files.extractfile(member)
                if stream is not None:
                    rows = _sheet(io.TextIOWrapper(stream, encoding="utf-8", newline=""), member.name)
                    sheets.setdefault(named[2], {})[named[1]] = rows
    tasks = [_subject_task(archive, name, splits) for name, splits in sorted(sheets.items()) if "test" in splits]
    if not tasks:
        raise CorpusError(f"{archive.name} has no test questions{' on ' + subject if subject else ''}")
    return TaskGroup("mmlu", tasks) if not subject else tasks[0]


def _subject_task(archive: Path, subject: str, splits: dict[str, list[Record]]) -> Task:
    about = subject.replace("_", " ")
    return {
        "task": f"mmlu_{subject}",
        "custom_dataset": _dataset(splits),
        "test_split": "test",
        "fewshot_split": "dev" if "dev" in splits else "test",
        "fewshot_config": {"sampler": "first_n"} if "dev" in splits else None,
        "output_type": "multiple_choice",
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "process_results": _letter_results,
        "metric_list": [_ACCURACY, {"metric": "choice_nll"} | _DOWN],
        "metadata": {"version": 1.0, "file": archive.name},
    }


def _sheet(stream: io.TextIOBase, name: str) -> list[Record]:
    """Rows of question, four choices, answer (a letter or a place), with or without a header."""
    rows = []
    for number, row in enumerate(csv.reader(stream), 1):
        if number == 1 and row[0] == "question":
            continue
        if len(row) != 6 or row[5] not in (*_LETTERS, "0", "1", "2", "3"):
            raise CorpusError(f"{name}, row {number}: expected a question, four choices and an answer")
        lettered = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, row[1:5], strict=True)]
        gold = _LETTERS.index(row[5]) if row[5] in _LETTERS else int(row[5])
        rows.append({"question": "\n".join([row[0].strip(), *lettered, "Answer:"]), "choices": _LETTERS, "gold": gold})
    return rows


# --- reading ------------------------------------------------------------------------------------------------------


def _references(file: Path, records: list[Record]) -> tuple[list[tuple[str, str]], str]:
    """(question, reference answer) of every record, and what stands between them."""
    fields = records[0].keys()
    if {"prompt", "canonical_solution"} <= fields:
        return [(record["prompt"], record["canonical_solution"]) for record in records], ""
    if {"text", "code", "test_list", "task_id"} <= fields:
        test = [record for record in records if record["task_id"] in _MBPP_TEST]
        return [(_mbpp_prompt(record), record["code"].replace("\r\n", "\n")) for record in test], ""
    if {"question", "answer"} <= fields:
        return [(f"Question: {record['question']}\nAnswer:", record["answer"]) for record in records], " "
    if {"context", "chain_of_thought", "answer"} <= fields:
        return [
            (f"Question: {record['context']}\nAnswer:", f"{record['chain_of_thought']}\n#### {record['answer']}")
            for record in records
        ], " "
    for answer in ("answer", "continuation"):
        if {"context", answer} <= fields:
            return [(record["context"], record[answer]) for record in records], " "
    raise CorpusError(
        f"{file.name}: records of {', '.join(fields)} are no task that is known here",
        "known: query, choices, gold; context, answer or continuation; question, answer; prompt, canonical_solution",
    )


def _mbpp_prompt(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _asking(query: str) -> str:
    """The query with "Answer:" at its end where it is a question, as the harness writes it."""
    text = query.rstrip()
    return f"{text}\nAnswer:" if text.rpartition("\n")[2].startswith("Question:") else text


def _records(file: Path) -> list[Record]:
    records: list[Record] = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            records.extend(json.loads(line) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(f"{file}: record {len(records) + 1} cannot be read: {error}") from error
    if not records:
        raise CorpusError(f"{file} has no records")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or record.keys() != records[0].keys():
            raise CorpusError(f"{file}: record {number} does not have the fields of the first one")
    return records


def _dataset(splits: dict[str, list[Record]]) -> Callable[..., dict[str, Any]]:
    """What the harness calls for the data of a task."""

    def made(**_metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return made


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "give the folder of the task files: --data FOLDER")
    return sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern))


def _mmlu(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("mmlu*.tar*"))), None)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".jsonl")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
