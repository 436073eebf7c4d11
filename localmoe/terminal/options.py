"""Options of the verbs: each shows the default of the field it sets, and the fields are read back from them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from localmoe.config import (
    BuildConfig,
    EvalConfig,
    ExecutionConfig,
    GenerateConfig,
    LmEvalConfig,
    RouteConfig,
    default_of,
    load_config,
    load_eval_config,
)
from localmoe.terminal.verbs import checked

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def knob(flag: str, key: str, text: str, none: str = "", **how: Any) -> Callable[[F], F]:
    """An option that overrides one dotted key of BuildConfig, and shows its default; `none`: what no value means."""
    config, names = BuildConfig, key.split(".")
    for name in names[:-1]:
        config = type(default_of(config, name))
    return _shown(flag, key.replace(".", "__"), default_of(config, names[-1]), text, none, **how)


def generation_option(flag: str, name: str, text: str, **how: Any) -> Callable[[F], F]:
    """An option for one field of GenerateConfig."""
    return _shown(flag, name, default_of(GenerateConfig, name), text, "", panel="How to draw tokens", **how)


def _shown(flag: str, name: str, default: Any, text: str, none: str, **how: Any) -> Callable[[F], F]:
    shown = none if default is None or default == () else str(default)
    return click.option(flag, name, help=f"{text} [dim]\\[default: {shown}][/dim]", **how)


def build_options(function: F) -> F:
    """What `plan` and `build` share: a file, any key, and everyday keys as options of their own."""
    models, corpus, experts, every = "Models", "Which documents", "Experts", "Every setting"
    options = [
        click.option(
            "-c", "--config", "file", type=PATH, metavar="FILE.yaml", panel=every, help="Read settings from a file."
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            panel=every,
            help="Set any key, e.g. train.batch=8; may be repeated, and wins over the file and the other options.",
        ),
        knob("--base", "base", "Base model: a hub id, a folder, or a packaged model.", panel=models),
        knob(
            "--encoder",
            "encoder",
            "Sentence encoder: a hub id, a folder, a packaged model, 'static' or 'base'.",
            panel=models,
        ),
        knob(
            "--include",
            "corpus.include",
            "Files to read from a folder, e.g. '*.py'; may be repeated.",
            "every text file",
            multiple=True,
            metavar="PATTERN",
            panel=corpus,
        ),
        knob(
            "--exclude",
            "corpus.exclude",
            "Files to leave out, e.g. 'tests/*'; may be repeated.",
            "none",
            multiple=True,
            metavar="PATTERN",
            panel=corpus,
        ),
        knob("--text-field", "corpus.text_field", "Field of a record that holds the text.", panel=corpus),
        knob(
            "--sample-tokens",
            "corpus.sample_tokens",
            "Train on a sample of at most this many tokens.",
            "all",
            type=int,
            panel=corpus,
        ),
        knob(
            "--max-passage",
            "corpus.passage_tokens",
            "Tokens of a passage at most; longer documents become several.",
            type=int,
            panel=corpus,
        ),
        knob(
            "--recipe",
            "train.recipe",
            "How experts are trained: with a shared trunk, after it, after it with its A, or from the base.",
            type=click.Choice(["joint", "trunk", "trunk-shared", "paper"]),
            panel=experts,
        ),
        knob("--clusters", "cluster.clusters", "Number of experts K.", "by tokens", type=int, panel=experts),
        knob("--min-tokens", "cluster.min_tokens", "Train tokens of an expert at least.", type=int, panel=experts),
        knob("--rank", "train.rank", "Rank of every update.", type=int, panel=experts),
        knob(
            "--epochs",
            "train.epochs",
            "Passes of each expert over its documents.",
            "2 with the trunk, 0.5 after it, 1 from the base",
            type=float,
            panel=experts,
        ),
        knob("--learning-rate", "train.learning_rate", "Peak rate of the trunk.", type=float, panel=experts),
        knob(
            "--try-rate",
            "search.rates",
            "Try this multiple of the rates first, e.g. 0.5; give two at least, the best ones build the bank.",
            "none",
            type=float,
            multiple=True,
            metavar="FACTOR",
            panel=experts,
        ),
        knob("--active", "route.active", "Wanted mean number of active experts.", type=float, panel=experts),
        knob(
            "--try-active",
            "search.active",
            "Try this mean number of active experts, e.g. 1, 3, 10; give two at least, tune documents choose.",
            "none",
            type=float,
            multiple=True,
            metavar="NUMBER",
            panel=experts,
        ),
        knob("--seed", "seed", "Seed of split, clustering and training.", type=int, panel=experts),
    ]
    return _apply(function, options)


def routing_options(function: F) -> F:
    """Options that differ from what the bank says; none is a default of ours."""
    names = {
        "router": (
            "--router",
            str,
            "Router: sparse_softmax, threshold, members, sift, nearest, uniform, or another package's.",
        ),
        "beta": ("--beta", float, "Temperature β; 0 = the nearest expert alone."),
        "tau": ("--tau", float, "Leave out experts whose softmax weight is not above τ."),
        "active": ("--active", float, "Find β anew for this mean number of active experts."),
        "max_experts": ("--max-experts", int, "Never more experts than this."),
        "sift_lambda": ("--sift-lambda", float, "λ of the router sift."),
    }
    return _apply(
        function,
        [
            click.option(
                flag,
                f"route_{name}",
                type=kind,
                panel="How to route",
                help=f"{text} [dim]\\[default: the bank's][/dim]",
            )
            for name, (flag, kind, text) in names.items()
        ],
    )


def model_options(function: F) -> F:
    """Where base and encoder are, and how they are loaded."""
    panel = "Models"
    return _apply(
        function,
        [
            click.option("--base", metavar="NAME|FOLDER", panel=panel, help="Where the base is, if it moved."),
            encoder_option(),
            click.option(
                "--base-variant", is_flag=True, panel=panel, help="Allow a base with other weights than the bank's."
            ),
            click.option(
                "--quantised",
                type=click.Choice(["int8", "int4", "nf4"]),
                panel=panel,
                help="Round the base's weights: less memory, other answers (extras: quantised; nf4 for nf4).",
            ),
            click.option("--device-map", metavar="MAP", panel=panel, help="Spread the base over devices, e.g. auto."),
            click.option(
                "--trust-remote-code", is_flag=True, panel=panel, help="Run code that comes with the base model."
            ),
        ],
    )


def encoder_option() -> Callable[[F], F]:
    """Where the encoder is."""
    return click.option("--encoder", metavar="NAME|FOLDER", panel="Models", help="Where the encoder is, if it moved.")


def draw_options(function: F) -> F:
    """The fields of GenerateConfig."""
    return _apply(
        function,
        [
            generation_option("--max-new-tokens", "max_new_tokens", "Stop after this many tokens.", type=int),
            generation_option("--temperature", "temperature", "0 = the likeliest token every time.", type=float),
            generation_option("--top-p", "top_p", "Draw from the likeliest tokens of this probability.", type=float),
            generation_option("--seed", "seed", "The same seed draws the same tokens.", type=int),
        ],
    )


def execution_options(function: F) -> F:
    """The everyday fields of ExecutionConfig."""
    panel = "How to run a mix"
    return _apply(
        function,
        [
            _shown(
                "--execution",
                "execution",
                default_of(ExecutionConfig, "execution"),
                "Merge (dense), or leave factors beside the weights (stacked; grouped: a mix a row).",
                "",
                panel=panel,
                type=click.Choice(["auto", "dense", "stacked", "grouped"]),
            ),
            _gigabytes(
                "--expert-memory",
                "host_bytes",
                "Experts kept in memory at most. [dim]\\[default: a quarter of the machine's][/dim]",
            ),
        ],
    )


def mix_memory_option() -> Callable[[F], F]:
    """Where many prompts are answered: memory for mixes that come again."""
    default = f"[dim]\\[default: {default_of(ExecutionConfig, 'mix_cache_bytes') / 1e9:g}][/dim]"
    return _gigabytes("--mix-memory", "mix_cache_bytes", f"Memory for more merged mixes than the last. {default}")


def _gigabytes(flag: str, name: str, text: str) -> Callable[[F], F]:
    """An option in GB, handed on in bytes."""

    def in_bytes(_context: click.Context, _option: click.Parameter, value: float | None) -> int | None:
        if value is None:
            return None
        if not 0 <= value < math.inf:
            raise click.BadParameter(f"{value:g} is no size; give gigabytes, such as 2.5")
        return int(value * 1e9)

    return click.option(flag, name, type=float, callback=in_bytes, metavar="GB", panel="How to run a mix", help=text)


def execution_config(options: dict[str, Any]) -> ExecutionConfig:
    """The fields of ExecutionConfig that were given; raises ConfigError for a value out of range."""
    given = {name: options.get(name) for name in ("execution", "host_bytes", "mix_cache_bytes")}
    return checked(ExecutionConfig, {name: value for name, value in given.items() if value is not None})


def eval_options(function: F) -> F:
    """Settings of an evaluation: a file, any key, and everyday keys as options of their own."""
    what, every = "What to measure", "Every setting"

    options: list[Callable[[F], F]] = [
        click.option(
            "--methods",
            metavar="NAME,NAME",
            panel=what,
            help=f"What to compare. [dim]\\[default: {','.join(default_of(EvalConfig, 'methods'))}][/dim]",
        ),
        *(
            _shown(f"--{key}", key, default_of(EvalConfig, key), text, "all", panel=what, type=int)
            for key, text in (
                ("documents", "Held-out documents at most."),
                ("prefix", "First tokens of a document, which carry no loss; 200 is usual for code."),
                ("length", "Tokens of a document at most."),
            )
        ),
        click.option(
            "-c", "--config", "file", type=PATH, metavar="FILE.yaml", panel=every, help="Read settings from a file."
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            panel=every,
            help="Set any key, e.g. ttt.documents=20; may be repeated, and wins over the file and the other options.",
        ),
        click.option(
            "--figure",
            "figures",
            multiple=True,
            metavar="NAME",
            panel="Figures of the paper",
            help="Make a figure or table instead, e.g. 5, table-8, all; may be repeated.",
        ),
        click.option(
            "--with",
            "others",
            multiple=True,
            type=PATH,
            metavar="BANK|RESULTS",
            panel="Figures of the paper",
            help="Another bank, or the folder of another evaluation, for figures that compare; may be repeated.",
        ),
    ]
    return _apply(function, options)


def eval_config(options: dict[str, Any]) -> EvalConfig:
    """The settings of an evaluation: file < everyday options < --set; raises ConfigError."""
    names = ("documents", "prefix", "length")
    given = [f"{name}={options[name]}" for name in names if options[name] is not None]
    if options["methods"] is not None:
        given.append(f"methods={json.dumps([name.strip() for name in options['methods'].split(',') if name.strip()])}")
    settings = [setting for setting in options["settings"] if not setting.startswith("figure.")]
    return load_eval_config(options["file"], [*given, *settings])


def lm_eval_options(function: F) -> F:
    """The fields of LmEvalConfig."""

    def option(flag: str, name: str, text: str, none: str = "", **how: Any) -> Callable[[F], F]:
        return _shown(flag, name, default_of(LmEvalConfig, name), text, none, panel="How to ask", **how)

    choice = click.Choice
    return _apply(
        function,
        [
            option("--fewshot", "fewshot", "Examples before every question.", "as each task says", type=int),
            option("--limit", "limit", "Only the first documents of every task.", "all", type=int),
            option(
                "--route-on", "route_on", "What chooses the mix.", type=choice(["question", "context", "last_block"])
            ),
            option(
                "--chat-template",
                "chat_template",
                "Ask through the base's chat template, or with and without it.",
                type=choice(["off", "on", "both"]),
            ),
            option(
                "--compare",
                "compare",
                "Ask base or trunk (of a joint bank the mean of its mixes) the same.",
                type=choice(["base", "trunk", "both", "none"]),
            ),
            option(
                "--adapter",
                "adapter",
                "Ask the base with this adapter the same, e.g. BANK-eval/experts/fine-tuned-...",
                metavar="PEFT-FOLDER",
            ),
            option("--batch", "batch", "Requests per forward.", type=int),
            option("--prefix-tokens", "prefix_tokens", "Of a text scored as a whole: what chooses the mix.", type=int),
        ],
    )


def prompt_options(function: F) -> F:
    """A prompt: an argument, a file, or stdin."""
    return _apply(
        function,
        [
            click.argument("prompt", required=False),
            click.option(
                "--file",
                "prompt_file",
                type=PATH,
                metavar="FILE",
                help="Read the prompt from a file (or PROMPT = -: stdin).",
            ),
        ],
    )


def _apply(function: F, options: Sequence[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def build_config(options: dict[str, Any], more: Sequence[str] = ()) -> BuildConfig:
    """The configuration: file < everyday options < `more` < --set; raises ConfigError."""
    file, settings = options.get("file"), options.get("settings", ())
    keys = {name: value for name, value in options.items() if name not in ("file", "settings")}
    given = {name.replace("__", "."): value for name, value in keys.items() if value is not None and value != ()}
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return load_config(file, [*overrides, *more, *settings])


def route_changes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of RouteConfig that were given."""
    found = {name: options[f"route_{name}"] for name in (field.name for field in dataclasses.fields(RouteConfig))}
    return {name: value for name, value in found.items() if value is not None}


def generate_config(options: dict[str, Any]) -> GenerateConfig:
    """The fields of GenerateConfig that were given; raises ConfigError for a value out of range."""
    names = [field.name for field in dataclasses.fields(GenerateConfig)]
    return checked(GenerateConfig, {name: options[name] for name in names if options.get(name) is not None})


def lm_eval_config(options: dict[str, Any]) -> LmEvalConfig:
    """The fields of LmEvalConfig that were given; raises ConfigError for a value out of range."""
    names = [field.name for field in dataclasses.fields(LmEvalConfig)]
    return checked(LmEvalConfig, {name: options[name] for name in names if options[name] is not None})
