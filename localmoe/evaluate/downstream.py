"""Downstream tasks: a bank and its base on the same requests of lm-evaluation-harness, compared by document."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localmoe.config import LmEvalConfig, as_dict
from localmoe.errors import LocalMoEError, UsageError
from localmoe.evaluate.local_tasks import local_names, local_tasks
from localmoe.evaluate.statistics import Difference, difference
from localmoe.runtime.engine import Engine

_SUMS = {"bits_per_byte": "bits_per_byte", "word_perplexity": "bits_per_word"}
"""Metrics that hold (log-likelihood, size) of every document: compared as bits per unit of size."""
_THE_SAME = ("byte_perplexity",)  # 2^bits_per_byte

Place = tuple[str, str, str]
"""Task, metric, filter."""


@dataclass(frozen=True)
class Run:
    """What one model answered: the harness's results, and the value of every metric of every document."""

    name: str
    results: dict[str, Any]
    values: dict[Place, dict[int, Any]]
    prompts: dict[tuple[str, int], str]
    """Hash of the context of every document."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, two runs on the same documents; `found` is None where the metric is not a mean."""

    task: str
    metric: str
    filter: str
    method: str
    baseline: str
    higher_is_better: bool
    found: Difference | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "no difference shown", or "not compared"."""
        if self.found is None:
            return "not compared"
        verdict = self.found.verdict
        if verdict not in ("higher", "lower"):
            return verdict
        return "better" if (verdict == "higher") == self.higher_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        found = {} if self.found is None else asdict(self.found)
        low, high = found.pop("low", None), found.pop("high", None)
        values = {f"{name}_value" if name in ("method", "baseline") else name: value for name, value in found.items()}
        names = {key: getattr(self, key) for key in ("task", "metric", "filter", "method", "baseline")}
        interval = None if self.found is None else [low, high]
        return (
            names
            | {"higher_is_better": self.higher_is_better}
            | values
            | {"interval": interval, "verdict": self.verdict}
        )


def evaluate_downstream(
    engine: Engine,
    names: Sequence[str],
    config: LmEvalConfig = LmEvalConfig(),  # noqa: B008
    data: Path | None = None,
    output: Path | None = None,
    cache: Path | None = None,
) -> tuple[list[Run], list[Comparison]]:
    """Ask a bank, and beside it its base, trunk or another adapter; compare them, and the chat template with none.

    names: tasks of files in `data` (see `local_tasks`), else the harness's own. output: where its result files go, and
    `comparisons.json`. cache: a folder for answers, where the next run of the same configuration finds them. Raises
    UnknownNameError for a task that nobody knows, UsageError for a chat template that the base lacks or a trunk
    that the bank lacks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("the package 'lm-eval' is missing", "pip install 'localmoe[lm-eval]'")
    from localmoe.evaluate.harness import LocalMoELM, Tasks, run_tasks

    tasks = Tasks(list(names)) if data is None else Tasks(local_tasks(data, names), local_names(data))
    templates = {"off": (False,), "on": (True,), "both": (False, True)}[config.chat_template]
    others = {"none": (), "base": ("base",), "trunk": ("trunk",), "both": ("base", "trunk")}[config.compare]
    others += () if config.adapter is None else ("adapter",)
    if True in templates and engine.tokenizer.chat_template is None:
        raise UsageError("the base has no chat template", "leave --chat-template off")
    models = {
        (method, chat): LocalMoELM(
            engine,
            route_on=config.route_on,
            method=method,
            adapter=config.adapter,
            batch_size=config.batch,
            prefix_tokens=config.prefix_tokens,
        )
        for chat in templates
        for method in ("merged", *others)
    }
    runs = {}
    for (method, chat), model in models.items():
        results = run_tasks(model, tasks, config, chat, output, cache)
        runs[method, chat] = _run(method + ("-chat" if chat else ""), results)
    pairs = [(("merged", chat), (other, chat)) for chat in templates for other in others]
    if len(templates) == 2:
        pairs += [((method, True), (method, False)) for method in ("merged", *others)]
    compared = [row for ours, theirs in pairs for row in compare_runs(runs[ours], runs[theirs])]
    if output is not None:
        rows = [comparison.as_dict() for comparison in compared]
        text = json.dumps({"config": as_dict(config), "comparisons": rows}, indent=1, ensure_ascii=False)
        (output / "comparisons.json").write_text(text + "\n", encoding="utf-8")
    return list(runs.values()), compared


def compare_runs(method: Run, baseline: Run) -> list[Comparison]:
    """Every metric of every task, and of every group with each document counting once.

    Raises LocalMoEError if the two did not see the same documents, or, where both or neither used the chat template,
    the same contexts.
    """
    alike = method.name.endswith("-chat") == baseline.name.endswith("-chat")
    if method.prompts.keys() != baseline.prompts.keys() or (alike and method.prompts != baseline.prompts):
        raise LocalMoEError(f"{method.name} and {baseline.name} did not see the same documents", "report it")
    directions = method.results["higher_is_better"]
    wholes = {task: [task] for task in directions if any(place[0] == task for place in method.values)}
    rows = []
    for whole, tasks in (wholes | _groups(method.results)).items():
        for metric, filtered in dict.fromkeys(place[1:] for place in method.values if place[0] in tasks):
            places = [(task, metric, filtered) for task in tasks if (task, metric, filtered) in method.values]
            ours = [value for place in places for value in method.values[place].values()]
            theirs = [baseline.values[place][document] for place in places for document in method.values[place]]
            shown, found = _difference(metric, ours, theirs)
            higher = metric not in _SUMS and bool(directions[tasks[0]].get(metric, True))
            rows.append(Comparison(whole, shown, filtered, method.name, baseline.name, higher, found))
    return rows


def _groups(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every group with its tasks, through groups of groups."""
    children: dict[str, list[str]] = {name: list(inside) for name, inside in results["group_subtasks"].items()}

    def leaves(name: str) -> Iterator[str]:
        for child in children.get(name, []):
            if child in children:
                yield from leaves(child)
            else:
                yield child

    return {name: list(leaves(name)) for name in children if children[name]}


def _difference(metric: str, ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[str, Difference | None]:
    """The metric as it is compared, and the difference; none for values that are not numbers to take the mean of."""
    if metric in _SUMS:
        sizes = [float(size) for _, size in ours]
        ours, theirs = ([-float(logarithm) / math.log(2) for logarithm, _ in values] for values in (ours, theirs))
        return _SUMS[metric], difference(ours, theirs, sizes)
    if all(isinstance(value, (int, float)) for value in (*ours, *theirs)):
        return metric, difference([float(value) for value in ours], [float(value) for value in theirs])
    return metric, None


def _run(name: str, results: dict[str, Any]) -> Run:
    values: dict[Place, dict[int, Any]] = {}
    prompts: dict[tuple[str, int], str] = {}
    for task, samples in results.pop("samples").items():
        for sample in samples:
            prompts[task, sample["doc_id"]] = sample["prompt_hash"]
            for metric in sample["metrics"]:
                if metric not in _THE_SAME:
                    values.setdefault((task, metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return Run(name, results, values, prompts)
