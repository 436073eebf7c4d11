"""Encoders: milliseconds a prompt, and whether a prompt's first tokens lead where the whole document does.

    python benchmarks/encoders.py ARTICLES.jsonl[.gz] [--mpnet FOLDER] [--articles 2000] [--held-out 500] [--json PATH]

Times: the encoders in turn on every prompt, one prompt at a time, in a process of its own for each number of cores.
Quality: bisecting k-means over the articles; of held-out articles, the share whose first 50 tokens have the same
nearest centroid as the whole (its first `--characters`), kappa = (share − chance) / (1 − chance) with chance from
the sizes of the clusters, and the margin = cosine to the nearest centroid − cosine to the second.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
BEFORE = "MiniLM by SentenceTransformer.encode"
LENGTHS = (20, 50)
PREFIX = 50


def texts(path: Path, count: int) -> list[str]:
    """The texts of the first articles."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, count)]


def encoders(arguments: argparse.Namespace, names: list[str]) -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Name in the table → encode."""
    from localmoe.encoders import load_encoder
    from localmoe.models import load_model, load_tokenizer

    base = (load_model(arguments.base), load_tokenizer(arguments.base))
    where = {"MiniLM": MINILM, "mpnet": str(arguments.mpnet), "static": "static", "base": "base"}
    found: dict[str, Callable[[list[str]], np.ndarray]] = {}
    for name in names:
        if name == BEFORE:
            from sentence_transformers import SentenceTransformer

            from localmoe.models import locate

            model = SentenceTransformer(locate(MINILM))
            found[name] = lambda part, model=model: model.encode(part, show_progress_bar=False)  # type: ignore[misc]
        else:
            found[name] = load_encoder(where[name], base=base).encode
    return found


def prefixes(arguments: argparse.Namespace, documents: list[str], length: int) -> list[str]:
    """The first tokens (of the base's tokenizer) of documents, as text."""
    from localmoe.models import load_tokenizer

    tokenizer = load_tokenizer(arguments.base)
    return [tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:length]) for text in documents]


def times(arguments: argparse.Namespace, documents: list[str]) -> dict[str, Any]:
    """Milliseconds a prompt on the cores that this process may use, and how far the two ways of MiniLM differ.

    Of the clock, and of the processor (all threads together), which other work on the machine disturbs less.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = encoders(arguments, [BEFORE, *arguments.encoders])
    spent: dict[str, dict[str, list[tuple[float, float]]]] = {}
    differ = 0.0
    for length in LENGTHS:
        prompts = prefixes(arguments, documents[: arguments.prompts], length)
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for prompt in prompts[:2] + prompts:
            for name, encode in found.items():
                clock, processor = time.perf_counter(), time.process_time()
                encode([prompt])
                rows[name].append((time.perf_counter() - clock, time.process_time() - processor))
            if "MiniLM" in found:
                differ = max(differ, float(np.abs(found["MiniLM"]([prompt]) - found[BEFORE]([prompt])).max()))
        spent[str(length)] = {name: values[2:] for name, values in rows.items()}
    return {
        "cores": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "minilm_differs_by": differ,
        **{
            kind: {
                length: {name: _spread([row[place] for row in v]) for name, v in rows.items()}
                for length, rows in spent.items()
            }
            for place, kind in enumerate(("milliseconds", "processor_milliseconds"))
        },
    }


def quality(arguments: argparse.Namespace, documents: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Agreement and margins of every encoder, one after the other."""
    from localmoe.config import ClusterConfig
    from localmoe.train.clustering import bisect

    whole = [text[: arguments.characters] for text in documents]
    held_out = whole[arguments.articles :]
    prompts = prefixes(arguments, held_out, PREFIX)
    for name in arguments.encoders:
        (encode,) = encoders(arguments, [name]).values()
        begun = time.process_time()
        vectors = encode(whole)
        seconds = time.process_time() - begun
        train = vectors[: arguments.articles]
        config = ClusterConfig(clusters=arguments.clusters, min_tokens=0)
        found = bisect(train, config, arguments.clusters, np.ones(len(train), dtype=np.int64), 0, np.arange(len(train)))
        centroids = np.asarray(found.centroids)
        cosines = encode(prompts) @ centroids.T
        same = cosines.argmax(1) == (vectors[arguments.articles :] @ centroids.T).argmax(1)
        sizes = np.bincount(found.assignment[found.assignment >= 0], minlength=len(centroids)) / len(train)
        chance, best = float((sizes**2).sum()), np.sort(cosines, axis=1)[:, ::-1]
        yield (
            name,
            {
                "same_cluster": float(same.mean()),
                "standard_error": float(same.std() / len(same) ** 0.5),
                "kappa": float((same.mean() - chance) / (1 - chance)),
                "margin": float((best[:, 0] - best[:, 1]).mean()),
                "margin_in_deviations": float(((best[:, 0] - best[:, 1]) / cosines.std(axis=1)).mean()),
                "cosine_to_nearest": float(best[:, 0].mean()),
                "clusters": len(centroids),
                "largest_cluster": float(sizes.max()),
                "processor_seconds_per_document": seconds / len(whole),
            },
        )


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([1e3 * value for value in values], n=4)
    return {"median": round(middle, 3), "p25": round(low, 3), "p75": round(high, 3)}


def processor() -> str:
    """Its name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def worker(cores: int) -> dict[str, Any]:
    """The times on so many cores, the first ones that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < cores:
        raise SystemExit(f"{cores} cores are asked for, and this process may use {len(allowed)}")
    chosen = ",".join(map(str, allowed[:cores]))
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["taskset", "-c", chosen, sys.executable, __file__, *sys.argv[1:], "--worker"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """What is known so far."""
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles_file", type=Path)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2; without it, mpnet is left out")
    parser.add_argument("--encoders", nargs="+", choices=["static", "MiniLM", "base", "mpnet"])
    parser.add_argument("--articles", type=int, default=2000, help="articles that are clustered")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--characters", type=int, default=1000, help="of an article, for the quality")
    parser.add_argument("--prompts", type=int, default=32, help="prompts that are timed, of each length")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["times", "quality"])
    parser.add_argument("--json", type=Path, help="write the figures there; what another run left there is kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encoders is None:
        arguments.encoders = ["static", "MiniLM", "base"] + (["mpnet"] if arguments.mpnet else [])
    documents = texts(arguments.articles_file, arguments.articles + arguments.held_out)
    if arguments.worker:
        print(json.dumps(times(arguments, documents[arguments.articles :])))
        return
    report = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    report["machine"] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "sentence-transformers", "numpy")},
    }
    report |= {
        name: getattr(arguments, name) for name in ("base", "articles", "held_out", "characters", "clusters", "prompts")
    }
    if arguments.only != "quality":
        report["times"] = [worker(cores) for cores in arguments.cores]
        for result in report["times"]:
            for kind, length in itertools.product(("milliseconds", "processor_milliseconds"), map(str, LENGTHS)):
                line = ", ".join(f"{name} {spread['median']:.2f}" for name, spread in result[kind][length].items())
                print(f"{result['cores']} cores, {length} tokens, {kind.replace('_', ' ')}: {line}", flush=True)
        write(arguments, report)
    if arguments.only != "times":
        report.setdefault("quality", {})
        for name, found in quality(arguments, documents):
            report["quality"][name] = found
            print(name, json.dumps(found), flush=True)
            write(arguments, report)


if __name__ == "__main__":
    main()
