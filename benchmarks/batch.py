"""Batch: tokens a second of many prompts at once, each with a mix of its own, against three other ways to serve them.

    python benchmarks/batch.py [--rows 1 2 4 8 16 32] [--active 3] [--rank 16] [--experts 32] [--new-tokens 32]
                               [--rounds 5] [--base MODEL | --shape llama-3.2-1b] [--device cuda] [--json PATH]

Ours (`grouped`, over the union of the batch's experts; and with experts that share A) in turn with
(i) the base model alone at the same batch, by transformers' `generate` and by the loop that serves mixes, (ii) ours one
prompt after another, (iii) PEFT's mixed batch, one `cat` adapter a prompt, made beforehand and timed apart. All
from text to the last token, prefill included, the encoder left out; every row has as many tokens as the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench import Bench

SIDES = ("base", "base by our loop", "localmoe", "localmoe, shared A", "one after another", "peft cat")


class PeftBatch:
    """PEFT on a copy of the base: every prompt gets a `cat` adapter, and all run in one batch by `adapter_names`."""

    def __init__(self, bench: Bench, experts: Any) -> None:
        from peft import PeftModel

        self.tokenizer, self.device = bench.tokenizer, bench.device
        names = [str(row) for row in range(bench.arguments.experts)]
        model = PeftModel.from_pretrained(
            copy.deepcopy(bench.model), str(experts.numbered / "0"), adapter_name="0", autocast_adapter_dtype=False
        )
        for name in names[1:]:
            model.load_adapter(str(experts.numbered / name), adapter_name=name, autocast_adapter_dtype=False)
        self.model = model.eval()

    def prepare(self, mixes: Sequence[Any]) -> float:
        """Seconds to make the rows' adapters."""
        begun = time.perf_counter()
        for row, mix in enumerate(mixes):
            experts = [str(int(expert[1:])) for expert in mix.experts]
            self.model.add_weighted_adapter(experts, list(mix.weights), f"row{row}", combination_type="cat")
        return time.perf_counter() - begun

    def forget(self, rows: int) -> None:
        """Delete them."""
        for row in range(rows):
            self.model.delete_adapter(f"row{row}")

    def answer(self, texts: Sequence[str], new_tokens: int) -> None:
        """All texts in one batch."""
        generate(self.model, self.tokenizer, texts, new_tokens, self.device, [f"row{row}" for row in range(len(texts))])


def generate(
    model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int, device: str, adapters: list[str] | None = None
) -> Any:
    """Transformers' own greedy generation of texts of equally many tokens."""
    import torch
    from sides import greedy

    ids = tokenizer(list(texts), return_tensors="pt")["input_ids"].to(device)
    more = {} if adapters is None else {"adapter_names": adapters}
    with torch.no_grad():
        out = model.generate(input_ids=ids, **greedy(ids, new_tokens), **more)
    return tokenizer.batch_decode(out[:, ids.shape[1] :])


def measure(bench: Bench, keep: Callable[[dict[str, Any]], None]) -> None:
    """Number of rows → tokens a second of every side, and what one is of another; kept after every number of rows."""
    import material
    from sides import Ours

    arguments, found = bench.arguments, {}
    own = bench.experts(arguments.rank, arguments.experts)
    ours = Ours(bench.model, bench.tokenizer, own, None, "auto")
    alike = None
    if "localmoe, shared A" in arguments.sides:
        shared = bench.experts(arguments.rank, arguments.experts, shared=True)
        alike = Ours(bench.model, bench.tokenizer, shared, None, "auto")
    peft = PeftBatch(bench, own) if "peft cat" in arguments.sides else None
    for rows in arguments.rows:
        spent: dict[str, list[float]] = {side: [] for side in arguments.sides}
        prepared: list[float] = []
        distinct: list[int] = []
        for number in range(arguments.rounds + 1):
            texts = [next(bench.texts) for _ in range(rows)]
            queries = material.mixed_queries(arguments.experts, arguments.active, rows, seed=number)
            mixes = [ours.select(query) for query in queries]
            work = _work(bench, texts, mixes, ours, alike, peft)
            distinct.append(len({expert for mix in mixes for expert in mix.experts}))
            if peft is not None:
                prepared.append(peft.prepare(mixes))
            names = list(arguments.sides)
            for side in names[number % len(names) :] + names[: number % len(names)]:
                seconds = _seconds(work[side], bench.device)
                if number > 0:
                    spent[side].append(seconds)
            if peft is not None:
                peft.forget(rows)
        tokens = rows * arguments.new_tokens
        found[f"rows={rows}"] = _row(spent, tokens, distinct[1:], prepared[1:])
        found[f"rows={rows}"]["limit_of_bytes"] = bound(bench, found[f"rows={rows}"]["distinct_experts"])
        _show(rows, found[f"rows={rows}"])
        keep(found)


