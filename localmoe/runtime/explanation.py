"""Explanation: the ways to execute a prompt's mix; what each was predicted to cost, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from localmoe.config import GenerateConfig
from localmoe.routing import Mix
from localmoe.runtime.calibration import planner
from localmoe.runtime.engine import Engine
from localmoe.runtime.execution.choice import Choice, Work
from localmoe.runtime.execution.kernels import Level
from localmoe.runtime.lengths import Lengths
from localmoe.runtime.planner import predict


@dataclass(frozen=True)
class Cost:
    """One choice: predicted and measured seconds, from routed prompt to last token, for as many tokens as came."""

    choice: Choice
    predicted: float
    measured: float
    new_tokens: int


@dataclass(frozen=True)
class Explanation:
    """The work, what was chosen for it, and the cost of every choice, in the order in which they were tried.

    most: the limit of new tokens, of which `work` has those that are expected. kernels: by which few tokens are
    multiplied with factors where they lie, see `execution.kernels`.
    """

    work: Work
    most: int
    chosen: Choice
    costs: tuple[Cost, ...]
    kernels: Level


def explain(engine: Engine, prompt: str, config: GenerateConfig, mix: Mix | None = None) -> Explanation:
    """Answers the prompt once by every choice there is, nothing kept between them; calibrates anew.

    mix: the prompt's, where it is routed already. The experts are brought into memory first, by an answer of one token
    that does not count. Raises PromptError as `Engine.generate` does.
    """
    executor = engine.executor
    with engine.turn():
        plans = planner(executor, anew=True)
    if mix is None:
        mix = engine.route(prompt)
    before, lengths = executor.planner, engine.lengths
    try:
        engine.lengths = Lengths()  # one prompt, several times over, says nothing of the next
        first = engine.start(prompt, replace(config, max_new_tokens=1), mix)
        tokens = first.answer("".join(first)).prompt_tokens
        expected = lengths.expected(config.max_new_tokens)
        work = replace(executor.work(executor.load([mix]), 1, tokens, expected), held=False)
        plan, costs = plans.plan(work), []
        for choice in plan.predicted:
            executor.forget_mixes()
            executor.planner = partial(_always, choice)
            pieces = engine.start(prompt, config, mix)
            answer = pieces.answer("".join(pieces))
            predicted = predict(plans.calibration, replace(work, new_tokens=answer.new_tokens), choice)
            costs.append(Cost(choice, predicted, answer.seconds.total, answer.new_tokens))
    finally:
        executor.planner, engine.lengths = before, lengths
    return Explanation(work, config.max_new_tokens, plan.choice, tuple(costs), executor.beside.level)


def _always(choice: Choice, _work: Work) -> Choice:
    return choice
