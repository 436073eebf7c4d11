"""Overhead: what a prompt's own model costs over the base model alone, ours against `ttmerge` 0.0.4, in turn.

    python benchmarks/overhead.py [--active 3 10] [--ranks 16 64] [--experts 32] [--rounds 9] [--parts PART ...]
                                  [--shared] [--base MODEL | --shape llama-3.2-1b] [--device cuda] [--json PATH]

Experts are random; base, experts, mixes, prompts and dtype are the same on both sides. `ttmerge` keeps its experts in
memory and on the device (`cold` aside), and gets what is needed to merge any N (its limit of 50 lifted).
"Added" is the time from a prompt's text to its first token, less that of the base model alone in the same round: for
`ttmerge` by transformers' `generate`, which it uses; for us by that or by our engine, whichever was faster. Ratios are
of the medians of what is added, `ttmerge`'s over ours; its restoring of weights after the answer is not in them.
On a GPU our load and merge, but for those of part `merge`, end when it was asked for them; the first token waits.

Parts: first (every stage, experts in memory, no encoder), encoder (with it), cold (experts on disk, page cache empty),
answers (32 and 100 new tokens), merge (select, load and merge to a dense model; on a GPU with experts there and in
main memory), switch (dense against bare addmm), shared (experts of one A: N = 30 against 3), memory. With `--shared`
all experts have one A, which is what recipe `joint` makes; a bare addmm is then of rank r.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("first", "encoder", "cold", "answers", "merge", "switch", "shared", "memory")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def main() -> None:
    arguments = _arguments()
    if arguments.worker is not None:
        import memory

        print(json.dumps(memory.worker(arguments)))
        return
    import machine
    import parts
    from bench import Bench

    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        bench = Bench(arguments, Path(folder))
        report: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "work", "worker")},
            "machine": machine.describe(arguments.device),
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "speeds": bench.speeds,
            "ratios": {},
        }
        begun = time.time()
        for part in arguments.parts:
            report[part] = getattr(parts, part)(bench, report)
            if arguments.json:
                _write(arguments.json, report)
        report["seconds"] = time.time() - begun
    if arguments.json:
        _write(arguments.json, report)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="also the tokenizer of a --shape")
    parser.add_argument("--shape", help="random weights of this shape: llama-3.2-1b, tiny")
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--active", nargs="+", type=int, default=[3, 10], help="N, exactly")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--experts", type=int, default=32, help="K; at least the largest N")
    parser.add_argument("--shared", action="store_true", help="experts that share one A, in every part")
    parser.add_argument("--full", action="store_true", help="N = 1, 3, 10, 30, 100 and K = 100")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--execution", default="auto", help="auto, dense, stacked")
    parser.add_argument("--encoder", default=MINILM)
    parser.add_argument("--fast-encoder", default="static", help="one more row of parts `encoder` and `answers`")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--work", type=Path, default=None, help="where banks are written; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--numbered", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.active, arguments.experts = [1, 3, 10, 30, 100], 100
    arguments.experts = max(arguments.experts, *arguments.active)
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


if __name__ == "__main__":
    main()
