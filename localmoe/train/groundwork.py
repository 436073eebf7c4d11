"""Groundwork: the corpus split, embedded and clustered; what all trainings of a build share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.bank.manifest import AdapterRecord
from localmoe.config import BuildConfig, TrainConfig
from localmoe.errors import ConfigError, UnknownNameError
from localmoe.models import context_length
from localmoe.routing import routers
from localmoe.train.checks import nearest_rows
from localmoe.train.clusters import Clusters, nearest
from localmoe.train.experts import AdapterTask
from localmoe.train.rows import Rows
from localmoe.train.work import Work

TRUNK = "trunk"
"""Name of the task that trains the trunk."""
TRUNK_FLOOR = 0.25
"""Share of its rate to which a trunk falls, at most: higher spoils it, lower leaves the experts little to do."""
TRUNK_EPOCHS, JOINT_EPOCHS = 1.5, 1.0
"""Passes of a trunk by itself and with its experts, where the configuration leaves them open."""
EPOCHS_AFTER_TRUNK, EPOCHS_FROM_BASE = 0.5, 1.0
"""Passes of an expert, where the configuration leaves them open."""
RATE_WITH_TRUNK, RATE_AFTER_TRUNK = 0.3, 0.25
"""Rate of experts with a trunk and after it, as a multiple of its, where the configuration leaves it open."""
BATCH_AFTER_TRUNK = 1
"""Passages per step of an expert that goes on from a trunk: it has few of them, and more steps teach it more."""


@dataclass(frozen=True)
class Groundwork:
    """What lies ready before the first training."""

    path: Path
    work: Work
    config: BuildConfig
    rows: Rows
    clusters: Clusters
    tune: tuple[tuple[int, ...], ...]
    """For every cluster the tune documents that its expert is checked on."""
    learning_rate: float
    """Peak rate of the trunk: as configured, or as found."""
    expert_rate: float
    """Rate of experts with a trunk (recipe `joint`) or after it, as a multiple of its: as configured, or as found."""
    read: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Row → passages that the trunk has read, where it makes less than one pass; experts read the others first."""

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """`"e00"`, `"e01"`, … of the clusters' experts."""
        count = len(self.clusters.access)
        width = max(2, len(str(count - 1)))
        return tuple(f"e{k:0{width}d}" for k in range(count))

    def task(
        self, name: str, seed: int, start: AdapterRecord | None, train: Sequence[int], tune: Sequence[int]
    ) -> AdapterTask:
        """The task to train the adapter `name` on the train documents, and to check it on the tune documents."""
        train_config, after_trunk = self.config.train, start is not None
        config = replace(train_config, batch=expert_batch(train_config, after_trunk)) if name != TRUNK else train_config
        return AdapterTask(
            bank=str(self.path),
            key=self.work.key,
            name=name,
            base=self.config.base,
            revision=self.config.revision,
            base_id=name_in_bank(self.config.base),
            config=config,
            learning_rate=self.learning_rate * (self._rate_after_trunk if after_trunk else 1.0),
            epochs=trunk_epochs(config) if name == TRUNK else expert_epochs(config, after_trunk),
            floor=trunk_floor(config) if name == TRUNK else 0.0,
            seed=seed,
            start=start,
            train_rows=tuple(train),
            tune_rows=tuple(tune),
            read={row: self.read[row] for row in train if row in self.read} if after_trunk else {},
        )

    def expert_task(self, k: int, start: AdapterRecord | None) -> AdapterTask:
        """The task to train the expert of cluster k, from a trunk or from the base."""
        name, seed = f"experts/{self.expert_ids[k]}", self.config.seed + 1 + k
        return self.task(name, seed, start, self.clusters.rows(k), self.tune[k])

    @property
    def _rate_after_trunk(self) -> float:
        """Of an expert that a finished trunk teaches: with recipe `joint` one with an access set."""
        return rate_after_trunk(self.config.train) if self.config.train.recipe == "joint" else self.expert_rate

    def tokens(self, rows: Iterable[int], epochs: float) -> int:
        """Tokens that so many passes over these documents see."""
        return round(epochs * int(self.rows.tokens[list(rows)].sum()))


