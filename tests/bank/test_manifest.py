"""Manifests: what a digest depends on, which generation is read, and what is refused at the door."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from localmoe.bank.generations import commit
from localmoe.bank.manifest import Manifest, as_values, encode_json, generations, read_current, read_manifest
from localmoe.config import BuildConfig, as_dict
from localmoe.errors import BankError


def first(path: Path) -> Path:
    return path / "manifest-000001.json"


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_bytes())
    change(values)
    file.write_bytes(encode_json(values))


def test_a_manifest_comes_back_from_its_file_as_it_was(bank_path: Path) -> None:
    manifest = read_manifest(first(bank_path))
    assert first(bank_path).read_bytes() == encode_json(as_values(manifest))
    assert manifest.generation == 1
    assert [expert.row for expert in manifest.experts] == [0, 1, 2]


def test_the_digest_depends_on_content_not_on_time_or_generation(bank_path: Path) -> None:
    manifest = read_current(bank_path)
    assert replace(manifest, created={"host": "there"}, generation=7).digest == manifest.digest
    changed = [
        replace(manifest, config={"seed": 1}),
        replace(manifest, experts=manifest.experts[:2]),
        replace(manifest, router=replace(manifest.router, beta=0.06)),
        replace(manifest, base=replace(manifest.base, weights="other")),
        replace(manifest, versions={}),
    ]
    assert len({manifest.digest, *(other.digest for other in changed)}) == 6
    assert "digest" not in as_values(manifest)
    assert manifest == read_current(bank_path)


def test_the_highest_generation_is_read(bank_path: Path) -> None:
    for _ in range(11):
        commit(bank_path, read_current(bank_path))
    assert list(generations(bank_path)) == list(range(12, 0, -1))
    assert read_current(bank_path).generation == 12


@pytest.mark.parametrize("damage", [b"", b'{"format": 1', b"[]", b'{"format": 1}', b'{"format": "1"}', b"\xff"])
def test_a_damaged_manifest_is_passed_over_and_reported(bank_path: Path, damage: bytes) -> None:
    (bank_path / "manifest-000002.json").write_bytes(damage)
    with pytest.warns(UserWarning, match=r"manifest-000002.json.*using generation 1"):
        assert read_current(bank_path).generation == 1


def test_without_a_whole_manifest_there_is_no_bank(bank_path: Path, tmp_path: Path) -> None:
    first(bank_path).write_bytes(first(bank_path).read_bytes()[:-100])
    with pytest.raises(BankError, match=r"no manifest of .* is whole: .*manifest-000001.json") as caught:
        read_current(bank_path)
    assert caught.value.exit_code == 4
    with pytest.raises(BankError, match=r"no bank at .*nowhere"):
        read_current(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BankError, match="no finished bank"):
        read_current(tmp_path / "empty")


def test_a_bank_of_a_newer_format_is_refused_and_never_passed_over_s43(bank_path: Path) -> None:
    newer = bank_path / "manifest-000002.json"
    newer.write_bytes(encode_json({"format": 3, "whatever": {}}))
    with pytest.raises(BankError, match="bank format 3, this LocalMoE reads up to 1: upgrade"):
        read_current(bank_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("format"), "format"),
        (lambda m: m.update(format=0), "format"),
        (lambda m: m["experts"][1].update(row=0), "order of their rows"),
        (lambda m: m["experts"].reverse(), "order of their rows"),
        (lambda m: m["experts"][1].update(id="birds"), "same id"),
        (lambda m: m["experts"][1].update(id="../birds"), "id"),
        (lambda m: m["experts"][1].update(adapter=None), "adapter is missing"),
        (lambda m: m["experts"][1]["adapter"].update(folder="../boats-0123456789ab"), "folder"),
        (lambda m: m["experts"][1]["adapter"].update(folder="/etc/boats-0123456789ab"), "folder"),
        (lambda m: m["experts"][1]["adapter"].update(folder="experts/a/../b-0123456789ab"), "folder"),
        (lambda m: m["experts"][1]["adapter"].update(folder="experts/tea-0123456789ab"), "cannot lie in"),
        (lambda m: m["experts"][1]["adapter"]["weights"].update(sha256="0" * 64), "cannot lie in"),
        (lambda m: m["trunk"].update(folder="experts/trunk-0123456789ab"), "cannot lie in"),
        (lambda m: m.update(trunk=None), "trunk"),
        (lambda m: m["files"].pop("centroids"), "centroids"),
        (lambda m: m["files"].update(passwords=m["files"]["texts"]), "files"),
        (lambda m: m["files"]["texts"].update(sha256="../../x"), "sha256"),
        (lambda m: m["base"].update(id="/home/me/model"), "not a path"),
        (lambda m: m["base"].update(id="C:\\model"), "not a path"),
        (lambda m: m["encoder"].update(id="../model"), "not a path"),
        (lambda m: m["encoder"].update(dim=0), "dim"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(bank_path: Path, change, words: str) -> None:
    rewrite(first(bank_path), change)
    with pytest.raises(BankError, match=words):
        read_current(bank_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(bank_path: Path, number: str) -> None:
    text = first(bank_path).read_text().replace('"beta": 0.05', f'"beta": {number}')
    first(bank_path).write_text(text)
    with pytest.raises(BankError, match=r"manifest-000001.json"):
        read_current(bank_path)


def test_a_manifest_under_the_name_of_another_generation_is_passed_over(bank_path: Path) -> None:
    (bank_path / "manifest-000009.json").write_bytes(first(bank_path).read_bytes())
    with pytest.warns(UserWarning, match="holds generation 1"):
        assert read_current(bank_path).generation == 1


def test_records_cannot_be_changed_or_made_wrong(bank_path: Path) -> None:
    manifest = read_current(bank_path)
    with pytest.raises(AttributeError):
        manifest.recipe = "paper"
    with pytest.raises(ValidationError):
        replace(manifest, recipe="soup")


def test_every_file_of_a_generation_is_named_once_without_a_path(bank_path: Path) -> None:
    manifest: Manifest = read_current(bank_path)
    on_disk = {f.relative_to(bank_path).as_posix() for f in bank_path.rglob("*") if f.is_file()}
    assert set(manifest.named_files()) == on_disk - {"manifest-000001.json"}
    assert str(bank_path) not in first(bank_path).read_text()
    assert manifest.entries == {name.rsplit("/adapter_", 1)[0] for name in manifest.named_files()}


def test_settings_of_another_version_are_said_to_be_that(bank_path: Path) -> None:
    manifest = read_current(bank_path)
    assert replace(manifest, config=as_dict(BuildConfig(seed=3))).settings() == BuildConfig(seed=3)
    with pytest.raises(BankError, match=r"unknown key 'train.threads'") as error:
        replace(manifest, config={"train": {"threads": 1}}).settings()
    assert "another version" in error.value.remedy and "build it again" in error.value.remedy
