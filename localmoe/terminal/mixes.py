"""Mixes and answers: which experts a prompt gets, as a table and as plain data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from localmoe.quantities import duration_text
from localmoe.terminal.screen import bar, facts, plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.bank.store import Bank
    from localmoe.config import RouteConfig
    from localmoe.routing import Mix
    from localmoe.runtime.answers import Answer
    from localmoe.runtime.router import Neighbour


def mix_data(bank: Bank, mix: Mix) -> dict[str, Any]:
    """A mix as plain data, the heaviest expert first."""
    pairs = sorted(zip(mix.experts, mix.weights, strict=True), key=lambda pair: -pair[1])
    return {
        "experts": [{"id": id, "label": bank.expert(id).label, "weight": weight} for id, weight in pairs],
        "method": mix.method,
        "fallback": mix.fallback,
    }


def route_data(bank: Bank, mix: Mix, near: list[Neighbour], config: RouteConfig) -> dict[str, Any]:
    """All that `localmoe route` knows, as plain data."""
    return {
        "mix": mix_data(bank, mix),
        "nearest": [dataclasses.asdict(neighbour) for neighbour in near],
        "router": {
            "name": config.router,
            "beta": config.beta,
            "tau": config.tau,
            "sift_lambda": config.sift_lambda,
            "max_experts": config.max_experts,
        },
    }


def answer_data(bank: Bank, answer: Answer) -> dict[str, Any]:
    """An answer as plain data."""
    return {
        "text": answer.text,
        "mix": mix_data(bank, answer.mix),
        "base_variant": answer.base_variant,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "execution": None if answer.choice is None else dataclasses.asdict(answer.choice),
        "seconds": dataclasses.asdict(answer.seconds),
    }


def show_mix(console: Console, bank: Bank, mix: Mix) -> None:
    """The experts of a mix with their weights as bars, and why if it is a fall-back."""
    data = mix_data(bank, mix)
    if not data["experts"]:
        console.print("no expert: the base model answers alone")
    else:
        rows = table("expert", "label", "weight", "", right=("weight",))
        for expert in data["experts"]:
            rows.add_row(expert["id"], plain(expert["label"]), f"{expert['weight']:.3f}", bar(expert["weight"]))
        console.print(rows)
    show_fallback(console, mix)


def show_fallback(console: Console, mix: Mix) -> None:
    """Why a mix is not what was asked for, if it is a fall-back: it is never silent."""
    if mix.fallback is not None:
        console.print(plain(f"fall-back: {mix.fallback}", "yellow"))


def show_route(console: Console, data: dict[str, Any], bank: Bank, mix: Mix) -> None:
    """The mix, the documents nearest to the prompt, and how it was routed."""
    show_mix(console, bank, mix)
    if data["nearest"]:
        rows = table("nearest document", "expert", "similarity", right=("similarity",))
        for near in data["nearest"]:
            rows.add_row(plain(near["source"]), near["expert"], f"{near['similarity']:.3f}")
        console.print()
        console.print(rows)
    router = data["router"]
    console.print()
    if router["name"] == "sift":
        settings = f"λ = {router['sift_lambda']:g}"
    else:
        settings = f"β = {router['beta']:.3g}, τ = {router['tau']:g}"
    console.print(f"{router['name']}, {settings}", style="dim")


def show_cost(console: Console, answer: Answer) -> None:
    """Tokens of an answer, and where its time went."""
    spent = dataclasses.asdict(answer.seconds)
    times = ", ".join(f"{name.replace('_', ' ')} {duration_text(seconds)}" for name, seconds in spent.items())
    tokens = f"{answer.prompt_tokens:,} in the prompt, {answer.new_tokens:,} new"
    variant = [("base", "other weights than the bank was built for")] if answer.base_variant else []
    console.print(facts([*variant, ("tokens", tokens), ("time", times)]))
