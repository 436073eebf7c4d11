"""Verbs: the group that turns errors into messages and exit codes, and how prompts, keys and values are read."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import rich_click as click
from click.exceptions import Exit

from localmoe.config import BuildConfig
from localmoe.errors import ConfigError, LocalMoEError, PromptError, TemporaryError, UsageError
from localmoe.terminal.screen import readable_warnings, remarks, show_error

T = TypeVar("T")

INTERRUPTED = 130
RESUMABLE = ("build", "demo", "eval")
"""Verbs that go on where they were interrupted."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Verbs(click.RichGroup):
    """The command group; whatever a verb raises becomes one message on stderr and the exit code of its class."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run the command line and exit."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name if prog_name is not None else "localmoe", **extra)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            path = (
                error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else "localmoe"
            )
            show_error(UsageError(error.format_message(), f"{path} --help"))
            sys.exit(UsageError.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which a user meets them, not the alphabet's."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb."""
        debug = bool(ctx.params["debug"])
        try:
            with readable_warnings():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except (click.ClickException, click.Abort, Exit):
            raise
        except LocalMoEError as error:
            show_error(error, debug)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            again = "; what is finished is kept: go on with the same command"
            remarks().print("\ninterrupted" + (again if ctx.invoked_subcommand in RESUMABLE else ""))
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has seen enough; the code is click's and rich's
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(LocalMoEError.exit_code)
        except Exception as error:
            told = _told(error, ctx.invoked_subcommand)
            show_error(told, debug)
            ctx.exit(told.exit_code)


def _told(error: Exception, verb: str | None) -> LocalMoEError:
    """An error that nobody foresaw, as one of ours with the other as its cause."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        told: LocalMoEError = TemporaryError(
            f"the disk is full: {error}", "make room and type the same command again: what is finished is kept"
        )
    else:
        told = LocalMoEError(
            f"unexpected {type(error).__name__}: {error}",
            f"see where, and report it if it is our fault: localmoe --debug {verb} ...",
        )
    told.__cause__ = error
    return told


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt: the argument, a file, or stdin (also for "-"); one newline at the end of the latter two is dropped.

    Raises PromptError if there is none or if there are two, UsageError for a file that is not text.
    """
    if prompt is not None and file is not None:
        raise PromptError("there are two prompts: an argument and --file", "give one of them")
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and prompt is None and sys.stdin.isatty():
        raise PromptError("there is no prompt", "give it as an argument, with --file FILE, or on stdin")
    try:
        text = file.read_text(encoding="utf-8") if file is not None else sys.stdin.read()
    except OSError as error:
        raise UsageError(f"cannot read the prompt {file}: {error.strerror}", "give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8", "convert it: iconv -t UTF-8") from error
    return text.removesuffix("\n")


def checked(kind: type[T], values: Mapping[str, Any]) -> T:
    """A configuration dataclass from options; raises ConfigError for a value out of range."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option} {problem['input']}: {problem['msg'].lower()}") from error


def keys_epilog(config: type = BuildConfig) -> str:
    """Every key of a build (or of another configuration) with its default, a paragraph a section."""
    groups: dict[str, list[str]] = {"": []}
    for field in dataclasses.fields(config):
        if not dataclasses.is_dataclass(field.default):
            groups[""].append(_pair(field.name, field))
            continue
        groups[field.name] = [_pair(f"{field.name}.{inner.name}", inner) for inner in dataclasses.fields(field.default)]
    paragraphs = [", ".join(pairs) for pairs in groups.values()]
    return "\n\n".join(["[bold]Every key[/bold] for FILE.yaml and --set, with its default:", *paragraphs])


def _pair(key: str, field: Any) -> str:
    if field.default is None or isinstance(field.default, bool):
        return f"{key}={'null' if field.default is None else str(field.default).lower()}"
    if isinstance(field.default, tuple):
        return f"{key}=\\[{','.join(map(str, field.default))}]"  # as --set takes it
    return f"{key}={'{}' if field.default is dataclasses.MISSING else field.default}"
