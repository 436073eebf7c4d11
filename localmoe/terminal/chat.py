"""Chat in a terminal: one conversation with the model that is merged anew for every message."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from localmoe.config import GenerateConfig
from localmoe.errors import PromptError, UsageError
from localmoe.terminal.mixes import show_fallback, show_mix
from localmoe.terminal.screen import remarks, show_error, write_text

if TYPE_CHECKING:
    from localmoe.runtime.engine import Engine
    from localmoe.runtime.session import Session

COMMANDS = "/reset forgets the conversation, /mix shows the last mix, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(engine: Engine, config: GenerateConfig, sticky: bool = False) -> None:
    """Read messages from stdin until it ends or `/quit`; answers go to stdout, everything else to stderr.

    sticky: the first message's mix answers all of them, until `/reset`.
    A message that does not fit is taken back and said, and the chat goes on. Raises PromptError at once if the base
    model has no chat template.
    """
    if engine.tokenizer.chat_template is None:
        raise PromptError("the base model has no chat template", "use it without: localmoe generate BANK PROMPT")
    if sys.stdin.isatty():
        remarks().print(COMMANDS, style="dim")
    session = engine.session(config, sticky)
    for line in _messages():
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            _command(engine, session, line)
        elif line:
            _reply(session, line)


def _messages() -> Iterator[str]:
    """Lines from the keyboard or from a pipe; raises UsageError for a pipe that carries no text."""
    if not sys.stdin.isatty():
        try:
            yield from (line.strip() for line in sys.stdin)
        except UnicodeDecodeError as error:
            raise UsageError("the messages are not UTF-8", "convert them: iconv -t UTF-8") from error
        return
    with suppress(ImportError):  # Windows has none, and edits by itself
        import readline  # noqa: F401 - makes input() editable

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            remarks().print()
            return
        except KeyboardInterrupt:
            remarks().print("\n(/quit or Ctrl-D leaves)", style="dim")


def _command(engine: Engine, session: Session, line: str) -> None:
    if line == "/reset":
        session.reset()
        remarks().print("a new conversation", style="dim")
    elif line == "/mix" and session.mix is None:
        remarks().print("no answer yet", style="dim")
    elif line == "/mix" and session.mix is not None:
        show_mix(remarks(), engine.bank, session.mix)
    else:
        remarks().print(f"no command {line!r}: {COMMANDS}", style="dim", markup=False)


def _reply(session: Session, message: str) -> None:
    try:
        stream = session.begin(message)
    except PromptError as error:
        show_error(PromptError(error.what, "/reset starts anew, or write a shorter message"))
        return
    show_fallback(remarks(), stream.mix)
    said: list[str] = []
    try:
        for piece in stream:
            said.append(piece)
            write_text(piece)
    except KeyboardInterrupt:
        remarks().print(" (stopped)", style="dim")
    write_text("\n")
    session.end(message, stream, "".join(said))
