"""The protocol: a prefix chooses the mix, the loss is counted on the suffix alone, for every method alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from localmoe.errors import CorpusError
from localmoe.lora import Adapter, attached
from localmoe.models import packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine, base_mix

_BATCH = 8


@dataclass(frozen=True)
class Trial:
    """One held-out document: the text of its prefix, and its tokens with labels on the suffix."""

    document: str
    prefix: str
    passage: Passage


def held_out(engine: Engine, prefix_tokens: int, most_tokens: int, most_documents: int | None = None) -> list[Trial]:
    """Trials from the bank's test documents, in the order of their ids (which is random).

    Documents without a token after the prefix are left out. Raises CorpusError if there are none.
    """
    table = engine.bank.documents()
    ids = sorted(
        name for name, split in zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "test"
    )
    trials: list[Trial] = []
    for name, text in zip(ids, engine.bank.texts(ids) if ids else [], strict=True):
        if len(trials) == most_documents:
            break
        tokens = torch.tensor(engine.tokenizer(text, verbose=False)["input_ids"][:most_tokens])
        if len(tokens) > prefix_tokens:
            prefix = engine.tokenizer.decode(tokens[:prefix_tokens], skip_special_tokens=True)
            trials.append(Trial(name, prefix, Passage(tokens, torch.arange(len(tokens)) >= prefix_tokens)))
    if not trials:
        raise CorpusError(
            f"no held-out document has more than {prefix_tokens} tokens",
            "build with a larger corpus.test_fraction, or choose a shorter prefix",
        )
    return trials


def score_alone(
    engine: Engine, trials: Sequence[Trial], adapter: Adapter | None, progress: Callable[[int], None]
) -> list[float]:
    """Summed nll (nats) of every suffix under the base, or under one adapter for all."""
    totals: list[float] = []
    beside = attached(engine.model, adapter) if adapter is not None else nullcontext()
    with engine.merged(base_mix(engine.bank)), beside, packed(engine.model):
        for start in range(0, len(trials), _BATCH):
            part = [trial.passage for trial in trials[start : start + _BATCH]]
            totals += [float(nll.double().sum()) for nll in token_nll(engine.model, part)]
            progress(len(totals))
    return totals


def score_merged(
    engine: Engine, trials: Sequence[Trial], progress: Callable[[int], None]
) -> tuple[list[float], list[Mix]]:
    """Summed nll (nats) of every suffix under the model merged for its prefix, and the mixes."""
    totals: list[float] = []
    mixes: list[Mix] = []
    for trial in trials:
        mixes.append(engine.route(trial.prefix))
        totals.append(float(engine.token_nll(trial.passage, mixes[-1]).double().sum()))
        progress(len(totals))
    return totals, mixes
