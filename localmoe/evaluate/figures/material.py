"""Material of figures: banks with their held-out documents and token losses, and results of evaluations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from localmoe.config import EvalConfig, RouteConfig
from localmoe.errors import UsageError
from localmoe.evaluate.figures.options import FigureConfig
from localmoe.evaluate.figures.token_losses import TokenLosses
from localmoe.evaluate.leaks import duplicates_of_train
from localmoe.evaluate.protocol import Cut, Trial, trials_of
from localmoe.evaluate.results import Results
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.identity import fingerprint
from localmoe.models import context_length, packed
from localmoe.packing import Passage, token_nll
from localmoe.routing import Mix, find_beta, route, similarities
from localmoe.runtime.engine import Engine, base_mix

Watch = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and of how much."""

_PACKED = 2048
"""Tokens of one forward, about."""


class Source:
    """One bank that figures are made from; it is opened when first used, and can be closed again."""

    def __init__(
        self, name: str, opened: Callable[[], Engine], config: EvalConfig, losses: TokenLosses, watch: Watch
    ) -> None:
        self.name = name
        self.config = config
        self.losses = losses
        self.watch = watch
        self._open = opened
        self._held: dict[int, HeldOut] = {}

    @cached_property
    def engine(self) -> Engine:
        """The bank with its models."""
        engine = self._open()
        engine.check_packing()
        return engine

    @cached_property
    def base(self) -> str:
        """Fingerprint of the base that is loaded."""
        mark = self.engine.bank.manifest.base
        weights = fingerprint(self.engine.model).weights if self.engine.base_variant else mark.weights
        return f"{mark.architecture} {weights} {self.engine.model.dtype} {torch.__version__}"

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Expert → content hash."""
        experts = self.engine.bank.manifest.experts
        return {expert.id: expert.adapter.sha256 for expert in experts if expert.adapter is not None}

    @cached_property
    def without(self) -> frozenset[str]:
        """Held-out documents that stand, exactly or nearly, in train."""
        return duplicates_of_train(self.engine, self.config.near_duplicate, self.length)[0]

    @cached_property
    def length(self) -> int:
        """Tokens of a document that are read at most."""
        return min(self.config.length, context_length(self.engine.model))

    def held_out(self, prefix: int) -> HeldOut:
        """The held-out documents with more than `prefix` tokens. Raises CorpusError if there are none."""
        if prefix not in self._held:
            self._held[prefix] = HeldOut(self, prefix)
        return self._held[prefix]

    def close(self) -> None:
        """Give the models' memory back; what is asked of the source next opens it again."""
        self._held.clear()
        self.__dict__.pop("engine", None)


