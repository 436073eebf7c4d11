"""Sessions: what a turn costs under the mix of the turn before, and under another one, after so much conversation.

    python benchmarks/sessions.py BANK [--base FOLDER] [--encoder FOLDER] [--history 200 1000] [--message 20]
                                  [--new-tokens 32] [--rounds 5] [--documents 60] [--processor-time] [--json PATH]
                                  [--parts turns missing repeats]

turns: every round reads a conversation of so many tokens (held-out documents of the bank) under one mix, and then
answers one more message: under the same mix (sticky, or routed to the same: keys and values are kept), under another
whose experts are in memory (keys and values are thrown away, the conversation is read again, the mix is merged or
applied), and under another whose experts have to be read first. `embed`, what routing takes, is not in other times.
missing, by routing alone: how many experts a turn finds missing, for documents cut into four messages, without and with
what a session loads between turns. repeats: two mixes that take turns over prompts of 20 tokens, with memory for one
merged mix and for both, and beside the weights; "again": one mix all the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import machine
from material import note

PARTS = ("turns", "missing", "repeats")
TURNS = 4
KINDS = ("same mix", "another mix", "another mix, experts on disk")


def main() -> None:
    import localmoe

    arguments = _arguments()
    if arguments.processor_time:
        time.perf_counter = time.process_time  # the engine's own clock too
    engine = localmoe.open(arguments.bank, arguments.base, arguments.encoder)
    texts = _texts(engine, arguments.documents)
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
        "machine": machine.describe(engine.model.device.type),
        "turns": {},
    }
    for history in arguments.history if "turns" in arguments.parts else ():
        rounds = [_round(engine, texts, history, number, arguments) for number in range(arguments.rounds)]
        report["turns"][history] = _medians(rounds)
        _show(history, report["turns"][history])
    if "missing" in arguments.parts:
        report["missing"] = _missing(engine.router, texts)
        print(f"\nexperts missing in memory, turn by turn ({len(texts)} documents, {TURNS} messages each)")
        for name, counts in report["missing"].items():
            print(f"{name:24}" + "".join(f"{count:8.2f}" for count in counts))
    if "repeats" in arguments.parts:
        report["repeats"] = _repeats(engine, texts, arguments.rounds)
        print("\ntwo mixes in turn: ms from the mix to the first token, and of these to the merged model, medians")
        for name, row in report["repeats"].items():
            print(f"{name:34}{row['first token'] * 1e3:8.1f}{row['merge'] * 1e3:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _texts(engine: Any, count: int) -> list[str]:
    """Documents that no expert was trained on, of eighty words at least."""
    table = engine.bank.documents().to_pylist()
    held_out = [row["id"] for row in table if row["split"] in ("test", "tune")]
    return [text for text in engine.bank.texts(held_out) if len(text.split()) >= 80][:count]


def _round(engine: Any, texts: list[str], history: int, number: int, arguments: Any) -> dict[str, dict[str, float]]:
    """Kind of turn → its times; every kind begins with the conversation read anew."""
    from localmoe.config import GenerateConfig
    from localmoe.runtime.generation import Memory

    one, other = texts[2 * number % len(texts)], texts[(2 * number + 1) % len(texts)]
    said = [{"role": "user", "content": _cut(engine, [one, *texts], history)}]
    message = {"role": "user", "content": _cut(engine, [other], arguments.message)}
    begun = time.perf_counter()
    second = engine.route([*said, message])
    embed, first = time.perf_counter() - begun, engine.route(one)
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]:
        memory = Memory()
        engine.executor.forget()
        engine.executor.load([first] if kind.endswith("disk") else [first, second])
        begin = engine.start(said, GenerateConfig(max_new_tokens=1), first, memory)
        turns = [*said, {"role": "assistant", "content": "".join(begin)}, message]
        mix = first if kind == "same mix" else second
        pieces = engine.start(turns, GenerateConfig(max_new_tokens=arguments.new_tokens), mix, memory)
        answer = pieces.answer("".join(pieces))
        spent = answer.seconds
        found[kind] = {
            "embed": embed,
            "load": spent.load,
            "merge": spent.merge,
            "first token": spent.first_token,
            "pace": (spent.total - spent.first_token) / max(1, answer.new_tokens - 1),
            "prompt tokens": answer.prompt_tokens,
            "dense": float(pieces.choice.decode == "dense"),
        }
    return found


def _cut(engine: Any, texts: list[str], tokens: int) -> str:
    """The first `tokens` tokens of the texts, one after another."""
    ids: list[int] = engine.tokenizer("\n\n".join(texts))["input_ids"][:tokens]
    return str(engine.tokenizer.decode(ids, skip_special_tokens=True))


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        kind: {name: statistics.median(one[kind][name] for one in rounds) for name in rounds[0][kind]} for kind in KINDS
    }


def _show(history: int, medians: dict[str, dict[str, float]]) -> None:
    names = ("embed", "load", "merge", "first token", "pace")
    print(f"\nafter {history} tokens of conversation (ms, medians)\n{'':30}" + "".join(f"{n:>13}" for n in names))
    for kind, row in medians.items():
        way = "merged" if row["dense"] else "beside"
        print(f"{kind:30}" + "".join(f"{row[n] * 1e3:13.1f}" for n in names) + f"   answer {way}", flush=True)


def _missing(router: Any, texts: list[str]) -> dict[str, list[float]]:
    """Mean number of experts that turn 1, 2, ... finds missing, each document a conversation of a new process."""
    found = {"as they are asked for": [0.0] * TURNS, "loaded between turns": [0.0] * TURNS}
    for text in texts:
        words = text.split(" ")
        size = len(words) // TURNS
        messages = [" ".join(words[place * size : (place + 1) * size]) for place in range(TURNS)]
        held: dict[str, set[str]] = {name: set() for name in found}
        turns: list[dict[str, str]] = []
        for place, message in enumerate(messages):
            turns.append({"role": "user", "content": message})
            vector = router.embed(turns)
            mix = router.select(vector)
            for name, counts in found.items():
                counts[place] += len(set(mix.experts) - held[name]) / len(texts)
                held[name] |= set(mix.experts)
            held["loaded between turns"] |= set(router.nearest_experts(vector, 2 * len(mix.experts)))
    return found


def _repeats(engine: Any, texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a prompt's first token, for prompts whose mixes take turns, and for one that comes again."""
    from localmoe.config import ExecutionConfig
    from localmoe.runtime.execution import Executor

    first, *others = [engine.route(text) for text in texts]
    mixes = [first, next(mix for mix in others if mix != first)]
    weights = engine.executor.dense.bytes_missing + engine.executor.dense.bytes
    runs = {}
    for name, more in (("one merged mix", 0), ("both merged mixes", weights)):
        runs[name] = Executor(engine.model, engine.bank, ExecutionConfig(mix_cache_bytes=more))
        runs[name].host = engine.executor.host
    ways = [(name, "dense", mixes) for name in runs] + [("one merged mix", "stacked", mixes)]
    ways += [("one merged mix", way, mixes[:1] * 2) for way in ("dense", "stacked")]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds + 1):
        for kept, way, pair in ways:
            name = f"{way}, again" if pair[0] is pair[1] else f"{way}, {kept if way == 'dense' else 'in turn'}"
            times = [_first_token(engine, runs[kept], mix, way) for mix in pair * 2]
            found.setdefault(name, []).extend(times[2:])
    rows = {name: list(zip(*times[2:], strict=True)) for name, times in found.items()}  # the first round warms up
    return {n: {"merge": statistics.median(m), "first token": statistics.median(f)} for n, (m, f) in rows.items()}


def _first_token(engine: Any, executor: Any, mix: Any, way: str) -> tuple[float, float]:
    """Seconds to the merged model, and to the logits of a prompt of 20 tokens."""
    import torch

    begun = time.perf_counter()
    with torch.inference_mode(), executor.attached(executor.load([mix]), way, stay=True):
        merged = time.perf_counter()
        engine.model(torch.arange(100, 120)[None], use_cache=True, logits_to_keep=1)
        return merged - begun, time.perf_counter() - begun


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--base", default=None, help="where the base is, if not where this machine saw it last")
    parser.add_argument("--encoder", default=None, help="where the encoder is, if not where this machine saw it last")
    parser.add_argument("--history", nargs="+", type=int, default=[200, 1000], help="tokens of conversation before")
    parser.add_argument("--message", type=int, default=20, help="tokens of the message that is answered")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=60, help="held-out documents that conversations are made of")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time, not the clock's: for a machine that others use, with one thread",
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    note("sessions")
    main()