def trunk_epochs(config: TrainConfig) -> float:
    """Passes of the trunk over all public documents, by itself or with the experts."""
    if config.recipe == "joint":
        return config.epochs if config.epochs is not None else JOINT_EPOCHS
    return config.trunk_epochs if config.trunk_epochs is not None else TRUNK_EPOCHS


def trunk_floor(config: TrainConfig) -> float:
    """Share of its rate at which the trunk ends: experts go on from there, but for those trained with it."""
    return 0.0 if config.recipe == "joint" else min(TRUNK_FLOOR, rate_after_trunk(config))


def expert_rate(config: TrainConfig) -> float:
    """Rate of most experts, as a multiple of their trunk's."""
    if config.expert_rate is None and config.recipe == "joint":
        return RATE_WITH_TRUNK
    return rate_after_trunk(config)


def rate_after_trunk(config: TrainConfig) -> float:
    """Rate of experts that go on from a finished trunk, as a multiple of its."""
    return config.expert_rate if config.expert_rate is not None else RATE_AFTER_TRUNK


def expert_epochs(config: TrainConfig, after_trunk: bool) -> float:
    """Passes of each expert over its own documents."""
    if config.epochs is not None:
        return config.epochs
    return EPOCHS_AFTER_TRUNK if after_trunk else EPOCHS_FROM_BASE


def expert_batch(config: TrainConfig, after_trunk: bool) -> int:
    """Passages per step of an expert."""
    if config.expert_batch is not None:
        return config.expert_batch
    return BATCH_AFTER_TRUNK if after_trunk else config.batch


def check_settings(model: Any, config: BuildConfig) -> None:
    """Raises ConfigError for passages that do not fit the base's context, for a rate or a number to be tried alone, and
    for passes that the recipe does not have.

    Raises UnknownNameError for an unknown router.
    """
    if config.train.recipe == "joint" and config.train.trunk_epochs is not None:
        raise ConfigError(
            f"train.trunk_epochs={config.train.trunk_epochs:g} has no meaning for recipe 'joint', which trains trunk "
            "and experts together",
            "set train.epochs, their passes, or train.recipe=trunk",
        )
    limit = context_length(model)
    if config.corpus.passage_tokens > limit:
        raise ConfigError(
            f"passages of {config.corpus.passage_tokens:,} tokens do not fit the base model's context of {limit:,}",
            f"set corpus.passage_tokens={limit} or less",
        )
    if len(set(config.search.rates)) == 1:
        raise ConfigError(
            f"search.rates holds {config.search.rates[0]:g} alone, and nothing to compare it with",
            "try another rate too, e.g. --try-rate 0.5 --try-rate 1, or choose one: --learning-rate",
        )
    if len(set(config.search.active)) == 1:
        raise ConfigError(
            f"search.active holds {config.search.active[0]:g} alone, and nothing to compare it with",
            "try another number too, e.g. --try-active 3 --try-active 10, or choose one: --active",
        )
    if config.route.router not in routers:
        raise UnknownNameError("router", config.route.router, routers)


def checked_on(rows: Rows, clusters: Clusters, embeddings: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """For every cluster the tune documents of its access set that are nearest to it of all, at most AT_MOST."""
    tune = np.array(rows.where("tune"), dtype=np.int64)
    best, similarity = nearest(clusters, embeddings[tune], [rows.access[row] for row in tune])
    known = best >= 0
    near = nearest_rows(best[known], similarity[known], len(clusters.access))
    return tuple(tuple(sorted(tune[known][places].tolist())) for places in near)


def name_in_bank(name: str) -> str:
    """A hub id as it is; of a folder its name alone, since a bank holds no paths."""
    return Path(name).resolve().name if Path(name).is_dir() else name
