"""Shrinkage: how much of what sets jointly trained experts apart from their mean is worth keeping.

Experts of much alike documents learn more noise than difference. B_k becomes B̄ + s (B_k − B̄), with the share s that
tune documents like best, and B̄ the trunk's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from localmoe.lora import Adapter, LowRank, mixed
from localmoe.packing import Passage
from localmoe.train.checks import ENOUGH, Nll, document_nll, mean_nll
from localmoe.train.course import Trained
from localmoe.train.joint import JointTrained, Weights

SHARES = (0.25, 0.5, 0.75, 1.0)
"""What is tried; nothing at all would be a bank without experts."""
JUDGED_TOKENS = 256
"""Tokens of a tune document that are scored, at most."""


def search_share(
    model: Any, found: JointTrained, judges: Sequence[tuple[Passage, Weights]]
) -> tuple[float, Mapping[float, float]]:
    """The best of `SHARES`, and nats a token on the judges for each; (1, nothing) where there are too few of them.

    judges: passages with labels where they count, each with its mix.
    """
    if len(judges) < ENOUGH or len(found.experts) < 2:
        return 1.0, {}
    means = nll_of_shares(model, found, judges, SHARES)
    finite = {share: mean for share, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda share: (finite[share], -share), default=1.0), means


def nll_of_shares(
    model: Any, found: JointTrained, judges: Sequence[tuple[Passage, Weights]], shares: Sequence[float]
) -> dict[float, float]:
    """Nats a token on the judges, each under its mix, where so much of what sets experts apart is kept."""
    losses: dict[float, list[Nll]] = {share: [] for share in shares}
    for passage, weights in judges:
        short = Passage(passage.tokens[:JUDGED_TOKENS], passage.labels[:JUDGED_TOKENS])
        mix = mixed([(found.experts[k].adapter, weight) for k, weight in weights])
        for share in shares:
            adapter = _between(found.trunk.adapter, mix, share)
            losses[share].append(document_nll(model, {0: (short,)}, adapter)[0])
    return {share: mean_nll(each) for share, each in losses.items()}


def shrunk(found: JointTrained, share: float) -> JointTrained:
    """The experts, as much nearer to the trunk; bf16 as before."""
    if share == 1.0:
        return found
    trunk = found.trunk.adapter

    def drawn(expert: Trained) -> Trained:
        near = _between(trunk, expert.adapter, share)
        adapter = {name: LowRank(trunk[name].A, update.B.bfloat16(), update.c) for name, update in near.items()}
        return replace(expert, adapter=adapter)

    return JointTrained(found.trunk, tuple(map(drawn, found.experts)))


def _between(trunk: Adapter, adapter: Adapter, share: float) -> Adapter:
    """B̄ + s (B − B̄) in fp32, c taken out of both: they have one."""
    found = {}
    for name, update in adapter.items():
        mean, own = trunk[name], update.B.float() * (update.c / trunk[name].c)
        found[name] = LowRank(mean.A, mean.B.float() + share * (own - mean.B.float()), mean.c)
    return found
