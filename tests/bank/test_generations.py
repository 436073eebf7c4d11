"""Generations: killed at any step, the old bank or the new one is there; races and pruning lose nothing."""

import errno
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_bank import random_adapter, write_bank

from localmoe.bank import generations as module
from localmoe.bank import store
from localmoe.bank.adapters import write_adapter
from localmoe.bank.generations import collect_garbage, commit, remove
from localmoe.bank.lock import build_lock
from localmoe.bank.manifest import Manifest, read_current
from localmoe.bank.store import Bank, verify
from localmoe.errors import BankError, LockedError, TemporaryError, UnknownNameError

STEPS = ("fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir")


class Killed(BaseException):
    """What `kill -9` looks like from inside: nothing after it happens, no tidying up either."""


@contextmanager
def killed_before_step(monkeypatch: pytest.MonkeyPatch, number: int):
    """From the numbered call of the file system on, each one ends the process."""
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > number:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def with_new_expert(path: Path) -> Manifest:
    """What a build does: writes another tea expert and returns the manifest that names it."""
    manifest = read_current(path)
    adapter = write_adapter(path, "experts/tea", random_adapter(33), "tiny", False)
    experts = (*manifest.experts[:2], replace(manifest.experts[2], adapter=adapter))
    return replace(manifest, experts=experts, created={})


def test_killed_between_any_two_steps_the_bank_is_old_or_new_and_the_same_build_works_again_s1_s2(
    make_bank, monkeypatch
) -> None:
    finished = 0
    for step in range(100):
        path = make_bank(f"bank-{step}")
        old = read_current(path).digest
        with killed_before_step(monkeypatch, step):
            try:
                new = commit(path, with_new_expert(path)).digest
                finished = step
            except Killed:
                pass
        bank = Bank.open(path, verify=True)
        if finished:
            assert bank.manifest.digest == new
            break
        assert bank.manifest.generation in (1, 2)
        assert (bank.manifest.digest == old) == (bank.manifest.generation == 1)
        again = commit(path, with_new_expert(path))
        assert again.digest != old
        assert Bank.open(path, verify=True).manifest == again
        collect_garbage(path)
        assert not [file for file in path.rglob("*") if file.name.startswith(".tmp-")]
    assert finished >= 9


def test_killed_in_the_first_build_there_is_no_bank_or_a_whole_one_s2(tmp_path: Path, monkeypatch) -> None:
    for step in range(0, 100, 3):
        path = tmp_path / str(step)
        path.mkdir()
        try:
            with killed_before_step(monkeypatch, step):
                commit(path, write_bank(path))
        except Killed:
            try:
                bank = Bank.open(path, verify=True)
            except BankError as error:
                assert "no finished bank" in error.what
            else:
                assert verify(bank) == []
            commit(path, write_bank(path))
            assert verify(Bank.open(path)) == []
        else:
            break
    assert step > 20


def test_content_is_on_the_disk_before_its_name_and_every_name_before_the_manifest_s5(tmp_path, monkeypatch) -> None:
    synced: set[int] = set()
    unsynced_folders: set[Path] = set()
    fsync = os.fsync

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        synced.add(inode)
        unsynced_folders.difference_update({f for f in unsynced_folders if f.stat().st_ino == inode})

    def named(function: Callable[..., object]) -> Callable[..., object]:
        def call(source: Path, target: Path) -> object:
            assert all(file.stat().st_ino in synced for file in [source, *source.rglob("*")])
            if target.name.startswith("manifest"):
                assert not unsynced_folders
            unsynced_folders.add(target.parent)
            return function(source, target)

        return call

    monkeypatch.setattr(os, "fsync", record_sync)
    for name in ("link", "rename", "replace"):
        monkeypatch.setattr(os, name, named(getattr(os, name)))
    commit(tmp_path / "bank", write_bank(tmp_path / "bank"))
    assert not unsynced_folders
    assert tmp_path.stat().st_ino in synced


