"""The errors that LocalMoE raises for its users; each says what was wrong, where, and what to do next.

LocalMoEError                 1    anything that went wrong and has no better name
├── UsageError                2    an argument or a configuration cannot be used
│   ├── ConfigError                a key or value of the configuration
│   ├── CorpusError                no document can be read from what was given
│   ├── UnknownNameError           a name that no registry, bank or package knows (also a KeyError)
│   └── PromptError                a prompt that is empty or longer than the context
├── PartialError              3    some experts failed; the others are in the bank
├── BankError                 4    the bank is missing, damaged, or of another base or encoder
├── LockedError               5    another process is building here
└── TemporaryError           75    the disk is full, the network is gone: the same command may work later

The number is the exit code of the command line (Ctrl-C gives 130).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocalMoEError(Exception):
    """Base of all errors meant for users: `what` went wrong, and `remedy`, the next thing to do."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        Exception.__init__(self, what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n{self.remedy}" if self.remedy else self.what


class UsageError(LocalMoEError):
    """An argument or a configuration cannot be used."""

    exit_code = 2


class ConfigError(UsageError):
    """A key or a value of the configuration cannot be used."""


class CorpusError(UsageError):
    """No document can be read from what was given."""


class PromptError(UsageError):
    """A prompt is empty or longer than the model's context."""


class UnknownNameError(UsageError, KeyError):
    """A name that is not known; the message lists the names that are, the nearest first."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        names = sorted(known)
        if not remedy and names:
            remedy = f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}{did_you_mean(name, names)}", remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.what, self.remedy)


class PartialError(LocalMoEError):
    """Some experts failed; everything else was finished and is in the bank."""

    exit_code = 3


class BankError(LocalMoEError):
    """A bank is missing, damaged, or belongs to another base model or encoder."""

    exit_code = 4


class LockedError(LocalMoEError):
    """Another process is building in this folder."""

    exit_code = 5


class TemporaryError(LocalMoEError):
    """The machine could not do it now (disk full, network gone); the same command may work later."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'rank'?"` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _restored(kind: type[LocalMoEError], what: str, remedy: str) -> LocalMoEError:
    """An error that travelled between processes, whatever its own constructor takes."""
    error = kind.__new__(kind)
    LocalMoEError.__init__(error, what, remedy)
    return error
