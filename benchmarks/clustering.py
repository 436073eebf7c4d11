"""Our bisecting k-means against scikit-learn's: time and inertia, on embeddings that look like those of sentences.

    python benchmarks/clustering.py [--points N] [--dim D] [--clusters K] [--repeats R] [--threads T] [--seed S]
                                    [--json PATH]

Both split the cluster of the largest inertia, with equal starts (k-means++), iterations, tolerance, dtype and threads,
in turn in one process. Both inertias are computed here in fp64, from the labels alone. The floor is the time in which
a plain sum reads the rows that no split can do without: every split cluster twice (sides; inertia and radius).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.cluster import BisectingKMeans
from threadpoolctl import threadpool_limits

from localmoe.config import ClusterConfig
from localmoe.train.clustering import Clustering, bisect


def sentence_like(points: int, dim: int, seed: int, topics: int = 500) -> np.ndarray:
    """[n, d] fp32 unit rows ∝ 0.3·shared + 0.6·topic + 0.75·own, all of spectrum λ_j ∝ 1/j; topic sizes ∝ 1/rank."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).float() ** -0.5
    spectrum /= spectrum.norm()
    topic = torch.randn(topics, dim, generator=generator) * spectrum
    shared = torch.randn(dim, generator=generator) * spectrum
    sizes = 1 / torch.arange(1, topics + 1).float()
    rows = torch.randn(points, dim, generator=generator).mul_(spectrum).mul_(0.75)
    rows += 0.6 * topic[torch.multinomial(sizes, points, replacement=True, generator=generator)]
    rows += 0.3 * shared
    rows /= rows.norm(dim=1, keepdim=True)
    return rows.numpy()


def inertia_of(rows: np.ndarray, labels: np.ndarray) -> float:
    """Σ‖x‖² − Σ_k ‖Σ_{x in k} x‖² / n_k in fp64."""
    inertia = 0.0
    for k in np.unique(labels):
        members = rows[labels == k]
        inertia += float(np.square(members, dtype=np.float64).sum())
        inertia -= float(np.square(members.sum(axis=0, dtype=np.float64)).sum()) / len(members)
    return inertia


def bandwidth(rows: np.ndarray) -> float:
    """Bytes a second that a plain sum reads, the best of five."""
    tensor = torch.from_numpy(rows)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tensor.sum()
        seconds.append(time.perf_counter() - start)
    return rows.nbytes / min(seconds)


def run_ours(rows: np.ndarray, config: ClusterConfig, clusters: int, seed: int) -> tuple[dict[str, float], Clustering]:
    """Seconds on the clock and of the processor, and inertia."""
    clock, processor = time.perf_counter(), time.process_time()
    clustering = bisect(rows, config, clusters, seed=seed)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return {**seconds, "inertia": inertia_of(rows, clustering.assignment)}, clustering


def run_sklearn(
    rows: np.ndarray, config: ClusterConfig, clusters: int, seed: int, tolerance: float
) -> dict[str, float]:
    """The same of scikit-learn; its `tol` is absolute here, unlike that of its KMeans."""
    model = BisectingKMeans(
        clusters,
        init="k-means++",
        n_init=config.restarts,
        max_iter=config.max_iterations,
        tol=tolerance,
        random_state=seed,
        bisecting_strategy="biggest_inertia",
    )
    clock, processor = time.perf_counter(), time.process_time()
    model.fit(rows)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return {**seconds, "inertia": inertia_of(rows, model.labels_)}


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
    }


def compare(rows: np.ndarray, clusters: int, repeats: int, threads: int, seed: int) -> dict[str, object]:
    """Runs of both in turn, their medians, the ratios, and the floor."""
    config = ClusterConfig(criterion="inertia")
    tolerance = config.tolerance * float(rows.var(axis=0).mean())
    load = [os.getloadavg()[0]]
    ours, theirs = [], []
    for repeat in range(repeats):
        run, clustering = run_ours(rows, config, clusters, seed + repeat)
        ours.append(run)
        theirs.append(run_sklearn(rows, config, clusters, seed + repeat, tolerance))
    load.append(os.getloadavg()[0])
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in (("localmoe", ours), ("scikit-learn", theirs))
    }
    speed = bandwidth(rows)
    must_read = 2 * len(rows) + 2 * sum(node.points for node in clustering.tree if node.cluster < 0)
    return {
        "threads": threads,
        "repeats": repeats,
        "load_average_before_and_after": load,
        "runs": {"localmoe": ours, "scikit-learn": theirs},
        "medians": medians,
        "speed_up": medians["scikit-learn"]["seconds"] / medians["localmoe"]["seconds"],
        "speed_up_processor": medians["scikit-learn"]["processor_seconds"] / medians["localmoe"]["processor_seconds"],
        "inertia_ratio": statistics.median(a["inertia"] / b["inertia"] for a, b in zip(ours, theirs, strict=True)),
        "stream_bytes_per_second": speed,
        "seconds_to_read_all_rows_once": rows.nbytes / speed,
        "floor_seconds": must_read * rows.shape[1] * rows.itemsize / speed,
    }


def main() -> None:
    """Print the table; write the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = sentence_like(options.points, options.dim, options.seed)
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            result = compare(rows, options.clusters, options.repeats, threads, options.seed)
        results.append(result)
        print(f"\n{options.points} x {options.dim}, K = {options.clusters}, {threads} threads, {options.repeats} runs")
        print(f"{'median of':<14}{'seconds':>10}{'processor s':>13}{'inertia':>12}")
        for name, median in result["medians"].items():
            print(f"{name:<14}" + "{seconds:>10.2f}{processor_seconds:>13.2f}{inertia:>12.1f}".format(**median))
        print(f"{'ratio':<14}{result['speed_up']:>10.1f}{result['speed_up_processor']:>13.1f}", end="")
        print(f"{result['inertia_ratio']:>12.4f}")
        floor = result["floor_seconds"]
        print(f"floor {floor:.2f} s: {result['medians']['localmoe']['seconds'] / floor:.1f} times it; ", end="")
        print(f"all rows once {1e3 * result['seconds_to_read_all_rows_once']:.0f} ms", end="")
        print(f" at {result['stream_bytes_per_second'] / 1e9:.1f} GB/s")
    if options.json is not None:
        settings = {"points": options.points, "dim": options.dim, "clusters": options.clusters, "seed": options.seed}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), **settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
