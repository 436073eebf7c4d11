"""LocalMoE as a model of lm-evaluation-harness: every question gets its mix, and every request the model merged by it.

The one importer of lm_eval; importing this file registers the model `localmoe`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models  # a model registered before the built-in ones would hide them
import torch
from lm_eval.api.group import Group
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from localmoe.bank.manifest import ADAPTER_WEIGHTS
from localmoe.bank.peft import from_peft
from localmoe.bank.store import Bank
from localmoe.config import LmEvalConfig, as_dict, default_of
from localmoe.errors import LocalMoEError, TemporaryError, UnknownNameError, UsageError
from localmoe.evaluate.local_tasks import Task, TaskGroup
from localmoe.evaluate.questions import Questions
from localmoe.identity import fingerprint
from localmoe.lora import Adapter, attached
from localmoe.models import target_linears
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine, base_mix, open_engine
from localmoe.runtime.execution.layout import shape_of
from localmoe.runtime.router import route_config

_STAMP = "localmoe configuration"  # key of a response cache that holds whose responses they are


@dataclass(frozen=True)
class Routing:
    """How the requests of a run were routed."""

    route_on: str
    requests: int
    """Whole texts count once a window; their prefixes, which the base scores, do not count."""
    mixes: int
    """Distinct ones: that many merges."""
    active_mean: float
    """Experts per request."""
    active_max: int
    fallbacks: int
    """Requests whose mix is a fall-back."""
    without_text: int
    """Requests without a text to route on; the base model answered them."""


@register_model("localmoe")
class LocalMoELM(HFLM):  # type: ignore[misc]
    """A bank as a model of the harness: `lm_eval --model localmoe --model_args bank=FOLDER`, or an instance.

    bank: a folder, or an engine. route_on: what of a request is embedded, "context", "last_block" or "question" (see
    `Questions`); never the continuation. method: who answers, "merged", or "base", "trunk" or "adapter" on the same
    requests. adapter: a PEFT folder, for method "adapter".
    prefix_tokens: of a text that is scored as a whole, this many tokens are scored by the base and choose the mix for
    the others. The other arguments are those of `open_engine`, and fields of RouteConfig. Raises UsageError for a value
    that cannot be, and for a bank without a trunk that is to answer.
    """

    def __init__(
        self,
        bank: str | Path | Engine,
        base: str | None = None,
        encoder: str | None = None,
        base_variant: bool = False,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        route_on: str = "last_block",
        method: str = "merged",
        adapter: str | Path | None = None,
        prefix_tokens: int = default_of(LmEvalConfig, "prefix_tokens"),
        batch_size: int | str = default_of(LmEvalConfig, "batch"),
        max_batch_size: int = 64,
        max_length: int | None = None,
        device: str | None = None,
        **routing: Any,
    ) -> None:
        if isinstance(bank, Engine):
            if routing:
                raise UsageError(
                    f"an open engine routes as it was told, not by {', '.join(routing)}", "open it with them"
                )
            self.engine = bank
        else:
            config = route_config(Bank.open(Path(bank)), routing)
            self.engine = open_engine(bank, base, encoder, config, device_map, base_variant, trust_remote_code)
        where = self.engine.model.device.type
        if device is not None and torch.device(device).type not in (where, "cuda"):  # cuda: the harness's default
            raise UsageError(f"the base is on {where!r}, not on {device!r}", "leave the device out")
        with _quiet():
            super().__init__(
                pretrained=self.engine.model,
                tokenizer=copy.deepcopy(self.engine.tokenizer),  # HFLM gives it a padding token
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                softmax_dtype="float32",  # else log-probabilities are rounded to bf16, and summed in it
            )
        self._base = fingerprint(self.engine.model)  # a base variant is not what the bank's manifest says
        self.name = _method(self.engine.bank, method, adapter)
        self.adapter = Path(adapter) if method == "adapter" and adapter is not None else None
        self._beside = self._adapter_beside()
        self.prefix_tokens = prefix_tokens
        self.questions = Questions(route_on)
        self._mixes: dict[str, Mix] = {}
        self._used: list[tuple[str, Mix]] = []

    # what is asked

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether it is the greedy one, under the model of its mix."""
        return self._by_mix(requests, self._chosen(requests), super().loglikelihood, "loglikelihood")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model merged for the context writes after it; raises UsageError if the context holds no more."""
        for request in requests:
            wanted = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if wanted >= self.max_length:
                raise UsageError(
                    f"{request.task_name} lets {wanted:,} tokens be written, and the context holds {self.max_length:,}",
                    "leave this task out, or take a base with a longer context",
                )
        return self._by_mix(requests, self._chosen(requests), super().generate_until, "generate")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: log p₀(x≤P) + log p(x>P | x≤P), p₀ the base, p merged for the P first tokens.

        No token is scored by weights that were chosen by it.
        """
        parts, owners, mixes = [], [], []
        for owner, request in enumerate(requests):
            (string,) = request.args
            tokens = self.tok_encode(string)
            windows = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            ]
            for number, (before, scored) in enumerate(windows):
                cut = self.prefix_tokens if number == 0 else 0
                head, tail = scored[:cut], scored[cut:]
                if head:
                    parts.append((None, before, head))
                    mixes.append(base_mix(self.engine.bank))
                    owners.append(owner)
                if tail:
                    parts.append((None, before + head, tail))
                    mixes.append(self._mix(self.tok_decode(tokens[: self.prefix_tokens])))
                    owners.append(owner)
        found = self._by_mix(parts, mixes, self._loglikelihood_tokens, "rolling")
        totals = [0.0] * len(requests)
        for owner, (logarithm, _greedy) in zip(owners, found, strict=True):
            totals[owner] += logarithm
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered conversation, remembered: a mix is chosen by what the user says, not by the template."""
        rendered: str = super().apply_chat_template(chat_history, add_generation_prompt)
        self.questions.remember(rendered, chat_history)
        return rendered

    # who answers

    def _chosen(self, requests: Sequence[Any]) -> list[Mix]:
        return [self._mix(self.questions.of(request)) for request in requests]

    def _mix(self, text: str) -> Mix:
        """The mix for a text; where there is none, the base."""
        if text not in self._mixes:
            routed = self.name == "merged" and text.strip() != ""
            self._mixes[text] = self.engine.route(text) if routed else base_mix(self.engine.bank)
        self._used.append((text, self._mixes[text]))
        return self._mixes[text]

    def _by_mix(
        self, requests: Sequence[Any], mixes: Sequence[Mix], score: Callable[..., list[Any]], label: str
    ) -> list[Any]:
        """Scores in the order of the requests; those of one mix are scored together, after one merge.

        HFLM reorders, batches and reuses logits only within one call, so never across two mixes.
        """
        beside = self._beside
        groups: dict[Mix, list[int]] = {}
        for place, mix in enumerate(mixes):
            groups.setdefault(mix, []).append(place)
        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc=f"{self.name}: {label}", disable=None, leave=False) as bar:
            for mix, places in groups.items():
                with self.engine.merged(mix), nullcontext() if beside is None else attached(self.engine.model, beside):
                    one_bar = len(groups) > 1 or not sys.stderr.isatty()
                    scores = score([requests[place] for place in places], disable_tqdm=one_bar)
                for place, result in zip(places, scores, strict=True):
                    found[place] = result
                bar.update(len(places))
        return found

    def _adapter_beside(self) -> Adapter | None:
        """The one adapter that answers, where no mix does; raises BankError for a foreign one of another base."""
        if self.adapter is not None:
            shapes = {name: shape_of(module) for name, module in target_linears(self.engine.model).items()}
            return from_peft(self.adapter, shapes)[0]
        return self.engine.bank.trunk() if self.name == "trunk" else None

    # whose answers they are

    def routing(self) -> Routing:
        """How the requests so far were routed."""
        active = [len(mix.experts) for _, mix in self._used]
        return Routing(
            route_on=self.questions.route_on if self.name == "merged" else "nothing",
            requests=len(active),
            mixes=len({mix for _, mix in self._used}),
            active_mean=sum(active) / max(1, len(active)),
            active_max=max(active, default=0),
            fallbacks=sum(mix.fallback is not None for _, mix in self._used),
            without_text=sum(not text.strip() for text, _ in self._used) if self.name == "merged" else 0,
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """All that decides an answer, beside the request."""
        described = {
            "base": self.engine.bank.manifest.base.id,
            "base_architecture": self._base.architecture,
            "base_weights": self._base.weights,
            "base_variant": self.engine.base_variant,
            "dtype": str(self.engine.model.dtype),
            "max_length": self.max_length,
            "method": self.name,
            "chat_template": _digest(self.tokenizer.chat_template),
        }
        if self.adapter is not None:
            described["adapter"] = hashlib.sha256((self.adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
        elif self.name != "base":
            described["bank"] = self.engine.bank.manifest.digest
        if self.name == "merged":
            described |= {
                "route": as_dict(self.engine.config),
                "route_on": self.questions.route_on,
                "prefix_tokens": self.prefix_tokens,
            }
        return described

    @property
    def mark(self) -> str:
        """Hash of the configuration: answers may be kept for another run iff it is the same."""
        return _digest(self.configuration)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use the harness's response cache. Its keys know the request alone: one of another mark is a UsageError."""
        super().set_cache_hook(cache_hook)
        stored = cache_hook.dbdict
        if stored is None:
            return
        if len(stored) == 0:
            stored[_STAMP] = self.mark
        if stored.get(_STAMP) != self.mark:
            raise UsageError(
                f"the cache {stored.filename} holds answers of another model, bank or routing",
                "give another path; `localmoe lm-eval --cache FOLDER` keeps them apart by itself",
            )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"localmoe": self.configuration | {"routing": vars(self.routing())}}


