"""The command line: every verb reads its options, calls one function, and shows what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from localmoe.config import EvalConfig, as_dict
from localmoe.terminal.options import (
    PATH,
    as_json,
    build_config,
    build_options,
    draw_options,
    eval_config,
    eval_options,
    execution_config,
    execution_options,
    generate_config,
    generation_option,
    knob,
    lm_eval_config,
    lm_eval_options,
    mix_memory_option,
    model_options,
    prompt_options,
    route_changes,
    routing_options,
)
from localmoe.terminal.verbs import Verbs, keys_epilog, prompt_text

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "rich_help_config": {"text_markup": "rich", "max_width": 110, "text_paragraph_linebreaks": "\n\n"},
}


@click.group(cls=Verbs, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, envvar="LOCALMOE_DEBUG", help="Show tracebacks of errors.")
@click.version_option(package_name="localmoe", message="localmoe %(version)s")
def main(debug: bool) -> None:
    """Many small experts from your corpus, merged anew for every prompt.

    [dim]Start here:[/dim]
        [cyan]$[/cyan] localmoe demo                               minutes; needs no corpus of yours
        [cyan]$[/cyan] localmoe build notes/ notes-bank            a bank of your own
        [cyan]$[/cyan] localmoe generate notes-bank "At dawn"      ask it

    [dim]Exit codes: 0 ok, 1 failure, 2 usage, 3 some experts failed, 4 bank invalid, 5 locked, 75 try again later,
    130 interrupted.[/dim]
    """


@main.command(panel="Start here")
@click.option("--bank", type=PATH, default="demo-bank", show_default=True, help="Folder of the bank.")
@knob("--base", "base", "Base model: a hub id, a folder, or a packaged model.", panel="Models")
@knob(
    "--encoder",
    "encoder",
    "Sentence encoder: a hub id, a folder, a packaged model, 'static' or 'base'.",
    panel="Models",
)
def demo(bank: Path, **options: str | None) -> None:
    """Build a bank of Python's standard library, and show on held-out files and three prompts what it is worth.

    The same command goes on where it was stopped, and builds nothing twice.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe demo
        [cyan]$[/cyan] localmoe demo --bank /tmp/demo-bank
    """
    from localmoe.terminal.demonstration import demonstrate

    config = build_config(options)
    demonstrate(bank, config.base, config.encoder)


@main.command(panel="Make a bank", epilog=keys_epilog())
@click.argument("source")
@build_options
@click.option("--no-probe", is_flag=True, help="Skip the timing.")
@as_json
def plan(source: str, no_probe: bool, as_json: bool, **options: Any) -> None:
    """Say what `build` would make of a corpus: documents, experts, disk and time; nothing is kept.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe plan notes/
        [cyan]$[/cyan] localmoe plan code/ --include '*.py' --clusters 40
        [cyan]$[/cyan] localmoe plan records.jsonl --text-field body --no-probe
    """
    from localmoe.terminal import plans, progress, screen
    from localmoe.train.plan import plan as make

    config = build_config(options)
    with progress.watching() as watch:
        made = make(source, config, probe=not no_probe, watch=watch)
    if as_json:
        screen.print_json(plans.plan_data(made))
    else:
        plans.show_plan(screen.results(), made)


@main.command(panel="Make a bank", epilog=keys_epilog())
@click.argument("source")
@click.argument("bank", type=PATH)
@build_options
@click.option("--no-texts", is_flag=True, help="Do not keep the documents' texts in the bank.")
@as_json
def build(source: str, bank: Path, no_texts: bool, as_json: bool, **options: Any) -> None:
    """Cluster a corpus (folder, file or dataset id), train one expert a cluster, and leave them in a bank.

    The same command goes on where it was stopped, and does nothing if nothing changed.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe build notes/ notes-bank
        [cyan]$[/cyan] localmoe build code/ code-bank --include '*.py' --clusters 40
        [cyan]$[/cyan] localmoe build records.jsonl bank -c settings.yaml --set train.batch=8
    """
    from localmoe.terminal import progress, screen, summary
    from localmoe.train.pipeline import build as make

    config = build_config(options, ["keep_texts=false"] if no_texts else [])
    with progress.watching(as_json) as watch:
        made = make(source, bank, config, watch=watch)
    data = summary.bank_data(made)
    if as_json:
        screen.print_json(data)
    else:
        summary.show_bank(screen.results(), data)
    summary.raise_for_failed(data)


@main.command(panel="Use a bank")
@click.argument("bank", type=PATH)
@prompt_options
@routing_options
@model_options
@click.option(
    "--explain", is_flag=True, help="Also run the mix in every way there is: predicted and measured time of each."
)
@generation_option("--max-new-tokens", "max_new_tokens", "With --explain: tokens of each answer at most.", type=int)
@as_json
def route(
    bank: Path, prompt: str | None, prompt_file: Path | None, explain: bool, as_json: bool, **options: Any
) -> None:
    """Show which experts a prompt gets, and the documents nearest to it; needs no base model but with --explain.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe route notes-bank "The harbour at dawn"
        [cyan]$[/cyan] git diff | localmoe route code-bank - --json
        [cyan]$[/cyan] localmoe route notes-bank "At dawn" --explain
    """
    from localmoe.runtime.router import open_router
    from localmoe.terminal import explanations, mixes, screen

    text = prompt_text(prompt, prompt_file)
    engine = _engine(bank, options, calibrated=False) if explain else None
    router = open_router(bank, options["encoder"], route_changes(options)) if engine is None else engine.router
    vector = router.embed(text)
    mix, near = router.select(vector), router.neighbours(vector)
    data = mixes.route_data(router.bank, mix, near, router.config)
    if engine is not None:
        data["execution"] = explanations.explain_data(engine, text, generate_config(options), mix)
    if as_json:
        screen.print_json(data)
    else:
        mixes.show_route(screen.results(), data, router.bank, mix)
        if explain:
            explanations.show_explanation(screen.results(), data["execution"])


@main.command(panel="Use a bank")
@click.argument("bank", type=PATH)
@prompt_options
@draw_options
@execution_options
@routing_options
@model_options
@click.option("--show-mix", is_flag=True, help="Show the mix before and the times after, on stderr.")
@as_json
def generate(
    bank: Path, prompt: str | None, prompt_file: Path | None, show_mix: bool, as_json: bool, **options: Any
) -> None:
    """Go on from a prompt with the model merged for it; the text streams to stdout.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe generate notes-bank "The harbour at dawn"
        [cyan]$[/cyan] localmoe generate notes-bank --file prompt.txt --show-mix
        [cyan]$[/cyan] echo "def parse(" | localmoe generate code-bank --temperature 0.7 --seed 1
    """
    from localmoe.terminal import answers

    text, config = prompt_text(prompt, prompt_file), generate_config(options)
    engine = _engine(bank, options)
    answers.generate(engine, text, config, show_mix, as_json)


@main.command(panel="Use a bank")
@click.argument("bank", type=PATH)
@draw_options
@execution_options
@mix_memory_option()
@routing_options
@model_options
@click.option("--sticky", is_flag=True, help="Keep the first message's mix: later answers begin sooner.")
def chat(bank: Path, sticky: bool, **options: Any) -> None:
    """Talk with a bank whose base model is instruction-tuned; every message gets a mix of its own.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe chat notes-bank
        [cyan]$[/cyan] localmoe chat notes-bank --temperature 0.7 --seed 1
        [cyan]$[/cyan] printf 'Where is the harbour?\\n/mix\\n' | localmoe chat notes-bank
    """
    from localmoe.terminal.chat import chat as talk

    config = generate_config(options)
    talk(_engine(bank, options), config, sticky)


@main.command("eval", panel="Look at a bank", epilog=keys_epilog(EvalConfig))
@click.argument("bank", type=PATH)
@eval_options
@routing_options
@model_options
@click.option("-o", "--output", type=PATH, metavar="FOLDER", help="Where results go. [dim]\\[default: BANK-eval][/dim]")
@as_json
def evaluate(bank: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Measure on held-out documents what a bank is worth: against its base, and against one plain fine-tune.

    The fine-tune gets as many training tokens as the bank. The same command goes on where it was stopped; more methods
    can be added later. Results, report and plots are left in FOLDER; with --figure, that figure and its data instead.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe eval notes-bank
        [cyan]$[/cyan] localmoe eval code-bank --prefix 200 --documents 300 -o code-results
        [cyan]$[/cyan] localmoe eval notes-bank --figure 5 --figure table-8 --set figure.active=[1,3,10]
    """
    from localmoe.terminal import evaluations, screen

    config = eval_config(options)
    folder = output if output is not None else Path(f"{bank.resolve().name}-eval")
    if options["figures"]:
        from localmoe.terminal import figures

        figures.make(bank, folder, config, options, lambda path: _engine(path, options), as_json)
        return
    results = evaluations.run(_engine(bank, options), folder, config)
    if as_json:
        screen.print_json(as_dict(results))
    else:
        evaluations.show_results(screen.results(), results)
        screen.results().print(f"\nreport: {folder / 'report.html'}", markup=False, soft_wrap=True)


