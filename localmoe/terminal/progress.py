"""Progress of a build: bars on a terminal, now and then a line elsewhere, or JSON lines."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from localmoe.terminal.screen import plain, print_json, remarks
from localmoe.train.progress import Event, Stage, Watch

if TYPE_CHECKING:
    from rich.console import Console

STAGES: dict[Stage, tuple[str, str]] = {
    "read": ("read", "documents"),
    "tokenize": ("tokenize", "documents"),
    "embed": ("embed", "documents"),
    "cluster": ("cluster", "clusters"),
    "prompts": ("embed prompts", "documents"),
    "rates": ("try rates", "tokens"),
    "trunk": ("train trunk", "tokens"),
    "experts": ("train experts", "tokens"),
    "route": ("tune router", ""),
    "commit": ("commit", ""),
}
"""What a stage is called, and what it counts."""

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal; notes come at once."""


@contextmanager
def watching(as_json: bool = False) -> Iterator[Watch]:
    """What to hand to `build` as `watch`: JSON lines on stdout, else bars or lines on stderr."""
    if as_json:
        yield show_json
        return
    console = remarks()
    if console.is_terminal:
        with _bars(console) as watch:
            yield watch
    else:
        yield Lines(lambda line: console.print(plain(line), soft_wrap=True))


def show_json(event: Event) -> None:
    """The event as one JSON object."""
    print_json({"event": event.stage} | {k: v for k, v in dataclasses.asdict(event).items() if k != "stage"})


class Lines:
    """Plain lines: every note at once, and at most every `LINE_EVERY` seconds how far it is and how fast."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._stage: Stage | None = None
        self._first = self._last = (clock(), 0)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        now = self._clock()
        if event.stage != self._stage:
            self._stage = event.stage
            self._first = (now, event.done)
            self._last = (now, event.done)
        if event.note:
            self._say(f"{STAGES[event.stage][0]}: {event.note}")
        elif now - self._last[0] >= LINE_EVERY:
            self._last = (now, event.done)
            self._say(self._line(event, now))

    def count(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is that has no event of its own."""
        now = self._clock()
        if done == total or now - self._last[0] >= LINE_EVERY:
            self._last = (now, done)
            self._say(f"{stage}: {done:,} of {total:,}")

    def _line(self, event: Event, now: float) -> str:
        name, unit = STAGES[event.stage]
        of = f" of {event.total:,}" if event.total else ""
        speed = (event.done - self._first[1]) / max(now - self._first[0], 1e-9)
        line = f"{name}: {event.done:,}{of} {unit}, {speed:,.0f} {unit}/s"
        if event.total and speed > 0:
            line += f", {clock_text((event.total - event.done) / speed)} left"
        return line


def clock_text(seconds: float) -> str:
    """`"0:12"`, `"1:02:03"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def _bars(console: Console) -> Iterator[Watch]:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        """Units a second, and the time that is left."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed if task.finished else task.speed
            shown = f"{speed:,.0f} {task.fields['unit']}/s" if speed and task.fields["unit"] else ""
            left = task.time_remaining
            shown += f"  {clock_text(left)} left" if left and not task.finished and task.total else ""
            return Text(shown, style="cyan")

    columns = (
        TextColumn("{task.description:<13}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[count]}"),
        Speed(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def watch(event: Event) -> None:
            name, unit = STAGES[event.stage]
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(name, total=event.total or None, unit=unit, count="")
            count = (f"{event.done:,}/{event.total:,}" if event.total else f"{event.done:,}") if unit else ""
            progress.update(tasks[event.stage], completed=event.done, total=event.total or None, count=count)
            if event.note:
                console.print(plain(f"{name}: {event.note}", "dim"))

        yield watch