def _work(
    bench: Bench, texts: Sequence[str], mixes: Sequence[Any], ours: Any, alike: Any, peft: PeftBatch | None
) -> dict[str, Callable[[], Any]]:
    tokens = bench.arguments.new_tokens

    alone = [replace(mix, experts=(), weights=()) for mix in mixes]

    def one_after_another() -> None:
        for text, mix in zip(texts, mixes, strict=True):
            ours.answer_mix(text, mix, tokens)

    return {
        "base": lambda: generate(bench.model, bench.tokenizer, texts, tokens, bench.device),
        "base by our loop": lambda: ours.answer_batch(texts, alone, tokens),
        "localmoe": lambda: ours.answer_batch(texts, mixes, tokens),
        "localmoe, shared A": lambda: alike.answer_batch(texts, [alike.own(mix) for mix in mixes], tokens),
        "one after another": one_after_another,
        "peft cat": lambda: peft is not None and peft.answer(texts, tokens),
    }


def _seconds(work: Callable[[], Any], device: str) -> float:
    import machine

    machine.synchronise(device)
    begun = time.perf_counter()
    work()
    machine.synchronise(device)
    return time.perf_counter() - begun


def _row(spent: dict[str, list[float]], tokens: int, distinct: list[int], prepared: list[float]) -> dict[str, Any]:
    speeds = {side: statistics.median(tokens / s for s in seconds) for side, seconds in spent.items()}
    times = {
        f"{side} / {other}": statistics.median(b / a for a, b in zip(spent[side], spent[other], strict=True))
        for side, other in (
            ("localmoe", "base"),
            ("localmoe", "base by our loop"),
            ("localmoe, shared A", "base"),
            ("localmoe, shared A", "base by our loop"),
            ("localmoe", "one after another"),
            ("localmoe", "peft cat"),
        )
        if side in spent and other in spent
    }
    return {
        "tokens_per_second": speeds,
        "ratios": times,
        "distinct_experts": statistics.mean(distinct),
        "peft_seconds_to_make_adapters": statistics.median(prepared) if prepared else None,
        "seconds": spent,
    }


def _show(rows: int, row: dict[str, Any]) -> None:
    speeds = ", ".join(f"{side} {speed:.0f}" for side, speed in row["tokens_per_second"].items())
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items())
    print(f"{rows:3} rows, {row['distinct_experts']:.0f} experts: {speeds} tokens/s", flush=True)
    print(f"         {ratios}", flush=True)


def bound(bench: Bench, distinct: float) -> float:
    """What reading the distinct experts' factors once a step leaves of the base's speed, if bytes were all (bf16)."""
    factors = 2 * bench.arguments.rank * distinct * sum(d_out + d_in for d_out, d_in in bench.shapes)
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    return weights / (weights + factors)


def main() -> None:
    arguments = _arguments()
    import machine
    from bench import Bench

    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        bench = Bench(arguments, Path(folder))
        print("memory bandwidth: " + ", ".join(f"{k} {v:.3g}" for k, v in bench.speeds.items()), flush=True)
        begun = time.time()
        report = {
            "command": " ".join(sys.argv),
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "work")},
            "machine": machine.describe(arguments.device),
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "speeds": bench.speeds,
        }

        def keep(found: dict[str, Any]) -> None:
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                whole = report | {"rows": found, "seconds": time.time() - begun}
                arguments.json.write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")

        measure(bench, keep)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="also the tokenizer of a --shape")
    parser.add_argument("--shape", help="random weights of this shape: llama-3.2-1b, tiny")
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--active", type=int, default=3, help="N, exactly")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=32, help="K")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument(
        "--work", type=Path, default=None, help="where banks are written; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


if __name__ == "__main__":
    main()