@main.command("lm-eval", panel="Look at a bank")
@click.argument("bank", type=PATH)
@click.option("--tasks", required=True, metavar="NAME,...", help="Tasks, separated by commas.")
@click.option("--data", type=PATH, metavar="FOLDER", help="Folder of task files; other names are the harness's own.")
@click.option("-o", "--output", type=PATH, metavar="FOLDER", help="Keep the harness's result files there.")
@click.option("--cache", type=PATH, metavar="FOLDER", help="Keep answers there, for the next run of the same.")
@lm_eval_options
@routing_options
@model_options
@as_json
def lm_eval(
    bank: Path,
    tasks: str,
    data: Path | None,
    output: Path | None,
    cache: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a bank, and its base beside it, the tasks of lm-evaluation-harness; compare them document by document.

    A task is a file in --data (arc_easy: arc_easy.jsonl; NAME_nll: how likely its reference answers are; mmlu,
    mmlu_anatomy, ...: mmlu*.tar.gz), or one of the harness's own, which need the hub.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe lm-eval notes-bank --data tasks/ --tasks arc_easy,boolq --limit 100
        [cyan]$[/cyan] localmoe lm-eval math-bank --data tasks/ --tasks gsm8k,gsm8k_nll --chat-template both -o results/
        [cyan]$[/cyan] localmoe lm-eval notes-bank --tasks hellaswag --fewshot 5 --json
    """
    from localmoe.evaluate.downstream import evaluate_downstream
    from localmoe.terminal import downstream, screen

    config, names = lm_eval_config(options), [name.strip() for name in tasks.split(",") if name.strip()]
    engine = _engine(bank, options)
    runs, compared = evaluate_downstream(engine, names, config, data, output, cache)
    if as_json:
        screen.print_json(downstream.downstream_data(engine.bank, config, runs, compared))
    else:
        downstream.show_downstream(screen.results(), runs, compared)


@main.command(panel="Look at a bank")
@click.argument("bank", type=PATH)
@click.option("--verify", is_flag=True, help="Compare every file with its hash; exit code 4 if one is damaged.")
@as_json
def info(bank: Path, verify: bool, as_json: bool) -> None:
    """Say what a bank holds: base, router, experts and whether they help, corpus, size.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe info notes-bank
        [cyan]$[/cyan] localmoe info notes-bank --verify
        [cyan]$[/cyan] localmoe info notes-bank --json | jq '.experts[].label'
    """
    from localmoe.terminal import screen, summary

    opened = summary.open_for_info(bank, verify)
    data = summary.bank_data(opened)
    if as_json:
        screen.print_json(data)
    else:
        summary.show_bank(screen.results(), data)


@main.command("map", panel="Look at a bank")
@click.argument("bank", type=PATH)
@click.option(
    "-o", "--output", type=PATH, metavar="FILE.html", help="Where to write it. [dim]\\[default: BANK-map.html][/dim]"
)
def draw_map(bank: Path, output: Path | None) -> None:
    """Draw the corpus as a map, one colour an expert, in one HTML file that needs no network.

    [dim]Examples:[/dim]
        [cyan]$[/cyan] localmoe map notes-bank
        [cyan]$[/cyan] localmoe map notes-bank -o notes.html
    """
    from localmoe.bank.store import Bank
    from localmoe.map import write_map
    from localmoe.terminal import screen

    target = output if output is not None else Path(f"{bank.resolve().name}-map.html")
    write_map(Bank.open(bank), target)
    screen.results().print(f"wrote {target}", markup=False, soft_wrap=True)


def _engine(bank: Path, options: dict[str, Any], calibrated: bool = True) -> Any:
    from localmoe.bank.store import Bank
    from localmoe.runtime.engine import open_engine
    from localmoe.runtime.router import route_config
    from localmoe.terminal import explanations, screen

    if options["trust_remote_code"]:
        screen.show_warning("--trust-remote-code runs Python code that comes with the base model, with all your rights")
    engine = open_engine(
        bank,
        options["base"],
        options["encoder"],
        route_config(Bank.open(bank), route_changes(options)),
        options["device_map"],
        options["base_variant"],
        options["trust_remote_code"],
        execution_config(options),
        options["quantised"],
    )
    if calibrated:
        explanations.calibrate(engine)
    return engine
