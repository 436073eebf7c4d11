"""Full fine-tuning: all weights of a copy of the base, on as many tokens as the bank, its rate tuned on tune."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from localmoe.config import as_dict
from localmoe.evaluate.bench import Bench, NotPossibleError, Scores, methods
from localmoe.evaluate.protocol import score_model
from localmoe.evaluate.statistics import perplexity
from localmoe.models import packed
from localmoe.packing import Passage
from localmoe.quantities import bytes_text
from localmoe.train.course import DivergedError, batches_of
from localmoe.train.rates import best_of
from localmoe.train.training import descend

PARAMETER_BYTES = 16
"""Of one trained weight in fp32: itself, its gradient, and AdamW's two moments."""
_STEP = 3.0  # between rates beyond the edge of those asked for
_TITLE = "fine-tuned-full"


@dataclass(frozen=True)
class FullTried:
    """One rate, and the perplexity on the tune documents that it leads to; infinite if it diverged."""

    rate: float
    tokens: int
    perplexity: float


@methods.register(_TITLE)
def fine_tuned_full(bench: Bench) -> Scores:
    """All weights fine-tuned on all train documents, as many tokens as trunk and experts together, rate tuned on tune.

    In fp32, whatever the base is in. The scores are kept, and which rates were tried; the weights are not.
    """
    budget = bench.bank_tokens
    check_memory(bench)
    passages = bench.train_passages()
    tried = _tune(bench, passages, min(budget, bench.config.fine_tune.tune_tokens))
    best = min(tried, key=lambda trial: trial.perplexity)
    if not math.isfinite(best.perplexity):
        raise NotPossibleError(
            "training all weights diverged at every rate", "try lower ones: --set 'fine_tune.full_rates=[1e-6,3e-6]'"
        )
    model, tokens = train_copy(bench, passages, best.rate, budget, _TITLE)
    count = len(bench.trials)
    totals = score_model(model, bench.trials, lambda done: bench.watch(f"{_TITLE}, scored", done, count))
    note = f"rate {best.rate:g}, of {len(tried)} tried on {len(bench.tune)} tune documents"
    detail = {"tried": [as_dict(trial) for trial in tried]}
    return Scores(tuple(range(count)), tuple(totals), tokens, note=note, detail=detail)


def train_copy(bench: Bench, passages: Sequence[Passage], rate: float, tokens: int, title: str) -> tuple[Any, int]:
    """A copy of the base in fp32, all its weights trained on so many label tokens at least, and how many they were.

    Batches, schedule, decay and clipping are the bank's; the base itself is not touched. Raises DivergedError.
    """
    config, done = bench.build_config.train, 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bench.watch(title, min(done, tokens), tokens)

    with bench.engine.turn():  # nothing is merged, and no module is wrapped
        model = copy.deepcopy(bench.engine.model).float().requires_grad_(True)
    batches = batches_of(passages, config, bench.config.seed, tokens)
    with packed(model):
        descend(model, list(model.parameters()), batches, config, rate, progress)
    return model.requires_grad_(False), sum(passage.predicted for batch in batches for passage in batch)


def check_memory(bench: Bench) -> None:
    """Raises NotPossibleError for a base that is not whole, in floating point and on one device, or is too large."""
    parameters = list(bench.engine.model.parameters())
    if not bench.engine.executor.plain or len({parameter.device for parameter in parameters}) > 1:
        raise NotPossibleError(
            "the base is quantised, offloaded or spread over devices, and its weights cannot all be trained",
            f"leave out {_TITLE}, or open the base whole",
        )
    count = sum(parameter.numel() for parameter in parameters)
    free = free_bytes(parameters[0].device)
    if free is not None and free < PARAMETER_BYTES * count:
        raise NotPossibleError(
            f"training all {count:,} weights of the base takes {bytes_text(PARAMETER_BYTES * count)} of memory, "
            f"and {bytes_text(free)} are free",
            f"leave out {_TITLE}, or run it on a larger machine",
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that could be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _tune(bench: Bench, passages: Sequence[Passage], tokens: int) -> list[FullTried]:
    """Every rate, and more beyond the edge as long as the edge is best; each trial is kept in a file."""
    tried: list[FullTried] = []

    def measure(rate: float) -> float:
        name = f"tried-full-{rate:.6g}-{tokens}.json"
        if not bench.training.has(name):
            bench.training.write_json(name, as_dict(_tried(bench, passages, rate, tokens)))
        tried.append(TypeAdapter(FullTried).validate_python(bench.training.read_json(name)))
        return tried[-1].perplexity

    best_of(bench.config.fine_tune.full_rates, measure, _STEP)
    return tried


def _tried(bench: Bench, passages: Sequence[Passage], rate: float, tokens: int) -> FullTried:
    try:
        model, trained = train_copy(bench, passages, rate, tokens, f"all weights, rate {rate:.2g}")
        nll = score_model(model, bench.tune, lambda _done: None)
        found = perplexity(nll, [trial.passage.predicted for trial in bench.tune])
    except (DivergedError, OverflowError):  # exp of hundreds of nats a token
        return FullTried(rate, tokens, math.inf)
    return FullTried(rate, trained, math.inf if math.isnan(found) else found)