def test_commits_that_race_give_a_generation_each_and_lose_no_file_s9(bank_path: Path) -> None:
    barrier, made = threading.Barrier(6), []

    def build(number: int) -> None:
        manifest = replace(with_new_expert(bank_path), created={"builder": number})
        barrier.wait()
        made.append(commit(bank_path, manifest))

    threads = [threading.Thread(target=build, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(manifest.generation for manifest in made) == [2, 3, 4, 5, 6, 7]
    for manifest in made:
        assert verify(Bank(bank_path, manifest)) == []
    assert read_current(bank_path) == max(made, key=lambda manifest: manifest.generation)


def test_a_commit_after_another_one_is_refused_when_it_must_follow_its_origin(bank_path: Path) -> None:
    manifest = read_current(bank_path)
    assert commit(bank_path, manifest, after=1).generation == 2
    with pytest.raises(TemporaryError, match="changed by another process"):
        commit(bank_path, manifest, after=1)
    assert read_current(bank_path).generation == 2


def test_a_commit_that_loses_the_race_in_its_last_step_is_refused_too(bank_path: Path, monkeypatch) -> None:
    manifest = read_current(bank_path)
    create = module._create

    def slow(path: Path, numbered: Manifest) -> bool:
        monkeypatch.undo()
        assert commit(path, replace(manifest, created={"who": "faster"})).generation == 2
        return create(path, numbered)

    monkeypatch.setattr(module, "_create", slow)
    with pytest.raises(TemporaryError, match="changed by another process"):
        commit(bank_path, manifest, after=1)
    assert read_current(bank_path).created == {"who": "faster"}


def test_the_number_of_a_damaged_manifest_is_not_used_again(bank_path: Path) -> None:
    (bank_path / "manifest-000004.json").write_bytes(b"{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert commit(bank_path, read_current(bank_path)).generation == 5
    assert (bank_path / "manifest-000004.json").read_bytes() == b"{"


def test_a_manifest_that_names_a_missing_or_cut_file_is_not_committed(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path)
    file = tmp_path / manifest.experts[1].adapter.folder / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(BankError, match=r"experts/boats.*the manifest says"):
        commit(tmp_path, manifest)
    file.unlink()
    with pytest.raises(BankError, match=r"experts/boats.* is missing"):
        commit(tmp_path, manifest)
    file.write_bytes(data)
    assert commit(tmp_path, manifest).generation == 1


def test_a_full_disk_leaves_the_old_bank_and_no_temporary_file_s6(bank_path: Path, monkeypatch) -> None:
    manifest = with_new_expert(bank_path)
    before = sorted(bank_path.rglob("*"))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(TemporaryError, match=r"needs .* has "):
            commit(bank_path, manifest)
    assert sorted(bank_path.rglob("*")) == before
    assert Bank.open(bank_path).manifest.generation == 1
    assert commit(bank_path, manifest).generation == 2


def test_a_reader_never_sees_half_a_generation_s11(bank_path: Path) -> None:
    seen, failures = set(), []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(Bank.open(bank_path).manifest.generation)
            except BankError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(12):
            commit(bank_path, replace(with_new_expert(bank_path), created={"number": number}))
            if number % 3 == 0:
                collect_garbage(bank_path)
    finally:
        done.set()
        reader.join()
    assert not failures
    assert len(seen) > 1


def test_a_generation_that_is_pruned_while_it_is_opened_gives_way_to_the_next_s11(bank_path, monkeypatch) -> None:
    check = store.file_problems

    def prune_first(path: Path, manifest: Manifest, contents: bool) -> list[str]:
        monkeypatch.undo()
        commit(path, with_new_expert(path))
        collect_garbage(path)
        return check(path, manifest, contents)

    monkeypatch.setattr(store, "file_problems", prune_first)
    assert Bank.open(bank_path).manifest.generation == 2


def test_a_removed_expert_takes_its_row_and_its_documents_with_it(bank_path: Path) -> None:
    before = Bank.open(bank_path)
    remove(bank_path, ["boats"])
    bank = Bank.open(bank_path, verify=True)
    assert [(expert.id, expert.row) for expert in bank.manifest.experts] == [("birds", 0), ("tea", 1)]
    assert torch.equal(bank.centroids(), before.centroids()[[0, 2]])
    assert torch.equal(bank.means(), before.means()[[0, 2]])
    assert bank.documents()["id"].to_pylist() == [f"document-{i}" for i in (0, 2, 3, 4)]
    assert bank.embeddings().tolist() == before.embeddings()[[0, 2, 3, 4]].tolist()
    assert bank.texts(["document-3"]) == ["text of document-3"]
    with pytest.raises(UnknownNameError):
        bank.texts(["document-1"])
    assert verify(bank) == []
    assert verify(before) == []  # who has the old generation open keeps it
    collect_garbage(bank_path)
    names = " ".join(file.name for file in bank_path.rglob("*"))
    assert "boats" not in names
    assert b"text of document-1" not in b"".join(f.read_bytes() for f in bank_path.glob("texts-*"))
    assert verify(Bank.open(bank_path)) == []


def test_all_experts_can_be_removed_and_the_trunk_stays(bank_path: Path) -> None:
    remove(bank_path, ["boats", "tea", "birds"])
    bank = Bank.open(bank_path, verify=True)
    assert bank.centroids().shape == (0, 4)
    assert bank.trunk() is not None
    assert verify(bank) == []


def test_removing_an_unknown_expert_changes_nothing(bank_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'boats'"):
        remove(bank_path, ["tea", "boat"])
    assert read_current(bank_path).generation == 1


def test_removal_and_pruning_wait_for_no_build(bank_path: Path) -> None:
    with build_lock(bank_path):
        with pytest.raises(LockedError):
            remove(bank_path, ["tea"])
        with pytest.raises(LockedError):
            collect_garbage(bank_path)


def test_pruning_takes_old_generations_and_leaves_what_is_current_or_not_ours(bank_path: Path) -> None:
    old = Bank.open(bank_path).manifest
    commit(bank_path, with_new_expert(bank_path))
    unfinished = write_adapter(bank_path, "experts/bees", random_adapter(50), "tiny", False).folder
    for name in ("README.md", "work/state.json", ".tmp-dead", "experts/.tmp-dead", "experts/mine/x"):
        (bank_path / name).parent.mkdir(exist_ok=True)
        (bank_path / name).write_text("")
    removed = collect_garbage(bank_path)
    assert sorted(removed) == [
        ".tmp-dead",
        "experts/.tmp-dead",
        old.experts[2].adapter.folder,
        "manifest-000001.json",
    ]
    assert verify(Bank.open(bank_path)) == []
    assert collect_garbage(bank_path) == []
    assert sorted(collect_garbage(bank_path, unfinished=True)) == [unfinished, "work"]
    assert (bank_path / "README.md").exists()
    assert (bank_path / "experts/mine/x").exists()
    assert verify(Bank.open(bank_path)) == []


def test_pruning_that_was_killed_is_finished_by_the_next(make_bank, monkeypatch) -> None:
    for step in range(2, 100):
        path = make_bank(f"bank-{step}")
        remove(path, ["boats"])
        with killed_before_step(monkeypatch, step):
            try:
                collect_garbage(path)
                break
            except Killed:
                pass
        assert verify(Bank.open(path)) == []
        collect_garbage(path)
        assert verify(Bank.open(path)) == []
        assert {f.name for f in path.glob("*-*")} == {
            name for name in Bank.open(path).manifest.entries if "/" not in name
        } | {"manifest-000002.json"}
        assert len(list((path / "experts").iterdir())) == 2
    assert step > 8


def test_a_full_generation_survives_pruning_while_a_damaged_one_lies_above_it(bank_path: Path) -> None:
    commit(bank_path, with_new_expert(bank_path))
    (bank_path / "manifest-000003.json").write_bytes(b"{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "manifest-000003.json" not in collect_garbage(bank_path)
        assert verify(Bank.open(bank_path)) == []
        assert read_current(bank_path).generation == 2
