"""Answers: one generation, streamed to stdout, with its mix and its cost beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmoe.config import GenerateConfig
from localmoe.terminal.mixes import answer_data, show_cost, show_fallback, show_mix
from localmoe.terminal.screen import print_json, remarks, write_text

if TYPE_CHECKING:
    from localmoe.runtime.engine import Engine


def generate(engine: Engine, prompt: str, config: GenerateConfig, with_mix: bool, as_json: bool) -> None:
    """Stream the answer to stdout, or print it as one JSON object.

    The mix and the times go to stderr; a fall-back is said there in any case.
    """
    if as_json:
        print_json(answer_data(engine.bank, engine.generate(prompt, config)))
        return
    stream = engine.start(prompt, config)
    if with_mix:
        show_mix(remarks(), engine.bank, stream.mix)
    else:
        show_fallback(remarks(), stream.mix)
    said = []
    for piece in stream:
        said.append(piece)
        write_text(piece)
    write_text("\n")
    if with_mix:
        show_cost(remarks(), stream.answer("".join(said)))
