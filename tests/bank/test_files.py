"""Content-addressed files: names from content, equal content once, nothing left after a full disk."""

import errno
import hashlib
import os
from pathlib import Path

import pyarrow
import pytest
import safetensors.torch
import torch
from tiny_bank import random_adapter

from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_json, write_table, write_tensors, write_texts
from localmoe.errors import BankError, TemporaryError

WRITERS = {
    "tensors": lambda path: write_tensors(path, "embeddings", {"embeddings": torch.ones(3, 4)}),
    "table": lambda path: write_table(path, "texts", pyarrow.table({"id": ["a"], "text": ["Ä"]})),
    "texts": lambda path: write_texts(path, iter([("a", "Ä", []), ("b", "ö", [])])),
    "json": lambda path: write_json(path, "clusters", {"tree": [0, [1, 2]], "name": "Ä"}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_carries_the_hash_of_its_content_and_is_written_once(tmp_path: Path, write) -> None:
    record = write(tmp_path)
    (file,) = tmp_path.iterdir()
    assert record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record.bytes == file.stat().st_size
    assert file.stem.endswith(f"-{record.sha256[:12]}")
    inode = file.stat().st_ino
    assert write(tmp_path) == record
    assert file.stat().st_ino == inode
    assert write(tmp_path / "other") == record


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_damaged_file_is_mended_by_writing_it_again(tmp_path: Path, write) -> None:
    record = write(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert write(tmp_path) == record
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256


def test_views_and_shared_tensors_are_written_as_what_they_hold(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"means": whole.T, "centroids": whole.T, "row": whole[1:2]}
    write_tensors(tmp_path, "centroids", tensors)
    read = safetensors.torch.load_file(next(tmp_path.iterdir()))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="centroids: means is not finite"):
        write_tensors(tmp_path, "centroids", {"means": torch.tensor([[1.0, float("nan")]])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_temporary_error_and_leaves_nothing_s6(tmp_path: Path, monkeypatch, number) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    writers = [*WRITERS.values(), lambda path: write_adapter(path, "trunk", random_adapter(0), "tiny", False)]
    for write in writers:
        needs = "" if write is WRITERS["texts"] else r"needs [\d.]+ MB \([1-9][\d,]* bytes\), "
        with pytest.raises(TemporaryError, match=rf"is full: {needs}has .* bytes\)") as caught:
            write(tmp_path)
        assert caught.value.exit_code == 75
        assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_a_folder_is_a_temporary_error_too_s6(tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(TemporaryError, match="is full"):
        WRITERS["json"](tmp_path / "a" / "b")


def test_other_errors_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output error"):
        WRITERS["json"](tmp_path)
    assert not list(tmp_path.iterdir())