class Tasks(TaskManager):  # type: ignore[misc]
    """Tasks by name, or made of files; those that are loaded are known to the model, which routes on their questions.

    others: names that could have been meant. Raises UnknownNameError for a name that the harness does not have.
    """

    def __init__(self, asked: Sequence[str | Task | TaskGroup], others: Sequence[str] = ()) -> None:
        super().__init__(include_defaults=any(isinstance(task, str) for task in asked))
        self.asked = asked
        self.questions = Questions("question")
        for name in asked:
            if isinstance(name, str) and name not in self.all_tasks:
                near = difflib.get_close_matches(name, [*others, *self.all_tasks], n=5)
                remedy = "tasks of files: --data FOLDER; all that the harness has: lm-eval ls tasks"
                raise UnknownNameError("task", name, near, remedy)

    def load(self, task_list: Any) -> Any:
        """The harness's own, and what it was asked for; raises TemporaryError if data cannot be reached."""
        try:
            loaded = super().load(task_list)
        except OSError as error:
            what = f"the data of a task cannot be reached: {error}"
            raise TemporaryError(what, "use files: --data FOLDER") from error
        self.questions.know(loaded["tasks"])
        return loaded


def run_tasks(
    lm: LocalMoELM,
    tasks: Tasks,
    config: LmEvalConfig,
    chat: bool = False,
    output: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The harness's results, with `samples`; its files below `output`, its cache of answers below `cache`.

    Raises TemporaryError if the data of a task cannot be reached.
    """
    tasks.questions = lm.questions
    tracker = EvaluationTracker(output_path=str(output)) if output is not None else None
    name = f"{lm.engine.bank.path.resolve().name}-{lm.name}" + ("-chat" if chat else "")
    with _quiet():
        results: dict[str, Any] = lm_eval.evaluator.simple_evaluate(
            model=lm,
            model_args={"model": name},
            tasks=[_built(task) for task in tasks.asked],
            num_fewshot=config.fewshot,
            batch_size=config.batch,
            limit=config.limit,
            use_cache=None if cache is None else str(cache / f"{lm.mark}-{'chat' if chat else 'plain'}"),
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,  # of the harness's own, unpaired errors
            task_manager=tasks,
            evaluation_tracker=tracker,
        )
        results["config"]["model"] = name
        if tracker is not None:
            _save(tracker, results)
    return results


def _built(task: str | Task | TaskGroup) -> Any:
    if isinstance(task, str):
        return task
    if isinstance(task, dict):
        return ConfigurableTask(config=dict(task))
    group = Group(task.name, aggregate_metric_list=[AggMetricConfig("acc")])
    for member in task.tasks:
        group.add(ConfigurableTask(config=dict(member)))
    return group


def _save(tracker: Any, results: dict[str, Any]) -> None:
    """The harness's files. Raises LocalMoEError where it could not write one, of which it would only log."""
    samples = copy.deepcopy(results["samples"])  # it changes them
    tracker.save_results_aggregated({key: value for key, value in results.items() if key != "samples"}, samples)
    for name, rows in samples.items():
        tracker.save_results_samples(name, rows)
    folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    wanted = {f"results_{tracker.date_id}.json", *(f"samples_{name}_{tracker.date_id}.jsonl" for name in samples)}
    missing = sorted(wanted - {file.name for file in folder.iterdir()})
    if missing:
        raise LocalMoEError(f"{folder / missing[0]} could not be written", "is there room, and may you write there?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings about what we do on purpose, and without a bar for every task."""
    log, modules = logging.getLogger("lm_eval"), (lm_eval.api.task, lm_eval.api.model)
    level, commit = log.level, lm_eval.evaluator.get_git_commit_hash
    log.setLevel(logging.ERROR)
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the current folder, whatever that is
    for module in modules:
        module.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        log.setLevel(level)
        lm_eval.evaluator.get_git_commit_hash = commit
        for module in modules:
            module.tqdm = tqdm


def _method(bank: Bank, name: str, adapter: str | Path | None) -> str:
    known = ("merged", "base", "trunk", "adapter")
    if name not in known:
        raise UnknownNameError("method", name, known)
    if name == "adapter" and (adapter is None or not (Path(adapter) / ADAPTER_WEIGHTS).is_file()):
        raise UsageError(
            f"{adapter} holds no {ADAPTER_WEIGHTS}",
            "give the folder of a PEFT adapter, e.g. BANK-eval/experts/fine-tuned-...",
        )
    if name == "trunk" and bank.manifest.trunk is None:
        raise UsageError("the bank has no trunk to compare with", "compare with the base: --compare base")
    return name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
