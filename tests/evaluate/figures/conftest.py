"""Material of the tiny bank for every figure: held-out documents, results that were made up, a benchmark's report."""

import json
from collections.abc import Iterator
from pathlib import Path

import made_results
import pytest

from localmoe.config import EvalConfig
from localmoe.evaluate.figures.material import HeldOut, Material, Source
from localmoe.evaluate.figures.options import FigureConfig
from localmoe.evaluate.figures.token_losses import TokenLosses
from localmoe.runtime.engine import Engine, open_engine

PREFIX = 12
CONFIG = FigureConfig(
    active=(1, 2),
    betas=(0.0, 0.1, 1.0),
    taus=(0.01, 0.1),
    lambdas=(0.01, 1.0),
    query_prefixes=(4, 8, 12),
    prefixes=(8, 12),
    clusters=3,
    queries=("boat sail", "bread flour"),
    prompts=("boat sail",),
    samples=1,
    text_tokens=3,
)


def _overhead(folder: Path) -> Path:
    """As `benchmarks/overhead.py` writes it."""
    stages = {"embed": 0.0, "select": 0.001, "load": 0.002, "merge": 0.01, "first_token": 0.05, "total": 2.03}
    sides = {"base": stages | {"first_token": 0.03, "total": 2.01}, "localmoe": stages}
    parts = {f"N={active} r={rank}": {"medians": sides} for active in (3, 10) for rank in (16, 64)}
    report = {
        "command": "overhead.py",
        "settings": {"shape": None, "base": "tiny"},
        "machine": {"cpu": "a CPU"},
        "dtype": "float32",
        "first": parts,
        "answers": {f"{name} {tokens} tokens": part for name, part in parts.items() for tokens in (32, 100)},
    }
    path = folder / "overhead.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def figure_engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture(scope="session")
def material(figure_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("figures")
    losses = TokenLosses(folder / "token-losses.sqlite")
    evaluation = EvalConfig(prefix=PREFIX, near_duplicate=1.0)
    sources = [Source(name, lambda: figure_engine, evaluation, losses, lambda *_: None) for name in ("one", "two")]
    config = replace(CONFIG, overhead=_overhead(folder))
    ids = tuple(trial.document for trial in sources[0].held_out(PREFIX).trials)
    yield Material(config, evaluation, tuple(sources), (("made up", made_results.results(ids=ids)),))
    losses.close()


@pytest.fixture(scope="session")
def held(material: Material) -> HeldOut:
    return material.held_out()