class HeldOut:
    """The same held-out documents for every point of a figure, with the loss of every token under any mix.

    Raises UsageError for a bank of conversations.
    """

    def __init__(self, source: Source, prefix: int) -> None:
        self.source = source
        self.engine = source.engine
        self.prefix = prefix
        self._cut = Cut(prefix, prefix, source.length)
        trials = trials_of(self.engine, "test", self._cut, source.config.documents, source.without)
        if any(trial.messages for trial in trials):
            raise UsageError(
                f"{source.name} holds conversations, whose questions route and whose answers are scored; figures cut "
                f"texts after {prefix} tokens",
                "evaluate it without --figure, or draw the figure of a bank of texts",
            )
        self.trials: tuple[Trial, ...] = tuple(trials)
        self._queries: dict[tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.trials)

    def queries(self, prefix: int | None = None) -> torch.Tensor:
        """φ of the first `prefix` tokens of every document (none = as many as carry no loss): [n, d] fp32."""
        return self._embedded("test", self.prefix if prefix is None else prefix, self.trials)

    @cached_property
    def tune_queries(self) -> torch.Tensor:
        """φ of the prefixes of the tune documents: [m, d] fp32."""
        return self._embedded(
            "tune", self.prefix, trials_of(self.engine, "tune", self._cut, without=self.source.without)
        )

    @cached_property
    def clusters(self) -> list[int]:
        """For every document the place of the routable expert whose centroid is nearest to all of it."""
        bank, centroids = self.engine.bank, self.engine.router.centroids
        rows = {name: row for row, name in enumerate(bank.documents()["id"].to_pylist())}
        whole = bank.embeddings()[[rows[trial.document] for trial in self.trials]].astype(np.float32)
        nearest: list[int] = (torch.from_numpy(whole) @ centroids.vectors.T).argmax(dim=1).tolist()
        return nearest

    def counts(self, prefix: int | None = None) -> list[int]:
        """Tokens after the prefix, of every document."""
        return [len(trial.passage) - (self.prefix if prefix is None else prefix) for trial in self.trials]

    def with_active(self, active: float) -> RouteConfig:
        """Sparse softmax with so many active experts on average: β found on the tune documents."""
        config = self.engine.config
        scores = similarities(self.tune_queries, self.engine.router.centroids)
        beta = find_beta(scores, active, config.tau, config.max_experts).beta
        return replace(config, router="sparse_softmax", beta=beta, active=active)

    def mixes(self, config: RouteConfig | None = None, query: int | None = None) -> list[Mix]:
        """The mix of every document's query, by the bank's own routing if none is given."""
        own = self.engine.config if config is None else config
        return route(self.queries(query), self.engine.router.centroids, own)

    def alone(self, expert: str) -> Mix:
        """The mix of one expert."""
        return replace(base_mix(self.engine.bank), experts=(expert,), weights=(1.0,))

    def nll(self, mixes: Sequence[Mix], title: str, prefix: int | None = None) -> list[float]:
        """Summed nll (nats) after the prefix, of every document under the model merged by its mix."""
        self._fill(list(enumerate(mixes)), title)
        return [float(self._suffix(place, mix, prefix).sum()) for place, mix in enumerate(mixes)]

    def ensemble_nll(self, mixes: Sequence[Mix], title: str, prefix: int | None = None) -> list[float]:
        """Summed −log Σ_k w_k p_k(token) after the prefix: the same mixes in probability space."""
        wanted = [(place, self.alone(expert)) for place, mix in enumerate(mixes) for expert in mix.experts]
        self._fill(wanted, title)
        totals = []
        for place, mix in enumerate(mixes):
            parts = np.stack([self._suffix(place, self.alone(expert), prefix) for expert in mix.experts])
            weighted = np.log(np.array(mix.weights, dtype=np.float64))[:, None] - parts
            totals.append(float(-np.logaddexp.reduce(weighted, axis=0).sum()))
        return totals

    def measured(
        self, nll: Sequence[float], reference: Sequence[float] | None = None, prefix: int | None = None
    ) -> dict[str, float]:
        """Perplexity, and the gain over a reference with its 95 % interval."""
        counts = self.counts(prefix)
        found = {"perplexity": perplexity(nll, counts)}
        if reference is not None:
            gain = compare(nll, reference, counts, self.source.config.seed)
            found |= {"gain": gain.gain, "low": gain.low, "high": gain.high}
        return found

    def settings(self) -> dict[str, object]:
        """What a figure says of its bank and documents."""
        manifest, config = self.engine.bank.manifest, self.engine.config
        return {
            "bank": self.source.name,
            "digest": manifest.digest,
            "base": manifest.base.id,
            "encoder": manifest.encoder.id,
            "experts": len(self.engine.router.centroids.experts),
            "documents": len(self.trials),
            "tokens": sum(self.counts()),
            "prefix": self.prefix,
            "length": self._cut.length,
            "router": config.router,
            "beta": config.beta,
            "tau": config.tau,
        }

    def _embedded(self, split: str, prefix: int, trials: Sequence[Trial]) -> torch.Tensor:
        if (split, prefix) not in self._queries:
            decode = self.engine.tokenizer.decode
            texts = [decode(trial.passage.tokens[:prefix], skip_special_tokens=True) for trial in trials]
            self._queries[split, prefix] = torch.from_numpy(self.engine.encoder.encode(texts))
        return self._queries[split, prefix]

    def _fill(self, wanted: Sequence[tuple[int, Mix]], title: str) -> None:
        """Compute what is not kept yet: one merge for every mix, its documents packed into rows."""
        missing: dict[str, tuple[Mix, list[int]]] = {}
        for place, mix in dict.fromkeys(wanted):
            if self._key(place, mix) not in self.source.losses:
                missing.setdefault(mix.key(self.source.base, self.source.hashes), (mix, []))[1].append(place)
        total, done = sum(len(places) for _, places in missing.values()), 0
        for mix, places in missing.values():
            with self.engine.merged(mix), packed(self.engine.model):
                for part in self._rows(places):
                    passages = [_all_labels(self.trials[place].passage) for place in part]
                    for place, nll in zip(part, token_nll(self.engine.model, passages), strict=True):
                        self.source.losses[self._key(place, mix)] = nll.numpy()
                    done += len(part)
                    self.source.watch(title, done, total)

    def _rows(self, places: Sequence[int]) -> list[list[int]]:
        """Documents that go through one forward together."""
        rows: list[list[int]] = [[]]
        tokens = 0
        for place in places:
            length = len(self.trials[place].passage)
            if rows[-1] and tokens + length > _PACKED:
                rows.append([])
                tokens = 0
            rows[-1].append(place)
            tokens += length
        return rows

    def _suffix(self, place: int, mix: Mix, prefix: int | None) -> np.ndarray:
        """nll [m] fp64 of the tokens after the prefix."""
        start = self.prefix if prefix is None else prefix
        return self.source.losses[self._key(place, mix)].astype(np.float64)[start - 1 :]

    def _key(self, place: int, mix: Mix) -> str:
        tokens = self.trials[place].passage.tokens.numpy().tobytes()
        parts = [hashlib.sha256(tokens).hexdigest(), mix.key(self.source.base, self.source.hashes)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Material:
    """All that a figure may be made from."""

    config: FigureConfig
    evaluation: EvalConfig
    sources: tuple[Source, ...] = ()
    results: tuple[tuple[str, Results], ...] = ()

    @property
    def source(self) -> Source:
        """The bank that a figure of one bank is made from. Raises UsageError without one."""
        if not self.sources:
            raise UsageError("this figure is made from a bank, and none was given", "localmoe eval BANK --figure NAME")
        return self.sources[0]

    def held_out(self) -> HeldOut:
        """The held-out documents of that bank, at the evaluation's own prefix."""
        return self.source.held_out(self.evaluation.prefix)

    def every_held_out(self) -> Iterator[HeldOut]:
        """The held-out documents of every bank, one bank at a time; all but the first are closed again.

        Raises UsageError where two banks hold out different documents.
        """
        first: list[str] | None = None
        for source in self.sources:
            held = source.held_out(self.evaluation.prefix)
            names = [trial.document for trial in held.trials]
            if first is not None and names != first:
                raise UsageError(
                    f"{source.name} holds out other documents than {self.source.name}: they cannot be compared",
                    "build both of the same corpus, with the same seed and fractions",
                )
            first = names
            yield held
            if source is not self.sources[0]:
                source.close()

    def some_results(self) -> tuple[tuple[str, Results], ...]:
        """Results by the name of their folder. Raises UsageError without any."""
        if not self.results:
            raise UsageError(
                "this figure is made from results of an evaluation, and there are none",
                "make them first: localmoe eval BANK -o FOLDER; those of others: --with FOLDER",
            )
        return self.results


def _all_labels(passage: Passage) -> Passage:
    return Passage(passage.tokens, torch.ones(len(passage), dtype=torch.bool))
