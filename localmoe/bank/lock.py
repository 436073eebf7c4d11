"""The build lock: one builder in a bank at a time, as a courtesy; what makes a bank safe is the commit."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from localmoe.bank.files import temporary
from localmoe.errors import LocalMoEError, LockedError, UsageError

LOCK = "build.lock"
OWNER = "build.owner.json"

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Holds the bank at `path` (made if absent) for this process; the lock of a dead process is no obstacle.

    Raises LockedError at once if another process holds it, naming its pid, host and start; UsageError for a
    folder that cannot be written; LocalMoEError where the file system cannot make the hard links of a commit.
    """
    # A soft lock would outlive a crash; where the kernel has no lock to give, none is better.
    lock = FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise LockedError(
            f"another process is building in {path}: {_read_owner(path)}",
            "wait until it has finished, or stop it",
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UsageError(f"cannot write to {path}: {error.strerror}", "choose a folder of your own") from error
        warnings.warn(f"{path} is on a file system without locks: start no second build here", stacklevel=3)
    with ExitStack() as held:
        held.callback(lock.release)
        held.callback((path / OWNER).unlink, missing_ok=True)
        _write_owner(path)
        yield


def _write_owner(path: Path) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    with temporary(path, len(owner)) as probe:
        (path / OWNER).write_text(owner, encoding="utf-8")
        try:
            os.link(path / OWNER, probe)  # a commit needs it: better to hear now than after the build
        except OSError as error:
            raise LocalMoEError(
                f"the file system of {path} cannot make hard links: {error.strerror}", "build on another disk"
            ) from error


def _read_owner(path: Path) -> str:
    try:
        owner = json.loads((path / OWNER).read_text(encoding="utf-8"))
        return f"pid {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "one that has not said yet who it is"
