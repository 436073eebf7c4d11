"""The engine: one bank, one base model; a prompt in, and out come its mix and the answer of the model merged for it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.bank.store import Bank
from localmoe.config import ExecutionConfig, GenerateConfig, RouteConfig, as_dict
from localmoe.encoders import Encoder
from localmoe.errors import BankError, PromptError, UsageError
from localmoe.identity import Fingerprint, fingerprint, recall, remember
from localmoe.models import check_packing, context_length, load_model, load_tokenizer, packed
from localmoe.packing import Passage, token_nll
from localmoe.quantisation import quantise
from localmoe.routing import Mix
from localmoe.runtime.answers import Answer, Seconds, Stream
from localmoe.runtime.calibration import on_demand
from localmoe.runtime.drawing import draw
from localmoe.runtime.execution import Executor, Loaded, Way, rounded
from localmoe.runtime.generation import Memory, prompt_tokens
from localmoe.runtime.lengths import Lengths
from localmoe.runtime.router import Conversation, Neighbour, PromptRouter, open_encoder, route_config
from localmoe.runtime.session import Session


class _Turns:
    """Which thread has a model, if any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None


_TURNS: weakref.WeakKeyDictionary[Any, _Turns] = weakref.WeakKeyDictionary()


class Engine:
    """Answers prompts from a bank; threads, and engines over one model, take turns, since they merge into it.

    A stream that is read to its end or closed gives the model back. Until then whatever else needs the model waits,
    but in the thread that began the stream, which would wait for ever, it is a UsageError.
    """

    def __init__(
        self,
        bank: Bank,
        model: Any,
        tokenizer: Any,
        encoder: Encoder,
        config: RouteConfig,
        base_variant: bool = False,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        self.bank = bank
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.config = config
        self.base_variant = base_variant
        self.router = PromptRouter(bank, encoder, config)
        self.executor = Executor(model, bank, execution)
        self.lengths = Lengths()
        """Of the answers so far: what the planner expects of the next."""
        self._turns = _TURNS.setdefault(model, _Turns())

    def route(self, prompt: str | Conversation) -> Mix:
        """The mix for a prompt: which experts, with which weights (Algorithm 2, without the generation).

        A text is embedded from its start to the encoder's limit; of a conversation the last user message, then the
        earlier ones. Raises PromptError for a prompt without text.
        """
        return self.router.route(prompt)

    def nearest(self, prompt: str | Conversation, count: int = 5) -> list[Neighbour]:
        """The train documents whose embeddings are nearest to the prompt's, the nearest first."""
        return self.router.nearest(prompt, count)

    def generate(self, prompt: str | Conversation, config: GenerateConfig = GenerateConfig()) -> Answer:  # noqa: B008
        """The answer of the model merged for the prompt. Raises PromptError if it is empty or does not fit."""
        pieces = self.start(prompt, config)
        text = "".join(pieces)
        return pieces.answer(text)

    def stream(self, prompt: str | Conversation, config: GenerateConfig = GenerateConfig()) -> Iterator[str]:  # noqa: B008
        """The same answer, piece by piece; closing the iterator stops the generation."""
        yield from self.start(prompt, config)

    def generate_batch(
        self,
        prompts: Sequence[str | Conversation],
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        mixes: Sequence[Mix] | None = None,
    ) -> list[Answer]:
        """The answers to several prompts, generated together, each under its own mix.

        Every prompt gets the tokens that it gets alone, up to near-ties. The times are those of the whole batch.
        mixes: use these instead of routing. Raises PromptError for a prompt that is empty or does not fit, UsageError
        for another number of mixes than of prompts.
        """
        if mixes is not None and len(mixes) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts cannot be answered under {len(mixes)} mixes", "give one a prompt")
        begun = time.perf_counter()
        if not prompts:
            return []
        ids = [prompt_tokens(self.tokenizer, self.model, prompt) for prompt in prompts]
        embedded = selected = time.perf_counter()
        started = embedded
        if mixes is None:
            vectors = [self.router.embed(prompt) for prompt in prompts]
            embedded = time.perf_counter()
            mixes = [self._select(vector) for vector in vectors]
            selected = time.perf_counter()
        rows: list[list[int]] = [[] for _ in ids]
        first = 0.0
        with self.turn():
            waited = time.perf_counter()
            loaded = self.executor.load(mixes)
            load = time.perf_counter() - waited
            longest = max(prompt.shape[1] for prompt in ids)
            expected = self.lengths.expected(config.max_new_tokens)
            choice = self.executor.choose(loaded, len(ids), longest, expected)
            with self.executor.running(loaded, choice) as running:
                for step in draw(self.model, ids, config):
                    for row, token in step.tokens.items():
                        rows[row].append(token)
                    if first == 0.0:
                        first = time.perf_counter() - begun
                    if step.going:
                        running.decode()
                        running.keep(step.going)
        total = time.perf_counter() - begun
        for new in rows:
            self.lengths.note(len(new), config.max_new_tokens)
        seconds = Seconds(embedded - started, selected - embedded, load, running.merge_seconds, first, total)
        return [
            Answer(
                self.tokenizer.decode(new, skip_special_tokens=True),
                mix,
                self.base_variant,
                prompt.shape[1],
                len(new),
                seconds,
                choice,
            )
            for new, mix, prompt in zip(rows, mixes, ids, strict=True)
        ]

    def start(
        self, prompt: str | Conversation, config: GenerateConfig, mix: Mix | None = None, memory: Memory | None = None
    ) -> Stream:
        """Route and check the prompt at once; the iterator that is returned merges and generates.

        mix: use this one instead of routing (an empty one is the base model). memory: keys and values of earlier turns
        (see `session`).
        """
        begun = time.perf_counter()
        ids = prompt_tokens(self.tokenizer, self.model, prompt)
        if mix is not None:
            return Stream(self, ids, config, mix, begun, 0.0, 0.0, memory)
        started = time.perf_counter()
        vector = self.router.embed(prompt)
        embedded = time.perf_counter()
        chosen = self._select(vector)
        selected = time.perf_counter()
        return Stream(self, ids, config, chosen, begun, embedded - started, selected - embedded, memory, vector)

    def session(self, config: GenerateConfig = GenerateConfig(), sticky: bool = False) -> Session:  # noqa: B008
        """A conversation of several turns. sticky: the first message chooses the mix for all of them.

        With one mix the keys and values of earlier turns are kept, and a turn computes its own tokens alone; where the
        mix changes they are of no use, and the whole conversation is read again.
        """
        return Session(self, config, sticky)

    def score(self, prefix: str, suffix: str, mix: Mix | None = None) -> float:
        """Mean negative log-likelihood (nats a token) of `suffix` after `prefix`; the prefix alone chooses the mix."""
        head = self.tokenizer(prefix)["input_ids"]
        tail = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        if not tail or not head:
            raise PromptError("there is nothing to score", "give a prefix and a suffix of at least one token each")
        limit = context_length(self.model)
        if len(head) + len(tail) > limit:
            raise PromptError(
                f"prefix and suffix have {len(head) + len(tail):,} tokens, and the model's context holds {limit:,}",
                "shorten them, or score the text in parts",
            )
        labels = torch.tensor([False] * len(head) + [True] * len(tail))
        passage = Passage(torch.tensor(head + tail), labels)
        nll = self.token_nll(passage, self.route(prefix) if mix is None else mix)
        return float(nll.double().mean())

    def token_nll(self, passage: Passage, mix: Mix) -> torch.Tensor:
        """Negative log-likelihood (nats) of every labelled token [m] under the model merged by `mix`."""
        self.check_packing()
        with self.merged(mix), packed(self.model):
            return token_nll(self.model, [passage])[0]

    def check_packing(self) -> None:
        """`models.check_packing` of the base by itself, once: beside an adapter random tokens are less likely, and what
        rounding does to their losses is larger."""
        with self.turn():
            check_packing(self.model)

    @contextmanager
    def merged(self, mix: Mix, way: Way | None = None) -> Iterator[tuple[float, float]]:
        """The model merged by `mix`, for as long as the context lasts; gives the seconds of load and merge.

        way: how, if not as the engine's configuration says; with "auto" a base that can be merged into is (dense), so
        that scores do not depend on a choice. Weights are never rounded here. One thread at a time; the base weights
        are never written. Raises BankError for a mix of another bank, UsageError where this thread has the model.
        """
        with self.turn():
            started = time.perf_counter()
            loaded = self.executor.load([mix])
            ready = time.perf_counter()
            if way is None:
                way = self._way(loaded)
            with self.executor.attached(loaded, way):
                yield ready - started, time.perf_counter() - ready

    def prefetch(self, experts: Iterable[str]) -> Future[None]:
        """Brings experts into memory in the background, before a prompt asks for them; see `Executor.prefetch`."""
        if not self.executor.ready:
            with self.turn():  # its linears are found by a forward of their own
                self.executor.prepare()
        return self.executor.prefetch(experts)

    def _select(self, vector: np.ndarray) -> Mix:
        """The mix of an embedded prompt [1, d] that is to be answered: rounded, where that was asked for."""
        mix, steps = self.router.select(vector), self.executor.config.round_weights
        return mix if steps is None else rounded(mix, steps)

    def _way(self, loaded: Loaded) -> Way:
        asked = self.executor.config.execution
        if asked == "auto":
            return "dense" if loaded.empty or self.executor.plain else "stacked"
        return asked

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model for this thread alone; raises UsageError where this thread has it already."""
        turns = self._turns
        if turns.holder == threading.get_ident():
            raise UsageError(
                "this thread has an answer half read, and there is one model to merge",
                "read that stream to its end or close it first; or open a second engine with a model of its own",
            )
        with turns.lock:
            turns.holder = threading.get_ident()
            try:
                yield
            finally:
                turns.holder = None


def open_engine(
    bank: str | Path,
    base: str | None = None,
    encoder: str | None = None,
    config: RouteConfig | None = None,
    device_map: str | None = None,
    base_variant: bool = False,
    trust_remote_code: bool = False,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    quantised: str | None = None,
) -> Engine:
    """Open a bank with its base model and encoder, ready to answer.

    base, encoder: where they are, if not where the bank (or this machine's memory of it) says. config: how to route,
    if not as the bank says; without a β it is the bank's, or found anew where `active` is not what its build asked for.
    base_variant: allow other weights than the bank was built for (every answer says so). execution: how mixes run,
    and what stays in memory. quantised: round the base to "int8", "int4" or "nf4", once it is known to be the bank's;
    then it is a variant too. With execution "auto" the first choice on a machine measures it, for a few seconds.
    Raises BankError for a base of another architecture, other weights, or another encoder; ConfigError if β cannot be
    found; UsageError where a base cannot be quantised.
    """
    opened = Bank.open(Path(bank))
    manifest, routing = opened.manifest, _routing(opened, config)
    mark = Fingerprint(manifest.base.architecture, manifest.base.weights)
    where = base if base is not None else recall(mark)
    where = where if where is not None else manifest.base.id
    model = load_model(where, manifest.base.revision, device_map, trust_remote_code)
    found = fingerprint(model)
    _check_base(mark, found, manifest.base.id, where, base_variant)
    if found == mark:
        remember(where, mark)
    tokenizer = load_tokenizer(where, manifest.base.revision, trust_remote_code)
    sentence = open_encoder(opened, encoder, (model, tokenizer))
    if quantised is not None:
        quantise(model, quantised)
    variant = found != mark or quantised is not None
    engine = Engine(opened, model, tokenizer, sentence, routing, variant, execution)
    engine.executor.planner = on_demand(engine.executor)
    return engine


def _check_base(wanted: Fingerprint, found: Fingerprint, name: str, where: str, variant: bool) -> None:
    if found.architecture != wanted.architecture:
        raise BankError(
            f"the bank was built for {name!r}, and {where!r} has another architecture",
            "give the base it was built for: --base NAME_OR_FOLDER",
        )
    if found.weights != wanted.weights and not variant:
        raise BankError(
            f"{where!r} has the architecture of {name!r}, but other weights than the bank was built for",
            "give the base it was built for with --base; for a changed or quantised one on purpose: --base-variant",
        )


def _routing(bank: Bank, config: RouteConfig | None) -> RouteConfig:
    if config is not None and config.beta is not None:
        return config
    changes = {} if config is None else as_dict(config)
    changes.pop("beta", None)
    asked = bank.manifest.config.get("route", {}).get("active", bank.manifest.router.wanted)
    if changes.get("active") == asked:
        del changes["active"]  # the bank's β is the answer to it
    return route_config(bank, changes)


def base_mix(bank: Bank) -> Mix:
    """The mix of no experts: the base model."""
    return Mix((), (), "linear", bank.manifest.digest, None)
