"""The demo: a bank from text that every machine has, the source of Python's standard library, and what it is worth."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from localmoe.bank.store import Bank
from localmoe.config import BuildConfig, ClusterConfig, CorpusConfig, GenerateConfig, TrainConfig
from localmoe.errors import CorpusError
from localmoe.evaluate.protocol import held_out, score_alone, score_merged
from localmoe.evaluate.statistics import Comparison, compare, perplexity
from localmoe.runtime.answers import Answer
from localmoe.runtime.engine import Engine, base_mix

SAMPLE_TOKENS = 22_000
"""Tokens trained on, twice."""
PREFIX_TOKENS = 64
DOCUMENT_TOKENS = 192
TEST_DOCUMENTS = 100
PROMPTS = (
    "class ThreadedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):\n    def handle(self):\n",
    'def parse_header(line):\n    """Parse an email header into its name, value and parameters."""\n',
    "async def gather_with_timeout(coroutines, timeout):\n    loop = asyncio.get_running_loop()\n",
)
_NOT_CODE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data")


@dataclass(frozen=True)
class Worth:
    """Perplexity on held-out documents, and what merging gains over trunk and base."""

    documents: int
    tokens: int
    base: float
    trunk: float | None
    merged: float
    over_base: Comparison
    over_trunk: Comparison | None
    active: float
    """Mean number of experts in a mix."""


@dataclass(frozen=True)
class Exchange:
    """One prompt, answered by the base and by the model merged for it."""

    prompt: str
    base: Answer
    merged: Answer


def corpus() -> Path:
    """The folder of the running Python's standard library. Raises CorpusError where it has no source."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not any(folder.glob("*.py")):
        raise CorpusError(
            f"this Python has no source of its standard library in {folder}",
            "build a bank of a folder of your own: localmoe build FOLDER BANK",
        )
    return folder


def configuration(base: str, encoder: str) -> BuildConfig:
    """Settings that make a bank of 8 experts in a few minutes on two cores; of rank 16, in 90 MB instead of 340."""
    return BuildConfig(
        base=base,
        encoder=encoder,
        corpus=CorpusConfig(
            include=("*.py",),
            exclude=_NOT_CODE,
            passage_tokens=DOCUMENT_TOKENS,
            passages_per_document=1,
            sample_tokens=SAMPLE_TOKENS,
            tune_fraction=0.13,
            test_fraction=0.45,
        ),
        cluster=ClusterConfig(clusters=8, min_tokens=1_000),
        train=TrainConfig(rank=16, alpha=16.0, learning_rate=2e-3),
    )


def measure(engine: Engine, progress: Callable[[int, int], None]) -> Worth:
    """Score base, trunk and merged models on the same held-out documents; `progress` gets done and total."""
    trials = held_out(engine, PREFIX_TOKENS, DOCUMENT_TOKENS, TEST_DOCUMENTS)
    counts = [trial.passage.predicted for trial in trials]
    trunk_adapter = engine.bank.trunk()
    rounds = 2 if trunk_adapter is None else 3
    total = rounds * len(trials)
    base = score_alone(engine, trials, None, lambda done: progress(done, total))
    merged, mixes = score_merged(engine, trials, lambda done: progress(len(trials) + done, total))
    trunk = None
    if trunk_adapter is not None:
        trunk = score_alone(engine, trials, trunk_adapter, lambda done: progress(2 * len(trials) + done, total))
    return Worth(
        len(trials),
        sum(counts),
        perplexity(base, counts),
        perplexity(trunk, counts) if trunk is not None else None,
        perplexity(merged, counts),
        compare(merged, base, counts),
        compare(merged, trunk, counts) if trunk is not None else None,
        sum(len(mix.experts) for mix in mixes) / len(mixes),
    )


def ask(engine: Engine, prompt: str, new_tokens: int = 40) -> Exchange:
    """The same prompt to the base and to the model merged for it."""
    config = GenerateConfig(max_new_tokens=new_tokens)
    alone = engine.start(prompt, config, base_mix(engine.bank))
    base = alone.answer("".join(alone))
    return Exchange(prompt, base, engine.generate(prompt, config))


def cost(exchanges: list[Exchange]) -> dict[str, float]:
    """Median seconds that routing and merging took, and of the first token with and without them."""
    merged = [exchange.merged.seconds for exchange in exchanges]
    return {
        "embed": median(seconds.embed for seconds in merged),
        "select": median(seconds.select for seconds in merged),
        "load": median(seconds.load for seconds in merged),
        "merge": median(seconds.merge for seconds in merged),
        "first token, merged": median(seconds.first_token for seconds in merged),
        "first token, base": median(exchange.base.seconds.first_token for exchange in exchanges),
    }


def title(bank: Bank) -> str:
    """What the demo's bank was made of."""
    count = len(bank.manifest.experts)
    return f"{count} experts from the standard library of Python {platform.python_version()}"
