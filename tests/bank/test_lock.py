"""The build lock: one builder, who is named; a dead one is no obstacle."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from localmoe.bank.lock import build_lock
from localmoe.errors import LocalMoEError, LockedError, UsageError

HOLDER = (
    "import sys, time, pathlib\n"
    "from localmoe.bank.lock import build_lock\n"
    "with build_lock(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_second_builder_is_told_at_once_who_builds_s8_and_a_dead_one_is_no_obstacle_s10(
    tmp_path: Path,
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        who = rf"pid {holder.pid} on .*, since 20\d\d-"
        with pytest.raises(LockedError, match=who) as caught, build_lock(tmp_path):
            pytest.fail("two builders")
        assert caught.value.exit_code == 5
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with build_lock(tmp_path):
        assert (tmp_path / "build.owner.json").exists()
    assert not (tmp_path / "build.owner.json").exists()


def test_the_lock_is_given_back_after_an_error_and_names_an_unknown_owner(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), build_lock(tmp_path / "new"):
        raise KeyboardInterrupt
    with build_lock(tmp_path / "new"):
        (tmp_path / "new" / "build.owner.json").write_text("{")
        with pytest.raises(LockedError, match="not said yet who it is"), build_lock(tmp_path / "new"):
            pytest.fail("two builders")


def test_a_folder_that_cannot_be_written_is_said_at_the_start_s7(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="cannot write to"), build_lock(tmp_path / "file" / "bank"):
        pytest.fail("locked")


def test_a_file_system_without_hard_links_is_said_at_the_start(tmp_path: Path, monkeypatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LocalMoEError, match="cannot make hard links"), build_lock(tmp_path):
        pytest.fail("locked")
    monkeypatch.undo()
    with build_lock(tmp_path):
        assert sorted(file.name for file in tmp_path.iterdir()) == ["build.lock", "build.owner.json"]


def test_without_locks_the_build_goes_on_with_a_warning_s9(tmp_path: Path, monkeypatch) -> None:
    def no_locks(self: FileLock) -> None:
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with pytest.warns(UserWarning, match="without locks"), build_lock(tmp_path):
        assert (tmp_path / "build.owner.json").exists()
