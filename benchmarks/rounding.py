"""Rounded weights: how many more prompts repeat a mix, and what that does to logits and to the loss.

    python benchmarks/rounding.py BANK [--base MODEL] [--encoder MODEL] [--documents 40] [--steps 4 8 16] [--json PATH]

Prompts are the first `--prefix` tokens of the held-out documents of the bank; what follows, up to `--length`, is scored
under the exact mix and under the rounded ones. KL is Σ p ln(p / q) of the next token, p by exact and q by rounded
weights, in nats, the mean over tokens; a mix is a repeat if an earlier prompt had the very same one. "again": the exact
mix once more, which shows that a difference of 0 can be found.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import machine
import torch

import localmoe
from localmoe.evaluate.protocol import Trial, held_out
from localmoe.models import packed
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine
from localmoe.runtime.execution import rounded


@torch.inference_mode()
def log_probabilities(engine: Engine, trial: Trial, mix: Mix) -> torch.Tensor:
    """ln p of every next token after the prefix, [tokens, vocabulary] fp32."""
    tokens, labels = trial.passage.tokens, trial.passage.labels
    with engine.merged(mix), packed(engine.model):
        positions = torch.arange(len(tokens))[None]
        logits = engine.model(
            input_ids=tokens[None], position_ids=positions, cu_seq_lens_q=[len(tokens)], use_cache=False
        ).logits[0]
    return torch.log_softmax(logits[:-1][labels[1:]].float(), dim=-1)


def measure(engine: Engine, trials: list[Trial], documents: int, steps: list[int]) -> dict[str, dict[str, float]]:
    """For each number of steps: the share of repeats among all prompts; KL and loss over some documents."""
    exact = [engine.route(trial.prefix) for trial in trials]
    kinds: dict[str, list[Mix]] = {"exact": exact} | {str(n): [rounded(mix, n) for mix in exact] for n in steps}
    found = {
        name: {"repeats": 1 - len({(m.experts, m.weights) for m in mixes}) / len(mixes)}
        for name, mixes in kinds.items()
    }
    kinds["again"], found["again"] = kinds.pop("exact"), found.pop("exact")
    parts: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    for place, trial in enumerate(trials[:documents]):
        p = log_probabilities(engine, trial, exact[place])
        targets = trial.passage.tokens[1:][trial.passage.labels[1:]][:, None]
        for name, mixes in kinds.items():
            q = log_probabilities(engine, trial, mixes[place])
            kl = float((p.exp() * (p - q)).sum(dim=1).mean())
            more = float((p.gather(1, targets) - q.gather(1, targets)).mean())
            parts[name].append((kl, more, float((p - q).abs().amax())))
    for name, values in parts.items():
        kls, mores, largest = zip(*values, strict=True)
        found[name] |= {"kl": statistics.mean(kls), "nll": statistics.mean(mores), "largest": max(largest)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--base", help="where the bank's base model is")
    parser.add_argument("--encoder", help="where its encoder is")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--prefix", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = localmoe.open(arguments.bank, base=arguments.base, encoder=arguments.encoder)
    trials = held_out(engine, arguments.prefix, arguments.length)
    found = measure(engine, trials, arguments.documents, arguments.steps)
    print(f"{len(trials)} prompts, {min(arguments.documents, len(trials))} scored")
    for name, row in found.items():
        print(
            f"{name:>5}: {row['repeats']:6.1%} repeats, KL {row['kl']:.2e} nats, "
            f"loss {row['nll']:+.5f} nats a token, largest change of a log-probability {row['largest']:.3f}"
        )
    if arguments.json is not None:
        report: dict[str, Any] = {
            "bank": arguments.bank.name,
            "prompts": len(trials),
            "documents": arguments.documents,
            "machine": machine.describe("cpu"),
            "steps": found,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
