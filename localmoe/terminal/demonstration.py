"""What `localmoe demo` shows: the build, the clusters, the perplexities, three answers, the cost, and what to try."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from localmoe import demo
from localmoe.bank.store import Bank
from localmoe.evaluate.statistics import Comparison
from localmoe.quantities import duration_text
from localmoe.runtime.engine import Engine, open_engine
from localmoe.terminal.explanations import calibrate
from localmoe.terminal.mixes import show_mix
from localmoe.terminal.progress import watching
from localmoe.terminal.screen import facts, plain, remarks, results, table
from localmoe.train.pipeline import build


def demonstrate(path: Path, base: str, encoder: str) -> None:
    """Build the demo's bank at `path`, unless it is there, and show what it is worth; nothing is canned."""
    started = time.monotonic()
    console = results()
    config = demo.configuration(base, encoder)
    _heading(console, "1  Build", "localmoe build, on a sample of the source of Python's standard library")
    with watching() as watch:
        bank = build(demo.corpus(), path, config, watch=watch)
    _heading(console, "2  Clusters", demo.title(bank))
    _show_clusters(console, bank)
    engine = open_engine(path, base, encoder)
    calibrate(engine)  # or the first prompt would be charged with it
    _heading(
        console, "3  Is it worth it", "perplexity on held-out files: a prefix chooses the experts, the rest counts"
    )
    _show_worth(console, _measured(engine))
    _heading(console, "4  Three prompts", "each answered by the base model, and by a model merged for it")
    exchanges = []
    for prompt in demo.PROMPTS:
        exchanges.append(demo.ask(engine, prompt))
        _show_exchange(console, engine, exchanges[-1])
    _heading(console, "5  What it cost", "median of the three prompts")
    console.print(facts([(name, duration_text(seconds)) for name, seconds in demo.cost(exchanges).items()]))
    console.print(f"the whole demo took {duration_text(time.monotonic() - started)} in all", style="dim")
    _heading(console, "6  Try next", "")
    quoted = shlex.quote(str(path))
    for line in (
        f"localmoe generate {quoted} 'def read_zip(path):' --show-mix",
        f"localmoe map {quoted} -o map.html",
        "localmoe plan YOUR_FOLDER",
    ):
        console.print(f"  [cyan]{line}[/cyan]", soft_wrap=True)


def _heading(console: Console, title: str, subtitle: str) -> None:
    console.print()
    console.print(f"[bold]{title}[/bold]  [dim]{subtitle}[/dim]")


def _show_clusters(console: Console, bank: Bank) -> None:
    rows = table("expert", "label", "documents", "tokens", "check", right=("documents", "tokens"))
    for expert in bank.manifest.experts:
        outcome = expert.outcome
        gained = ""
        if outcome.nll is not None and outcome.reference_nll is not None:
            gained = f" {outcome.nll - outcome.reference_nll:+.3f} nats on {outcome.documents} documents"
        rows.add_row(
            expert.id,
            plain(expert.label),
            f"{expert.documents:,}",
            f"{expert.tokens:,}",
            plain(f"{outcome.status}{gained}"),
        )
    console.print(rows)


def _measured(engine: Engine) -> demo.Worth:
    columns = (TextColumn("evaluate"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=remarks(), transient=True) as bars:
        task = bars.add_task("evaluate", total=None)
        return demo.measure(engine, lambda done, total: bars.update(task, completed=done, total=total))


def _show_worth(console: Console, worth: demo.Worth) -> None:
    rows = table("model", "perplexity", "merging gains, with 95 % interval", right=("perplexity",))
    rows.add_row("base", f"{worth.base:.3f}", _comparison(worth.over_base))
    if worth.trunk is not None and worth.over_trunk is not None:
        rows.add_row("trunk (one adapter for all)", f"{worth.trunk:.3f}", _comparison(worth.over_trunk))
    rows.add_row(f"merged, {worth.active:.1f} experts a prompt", f"{worth.merged:.3f}", "")
    console.print(rows)
    console.print(f"{worth.documents} documents, {worth.tokens:,} tokens counted; paired bootstrap", style="dim")
    console.print(
        "The trunk is the mean of all mixes: this shows what it buys to ask the prompt which experts it needs, not "
        "that the bank beats one adapter trained for as many tokens. localmoe eval compares with that one.",
        style="dim",
    )


def _comparison(found: Comparison) -> str:
    return f"{found.gain:+.2%} \\[{found.low:+.2%}, {found.high:+.2%}]: {found.verdict}"


def _show_exchange(console: Console, engine: Engine, exchange: demo.Exchange) -> None:
    console.print()
    console.print(Panel(plain_lines(exchange.prompt), title="prompt", title_align="left", border_style="dim"))
    show_mix(console, engine.bank, exchange.merged.mix)
    for name, answer in (("base", exchange.base), ("merged", exchange.merged)):
        console.print(Panel(plain_lines(answer.text), title=name, title_align="left"))


def plain_lines(text: str) -> str:
    """Model output as it is, its brackets and control characters harmless."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else " " for c in text).strip("\n"))
