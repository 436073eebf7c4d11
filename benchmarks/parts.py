"""The parts of `overhead.py`: each measures in turn on one bench, prints, and returns its JSON."""

from __future__ import annotations

import gc
import itertools
import statistics
from typing import Any

import machine
import torch
from bench import OWN_BASE, Bench, in_turn, ratio, stages
from material import mixed_queries, note
from sides import BaseAlone, Ours, Ttmerge, drop_from_page_cache

from localmoe.models import locate

STAGES = ("embed", "select", "load", "merge", "first_token", "restore", "total", "added_first_token", "added_total")


def first(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """Every stage up to the first token, experts in memory, the encoder left out."""
    found = {}
    for rank in bench.arguments.ranks:
        ours, sides = _sides(bench, rank)
        for active in bench.arguments.active:
            name = f"N={active} r={rank}"
            rounds = _warm(bench, sides, active)
            medians = stages(rounds)
            limit = machine.limits(
                bench.shapes, rank, active, bench.arguments.prompt_tokens, bench.speeds, bench.shared
            )
            inner = rank if bench.shared else rank * active
            addmm = statistics.median(machine.seconds(_addmms(bench, inner), 5, bench.device))
            bare = {"limit": limit, "bare_addmm": addmm, "execution": str(ours.last)}
            found[name] = {"medians": medians, "ratio": ratio(medians), **bare, "rounds": rounds}
            found[name]["ratio_of_whole_calls"] = ratio(medians, key="added_total")
            _show(f"first token, {name}, warm, without encoder", medians, bare)
            if active == 10:
                report["ratios"][name] = found[name]["ratio"]
        del ours, sides
        gc.collect()
    return found


def encoder(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """The same for N = 10 (or the largest N asked for) with the encoder, and with the fast one on our side."""
    from sentence_transformers import SentenceTransformer

    from localmoe.encoders import load_encoder

    arguments, found = bench.arguments, {}
    active = 10 if 10 in arguments.active else max(arguments.active)
    theirs = SentenceTransformer(locate(arguments.encoder), device=bench.device)
    ours = {"localmoe": load_encoder(arguments.encoder)}
    ours["localmoe fast"] = load_encoder(arguments.fast_encoder)
    for rank in arguments.ranks:
        experts = bench.experts(rank, arguments.experts)
        sides: dict[str, Any] = {"base": BaseAlone(bench.model, bench.tokenizer, bench.device).answer}
        for name, model in ours.items():
            one = Ours(bench.model, bench.tokenizer, experts, model.encode, arguments.execution)
            sides[name] = one.answer
        sides["ttmerge"] = Ttmerge(bench.model, bench.tokenizer, experts, theirs.encode, bench.device).answer
        counted = {name: _one(answer) for name, answer in sides.items()}
        rounds = _warm(bench, counted | {OWN_BASE: _own_base(one, 1)}, active)
        medians, name = stages(rounds), f"N={active} r={rank}"
        found[name] = {"medians": medians, "rounds": rounds}
        _show(f"first token, {name}, warm, with encoder", medians, {})
        for mine in ours:
            key = f"ratios_with_{'fast_' if mine != 'localmoe' else ''}encoder"
            report.setdefault(key, {})[name] = ratio(medians, mine)
        del sides
        gc.collect()
    return found


def cold(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """No expert in memory, and none of their files in the page cache."""
    found = {}
    for rank in bench.arguments.ranks:
        experts = bench.experts(rank, bench.arguments.experts)
        ours = Ours(bench.model, bench.tokenizer, experts, None, bench.arguments.execution)
        theirs = Ttmerge(bench.model, bench.tokenizer, experts, None, bench.device, in_memory=False)
        base = BaseAlone(bench.model, bench.tokenizer, bench.device)
        sides = {"base": _one(base.answer), "localmoe": _one(ours.answer), "ttmerge": _one(theirs.answer)}
        sides[OWN_BASE] = _own_base(ours, 1)

        def empty(query: Any, ours: Ours = ours, experts: Any = experts) -> None:
            ours.forget()
            gc.collect()
            drop_from_page_cache(experts, query)

        for active in bench.arguments.active:
            queries = mixed_queries(bench.arguments.experts, active, 1 + max(3, bench.arguments.rounds // 2))
            in_turn(sides, bench.texts, queries[:1])
            rounds = in_turn(sides, bench.texts, queries[1:], before=empty)
            medians = stages(rounds)
            found[f"N={active} r={rank}"] = {"medians": medians, "ratio": ratio(medians), "rounds": rounds}
            _show(f"first token, N={active} r={rank}, cold, without encoder", medians, {})
        del ours, theirs, base, sides, empty
        gc.collect()
    return found


def answers(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """32 and 100 new tokens, from the prompt's text to the last token, the encoder included on both sides."""
    from sentence_transformers import SentenceTransformer

    from localmoe.encoders import load_encoder

    arguments, found = bench.arguments, {}
    theirs = SentenceTransformer(locate(arguments.encoder), device=bench.device)
    own = load_encoder(arguments.encoder)
    for rank in arguments.ranks:
        experts = bench.experts(rank, arguments.experts)
        base = BaseAlone(bench.model, bench.tokenizer, bench.device)
        ours = Ours(bench.model, bench.tokenizer, experts, own.encode, arguments.execution)
        sides = {
            "base": base.answer,
            "localmoe": ours.answer,
            "ttmerge": Ttmerge(bench.model, bench.tokenizer, experts, theirs.encode, bench.device).answer,
        }
        fast = load_encoder(arguments.fast_encoder).encode
        sides["localmoe fast"] = Ours(bench.model, bench.tokenizer, experts, fast, arguments.execution).answer
        for active, (tokens, share) in itertools.product(arguments.active, ((32, 2), (100, 3))):
            if tokens == 100 and active not in (min(arguments.active), max(arguments.active)):
                continue
            counted = {name: _many(answer, tokens) for name, answer in sides.items()}
            counted[OWN_BASE] = _own_base(ours, tokens)
            rounds = _warm(bench, counted, active, max(3, arguments.rounds // share))
            medians, name = stages(rounds), f"N={active} r={rank} {tokens} tokens"
            times_base = {
                side: statistics.median(t["total"] / b["total"] for t, b in zip(times, rounds["base"], strict=True))
                for side, times in rounds.items()
            }
            found[name] = {"medians": medians, "times_base": times_base, "rounds": rounds}
            _show(
                f"{tokens} new tokens, N={active} r={rank}, encoder included", medians, {"times the base": times_base}
            )
        del ours, sides, counted
        gc.collect()
    return found


def merge(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """Select, load and merge up to a dense model: experts on the device, and in main memory (pinned on our side)."""
    arguments, found = bench.arguments, {}
    places = ("device", "host") if bench.device == "cuda" else ("host",)
    for rank, place in itertools.product(arguments.ranks, places):
        experts, resident = bench.experts(rank, arguments.experts), place == places[0]
        ours = Ours(bench.model, bench.tokenizer, experts, None, "dense", None if resident else 0)
        theirs = Ttmerge(bench.model, bench.tokenizer, experts, None, bench.device, on_device=resident)
        for active in arguments.active:
            queries = mixed_queries(arguments.experts, active, arguments.rounds)
            note(f"merge, experts on the {place}, N={active} r={rank}")
            rounds: dict[str, list[dict[str, float]]] = {"localmoe": [], "ttmerge": []}
            for number, query in enumerate(queries * 2):
                mine, other = ours.stages(query), theirs.stages(next(bench.texts), query)
                if number >= len(queries):  # all experts have been in memory before
                    rounds["localmoe"].append(mine)
                    rounds["ttmerge"].append(other)
            medians = {
                side: {stage: statistics.median(t[stage] for t in times) for stage in times[0]}
                for side, times in rounds.items()
            }
            over = medians["ttmerge"]["all"] / medians["localmoe"]["all"]
            limit = machine.limits(bench.shapes, rank, active, 1, bench.speeds, bench.shared)["dense"]
            name = f"N={active} r={rank}, experts on the {place}"
            found[name] = {"medians": medians, "ratio": over, "limit": limit, "rounds": rounds}
            print(f"merge, {name} (ms, medians; limit {limit * 1e3:.2f}, ttmerge over ours {over:.2f})")
            for side, row in medians.items():
                print(f"  {side:9}" + "".join(f"  {stage} {value * 1e3:.2f}" for stage, value in row.items()))
            print(flush=True)
        del ours, theirs
        gc.collect()
    return found


@torch.inference_mode()
def switch(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """From one mix to the next by `dense`, and the addmm of every target weight with factors already side by side.

    Of experts with an A each, and of experts of one A, whose factors are summed before: there one addmm is of rank r.
    """
    found = {}
    for rank, one_A in itertools.product(bench.arguments.ranks, (True,) if bench.shared else (False, True)):
        experts = bench.experts(rank, bench.arguments.experts, shared=one_A)
        ours = Ours(bench.model, bench.tokenizer, experts, None, "dense")
        for active in bench.arguments.active:
            queries = mixed_queries(bench.arguments.experts, active, 4)
            mixes = itertools.cycle([ours.select(query) for query in queries])
            bare = _addmms(bench, rank if one_A else rank * active)
            for _ in queries:
                ours.switch(next(mixes))
            spent: dict[str, list[float]] = {"dense": [], "addmm": []}
            for _ in range(bench.arguments.rounds):
                spent["addmm"] += machine.seconds(bare, 1, bench.device)
                spent["dense"].append(ours.switch(next(mixes)))
            medians = {name: statistics.median(values) for name, values in spent.items()}
            over = statistics.median(d / a for d, a in zip(spent["dense"], spent["addmm"], strict=True))
            name = f"N={active} r={rank}{', one A' if one_A else ''}"
            found[name] = {"medians": medians, "dense_over_addmm": over, "rounds": spent}
            print(
                f"switch, {name}: dense {medians['dense'] * 1e3:.1f} ms, "
                f"bare addmm {medians['addmm'] * 1e3:.1f} ms, {over:.2f} times",
                flush=True,
            )
        del ours
        gc.collect()
    return found


def shared(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """Experts that share A, N = 3 and 30 in turn: time to the first token, without the encoder."""
    found, count = {}, max(32, bench.arguments.experts)
    for rank in bench.arguments.ranks:
        experts = bench.experts(rank, count, shared=True)
        ours = Ours(bench.model, bench.tokenizer, experts, None, bench.arguments.execution)
        base = BaseAlone(bench.model, bench.tokenizer, bench.device)
        rounds: dict[str, list[dict[str, float]]] = {"base": [], "N=3": [], "N=30": []}
        few, many = (mixed_queries(count, active, bench.arguments.rounds + 2) for active in (3, 30))
        for number, (three, thirty) in enumerate(zip(few, many, strict=True)):
            text = (next(bench.texts), next(bench.texts), next(bench.texts))
            times = (
                base.answer(text[0], None, 1).data(),
                ours.answer(text[1], three, 1).data(),
                ours.answer(text[2], thirty, 1).data(),
            )
            if number >= 2:
                for name, time in zip(rounds, times, strict=True):
                    rounds[name].append(time)
        medians = stages(rounds)
        over = medians["N=30"]["first_token"] / medians["N=3"]["first_token"]
        found[f"r={rank}"] = {"medians": medians, "first_token_30_over_3": over, "rounds": rounds}
        _show(f"experts that share A, r={rank}, without encoder", medians, {"first token, N=30 over N=3": over})
        del ours
        gc.collect()
    return found


def memory(bench: Bench, report: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of each side in a process of its own, and what 1,000 experts on disk cost before they are used."""
    import memory as processes

    found = processes.measure(bench)
    for name, row in found.items():
        values = ", ".join(f"{key} {value / 2**20:.1f}" for key, value in row.items() if key != "bar")
        measured = row.get("held", row.get("added_unused"))
        if measured is not None:
            bar = row["bar"]
            values += (
                f"; bar {bar / 2**20:.1f}: {'met' if measured <= bar else f'{(measured - bar) / 2**20:.1f} above'}"
            )
        print(f"memory in MiB, {name}: {values}", flush=True)
    return found


def _sides(bench: Bench, rank: int) -> tuple[Ours, dict[str, Any]]:
    experts = bench.experts(rank, bench.arguments.experts)
    base = BaseAlone(bench.model, bench.tokenizer, bench.device)
    ours = Ours(bench.model, bench.tokenizer, experts, None, bench.arguments.execution)
    theirs = Ttmerge(bench.model, bench.tokenizer, experts, None, bench.device)
    sides = {"base": base.answer, "localmoe": ours.answer, "ttmerge": theirs.answer}
    found = {name: _one(answer) for name, answer in sides.items()}
    found[OWN_BASE] = _own_base(ours, 1)
    if bench.device == "cuda":
        host = Ttmerge(bench.model, bench.tokenizer, experts, None, bench.device, on_device=False)
        found["ttmerge, experts on the host"] = _one(host.answer)
    return ours, found


def _warm(bench: Bench, sides: dict[str, Any], active: int, rounds: int | None = None) -> Any:
    """Rounds of distinct mixes whose experts are in memory: all were used before, with other prompts."""
    count = bench.arguments.rounds if rounds is None else rounds
    queries = mixed_queries(bench.arguments.experts, active, count)
    one = {name: answer for name, answer in sides.items() if name not in ("base", OWN_BASE)}
    for query in queries:
        text = next(bench.texts)
        for answer in one.values():
            answer(text, query)
    note(f"N={active}: {count} rounds of {', '.join(sides)}")
    return in_turn(sides, bench.texts, queries)


def _own_base(ours: Ours, tokens: int) -> Any:
    return lambda text, _: ours.answer(text, None, tokens)


def _one(answer: Any) -> Any:
    return _many(answer, 1)


def _many(answer: Any, tokens: int) -> Any:
    return lambda text, query: answer(text, query, tokens)


def _addmms(bench: Bench, inner: int) -> Any:
    """W0 + B·A into a second buffer for every target weight, the factors [d, N·r] and the buffers made beforehand."""
    from localmoe.lora import weight_of
    from localmoe.models import target_linears

    weights = [weight_of(module).data for module in target_linears(bench.model).values()]
    factors = {
        shape: (
            torch.randn(shape[0], inner, dtype=bench.model.dtype, device=bench.device),
            torch.randn(inner, shape[1], dtype=bench.model.dtype, device=bench.device),
        )
        for shape in set(bench.shapes)
    }
    own = [tuple(factor.clone() for factor in factors[tuple(weight.shape)]) for weight in weights]
    buffers = [torch.empty_like(weight) for weight in weights]

    @torch.inference_mode()
    def work() -> None:
        for weight, (B, A), buffer in zip(weights, own, buffers, strict=True):
            torch.addmm(weight, B, A, out=buffer)

    return work


def _show(title: str, medians: dict[str, dict[str, float]], more: dict[str, Any]) -> None:
    print(f"\n{title} (ms, medians)")
    print(f"{'':28}" + "".join(f"{stage.split('_token')[0].replace('_', ' '):>13}" for stage in STAGES))
    for side, row in medians.items():
        print(f"{side:28}" + "".join(f"{row[stage] * 1e3:13.1f}" for stage in STAGES))
    if "ttmerge" in medians:
        for side in (name for name in medians if name.startswith("localmoe")):
            value = ratio(medians, side)
            told = "nothing is added" if value is None else f"{value:.2f} times less than ttmerge"
            print(f"added to the first token by {side}: {told}")
    for name, value in more.items():
        print(f"{name}: {_plain(value)}")
    print(flush=True)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
