"""Memory of each side, measured in a process of its own, and of a bank of 1,000 experts that nobody has used.

Beside what the system counts (`added_...`, the expert cache included) stands what the ways of LocalMoE hold by their
own count, in bytes, next to the bar: `dense` at most twice the base's weights and one layer; `stacked` and `grouped`
the base and the experts of the mixes; 1,000 experts on disk 200 MB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from material import Experts, load_base, mixed_queries, note, prompts
from sides import BaseAlone, Ours, Ttmerge

if TYPE_CHECKING:
    from bench import Bench

OURS = ("localmoe dense", "localmoe stacked", "localmoe grouped", "localmoe auto")
SIDES = ("base", *OURS, "ttmerge")
ROWS = 4  # of the batch that is grouped, each with its own mix
UNUSED = 200_000_000
"""Bytes that 1,000 experts on disk may take until they are used."""


def measure(bench: Bench) -> dict[str, dict[str, int]]:
    """Side → bytes; for the largest rank and every N that was asked for."""
    arguments, found = bench.arguments, {}
    rank = max(arguments.ranks)
    experts = bench.experts(rank, arguments.experts)
    for active in (min(arguments.active), max(arguments.active)):
        for side in SIDES:
            found[f"{side}, N={active} r={rank}"] = _child(bench, side, experts, rank, active)
    shared = bench.experts(rank, arguments.experts, shared=True)
    for side in OURS[:3]:
        found[f"{side}, N={active} r={rank}, one A"] = _child(bench, side, shared, rank, active)
    found["1,000 experts on disk"] = _child(bench, "thousand", bench.experts(min(arguments.ranks), 8), 0, 0)
    return found


def _child(bench: Bench, side: str, experts: Experts, rank: int, active: int) -> dict[str, int]:
    note(f"memory of {side}, N={active}")
    arguments = bench.arguments
    command = [sys.executable, str(Path(__file__).with_name("overhead.py")), "--worker", side]
    command += ["--numbered", str(experts.numbered), "--active", str(active), "--device", arguments.device]
    command += ["--base", arguments.base, "--experts", str(arguments.experts), "--ranks", str(rank)]
    command += ["--prompt-tokens", str(arguments.prompt_tokens)]
    command += ["--shape", arguments.shape] if arguments.shape else []
    command += ["--shared"] if arguments.shared else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def worker(arguments: argparse.Namespace) -> dict[str, int]:
    """In the child: memory with the base alone, and what five answers of distinct mixes add to it."""
    from localmoe.bank.store import Bank
    from localmoe.lora import weight_of
    from localmoe.models import load_tokenizer, target_linears

    model, tokenizer = load_base(arguments.base, arguments.shape, arguments.device), load_tokenizer(arguments.base)
    numbered = Path(arguments.numbered)
    experts = Experts(Bank.open(numbered.parent / "bank"), numbered, arguments.ranks[0], arguments.shared)
    texts = prompts(tokenizer, arguments.prompt_tokens)
    BaseAlone(model, tokenizer, arguments.device).answer(next(texts), None, 8)
    gc.collect()
    machine.forget_peak(arguments.device)
    before, at_first = machine.resident_bytes(), machine.peak_bytes(arguments.device)
    linears = [weight_of(module) for module in target_linears(model).values()]
    found = {
        "target_weights": sum(weight.numel() * weight.element_size() for weight in linears),
    }
    if arguments.worker == "thousand":
        return found | _thousand(model, tokenizer, experts)
    kind, _, execution = arguments.worker.partition(" ")
    side: Any = BaseAlone(model, tokenizer, arguments.device)
    if kind == "localmoe":
        side = Ours(model, tokenizer, experts, None, execution)
    elif kind == "ttmerge":
        side = Ttmerge(model, tokenizer, experts, None, arguments.device, own_base=False)
    for query in mixed_queries(arguments.experts, arguments.active[0], 5):
        side.answer(next(texts), query, 8)
    if execution == "grouped":
        mixes = [side.select(query) for query in mixed_queries(arguments.experts, arguments.active[0], ROWS)]
        side.answer_batch([next(texts) for _ in mixes], mixes, 8)
    elif kind == "localmoe":
        mixes = [side.select(query)]
    after = machine.resident_bytes()
    found |= {f"added_{kind}": after[kind] - before[kind] for kind in after}
    peaks = machine.peak_bytes(arguments.device)
    if kind == "localmoe" and execution != "auto":
        found |= _counted(model, side.executor, execution, mixes)
    return found | {f"added_peak_{kind}": peaks[kind] - at_first[kind] for kind in peaks}


def _counted(model: Any, executor: Any, way: str, mixes: list[Any]) -> dict[str, int]:
    """What a way holds by its own count, the base included, and the bar for it."""
    base = sum(parameter.nbytes for parameter in model.parameters())
    active = executor.load(mixes).active
    experts = sum(expert.bytes for expert in active.experts)
    if active.shared is not None:
        experts += sum(A.nbytes for groups in active.shared.groups for A in groups)
    if way == "dense":
        layer = sum(target.d_in * target.d_out for target in executor.layout.blocks[0].targets)
        return {"held": base + executor.dense.bytes, "bar": 2 * base + layer * model.dtype.itemsize}
    return {"held": base + executor.beside.bytes + experts, "bar": base + experts}


def _thousand(model: Any, tokenizer: Any, experts: Experts) -> dict[str, int]:
    """Resident memory that an engine adds whose bank has 1,000 experts, before the first prompt."""
    from material import multiplied

    bank = multiplied(experts, 1000)
    gc.collect()
    before = machine.resident_bytes()
    engine = Ours(model, tokenizer, Experts(bank, experts.numbered, experts.rank, experts.shared), None, "auto")
    after = machine.resident_bytes()
    del engine
    return {"added_unused": sum(after.values()) - sum(before.values()), "bar": UNUSED}
