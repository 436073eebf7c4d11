"""Results of an evaluation that never ran: random losses with known differences between methods."""

from dataclasses import replace

import numpy as np

from localmoe.evaluate.results import FORMAT, Check, ComparisonRow, MethodResult, Results, Spread
from localmoe.evaluate.statistics import perplexity

DOCUMENTS = 120
TTT = tuple(range(0, DOCUMENTS, 3))
GAINS = {"base": -0.06, "trunk": -0.004, "fine-tuned": 0.0, "merged": 0.018, "merged-1": 0.008, "merged-10": 0.019}
GAINS |= {"ensemble-3": 0.019, "ttt-trunk": 0.01, "null": -0.03}
"""Nats a token, about, over the fine-tune."""
ADDED = {"merged": 0.031, "merged-1": 0.012, "merged-10": 0.062, "ensemble-3": 1.4, "ttt-trunk": 14.2, "null": 0.03}
ACTIVE = {"merged": (3.0, 8), "merged-1": (1.0, 1), "merged-10": (9.8, 16), "ensemble-3": (3.0, 8), "null": (3.1, 9)}


def results(
    seed: int = 0,
    gains: dict[str, float] | None = None,
    checks: tuple[Check, ...] | None = None,
    ids: tuple[str, ...] = tuple(f"document-{place}" for place in range(DOCUMENTS)),
) -> Results:
    """An evaluation of the methods in `gains`, `GAINS` if none; test-time training on a third of the documents."""
    draw = np.random.default_rng(seed)
    tokens = tuple(int(count) for count in draw.integers(60, 900, len(ids)))
    common = draw.normal(2.6, 0.4, len(ids))
    methods, every = [], {}
    for name, gain in (GAINS if gains is None else gains).items():
        places = tuple(range(0, len(ids), 3 if name.startswith("ttt") else 1))
        every[name] = [float((common[p] - gain + draw.normal(0, 0.02)) * tokens[p]) for p in places]
        methods.append(_method(name, places, every[name], tokens))
    rows = [
        _row(method, baseline, tokens)
        for baseline in methods
        if baseline.name in ("fine-tuned", "base")
        for method in methods
        if method is not baseline
    ]
    leaks = (Check("suffix mutation", True, "40 mixes, none changed"), Check("exact duplicates", True, "none"))
    return Results(
        FORMAT,
        {
            "digest": "ab" * 32,
            "prefix_tokens": 50,
            "query_tokens": 50,
            "documents": {"train": 1800, "tune": 100, "test": len(ids)},
        },
        {
            "command": "localmoe eval bank -o out",
            "eval": {"prefix": 50, "seed": seed},
            "routable": 7,
            "machine": {"cpu": "AMD EPYC", "threads": 1},
        },
        ids,
        tuple(f"e{place % 7:02d}" for place in range(len(ids))),
        tokens,
        tuple(4 * count for count in tokens),
        tuple(methods),
        tuple(rows),
        leaks if checks is None else checks,
        734.0,
    )


def _method(name: str, places: tuple[int, ...], nll: list[float], tokens: tuple[int, ...]) -> MethodResult:
    counts = [tokens[place] for place in places]
    mean, most = ACTIVE.get(name, (None, None))
    seconds = {"added": Spread(ADDED[name], ADDED[name] * 1.4)} if name in ADDED else {}
    if name == "base" or name.startswith("merged"):
        seconds |= {"first_token": Spread(0.05, 0.06), "per_token": Spread(0.02, 0.03)}
    detail = {"similarity": [0.2 + 0.005 * place for place in places]} if name == "merged" else {}
    return MethodResult(
        name,
        f"method {name}",
        name == "merged",
        places,
        tuple(nll),
        perplexity(nll, counts),
        float(np.exp(np.mean(np.array(nll) / counts))),
        float(sum(nll) / np.log(2) / (4 * sum(counts))),
        0 if name == "base" else 912_000,
        mean,
        most,
        0.025 if name == "merged" else None,
        seconds,
        "",
        detail,
    )


def _row(method: MethodResult, baseline: MethodResult, tokens: tuple[int, ...]) -> ComparisonRow:
    places = sorted(set(method.documents) & set(baseline.documents))
    ours, theirs = (dict(zip(m.documents, m.nll, strict=True)) for m in (method, baseline))
    differences = np.array([(theirs[p] - ours[p]) / tokens[p] for p in places])
    gain, error = float(differences.mean()), float(differences.std() / np.sqrt(len(places)))
    interval = (gain - 1.96 * error, gain + 1.96 * error)
    return ComparisonRow(method.name, baseline.name, method.default, gain, interval, len(places), "")


def failing(made: Results) -> Results:
    """The same with a leak check that failed."""
    return replace(
        made, checks=(*made.checks, Check("near duplicates", False, "3 of 120 documents <b>stand</b> in train"))
    )
