"""Joint rates: how eagerly experts learn beside their trunk, by short joint trainings that tune documents judge."""

from __future__ import annotations

import math
from dataclasses import replace

from localmoe.train.checks import ENOUGH
from localmoe.train.course import DivergedError, Progress
from localmoe.train.experts import AdapterTask, model_of
from localmoe.train.groundwork import Groundwork
from localmoe.train.joint import train_jointly
from localmoe.train.joint_tasks import Mixes, job_of, judging, public_experts
from localmoe.train.progress import Event, Watch
from localmoe.train.rates import measured, told
from localmoe.train.shrinkage import nll_of_shares

LONG_ENOUGH = 0.5
"""Share of the training's tokens that a trial must see for its word on experts' rates to be taken without a warning."""


def search_joint_rate(ground: Groundwork, trunk: AdapterTask, mixes: Mixes, watch: Watch) -> float:
    """The rate of experts beside a trunk, as a multiple of its: `train.expert_rate`, times the best of `search.rates`.

    A base that every document still teaches something wants it low, so that the trunk learns what is common; one that
    is full wants it high (docs/choosing.md). Each trial trains trunk and experts on `search.tokens` tokens; the mean
    nll of tune documents, each under the mix of its first tokens, decides. Short trials like
    eager experts too well where a base knows little of such text (docs/choosing.md), and then that is told.
    """
    asked, unit, count = ground.config.search, ground.expert_rate, len(public_experts(ground))
    if not asked.rates or count < 2:
        return unit
    judges = judging(ground.work, mixes)
    if len(judges) < ENOUGH:
        why = f"{len(judges)} public documents to tune on go on after their first tokens"
        watch(Event("rates", 1, 1, f"{unit:g} of it for experts, not tried: {why}"))
        return unit
    whole = ground.tokens(trunk.train_rows, trunk.epochs)
    tokens = min(asked.tokens, whole)
    job = replace(job_of(ground.work, trunk, count, mixes, unit), tokens=tokens)

    def train(factor: float, progress: Progress) -> float | None:
        try:
            found = train_jointly(model_of(trunk), replace(job, expert_rate=unit * factor), progress)
        except DivergedError:
            return None
        nll = nll_of_shares(model_of(trunk), found, judges, (1.0,))[1.0]
        return nll if math.isfinite(nll) else None

    tried = measured(ground, "joint", lambda _factor: tokens, train, watch)
    best = min(tried, key=tried.__getitem__)
    judged = f"the first tokens' mixes of {len(judges)} tune documents, for experts"
    factor = told(tried, best, trunk.learning_rate * unit, judged, watch)
    if factor > 1 and tokens < LONG_ENOUGH * whole:
        seen = f"these trials saw {tokens / whole:.0%} of the tokens"
        why = "short ones like eager experts too well where the base knows little of such text"
        watch(
            Event("rates", 1, 1, f"{seen}, and {why}: --set search.tokens={whole} makes them as long as the training")
        )
    return unit * factor
