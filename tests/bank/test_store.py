"""Bank: what is read from an opened bank, and how damage, moves and strangers' files show."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny_bank import IDS, random_adapter, write_bank

from localmoe.bank import files
from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_tensors
from localmoe.bank.generations import commit
from localmoe.bank.manifest import Outcome, read_current
from localmoe.bank.store import DOCUMENT_COLUMNS, Bank, verify
from localmoe.errors import BankError, UnknownNameError, UsageError
from localmoe.lora import stack


def weights_of(path: Path, name: str) -> Path:
    return next((path / "experts").glob(f"{name}-*")) / "adapter_model.safetensors"


def test_a_bank_gives_back_what_was_written(bank_path: Path) -> None:
    bank = Bank.open(bank_path, verify=True)
    for row, name in enumerate(IDS):
        for module, update in random_adapter(row).items():
            read = bank.adapter(name)[module]
            assert torch.equal(read.A, update.A)
            assert torch.equal(read.B, update.B)
            assert torch.equal(read.c, update.c)
    trunk = bank.trunk()
    assert trunk is not None
    assert torch.equal(trunk["layers.0.up_proj"].B, random_adapter(100)["layers.0.up_proj"].B)
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(bank.means(), means)
    torch.testing.assert_close(bank.centroids(), means / means.norm(dim=1, keepdim=True))
    assert bank.embeddings().dtype == np.float16
    assert np.array_equal(bank.embeddings(), np.arange(24).reshape(6, 4))
    assert bank.clusters() == {"tree": [[0, 1], 2], "curve": [1.0, 0.5]}
    assert set(bank.documents().column_names) == set(DOCUMENT_COLUMNS)
    assert bank.documents()["tokens"].to_pylist() == [30, 40, 50, 20, 20, 50]
    assert verify(bank) == []


def test_texts_come_in_the_order_asked_for(bank_path: Path) -> None:
    bank = Bank.open(bank_path)
    asked = ["document-4", "document-0", "document-4"]
    assert bank.texts(asked) == [f"text of {name}" for name in asked]
    assert bank.texts([]) == []
    with pytest.raises(UnknownNameError, match="document-9"):
        bank.texts(["document-0", "document-9"])


def test_of_a_large_file_of_texts_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_ROWS", 2)
    manifest = write_bank(tmp_path)
    written = [(f"id-{n}", f"text {n}", [("user", f"text {n}")] if n == 2 else []) for n in range(7)]
    record = files.write_texts(tmp_path, iter(written))
    commit(tmp_path, replace(manifest, files=manifest.files | {"texts": record}))
    bank, groups = Bank.open(tmp_path), []
    read = pyarrow.parquet.ParquetFile.read_row_group

    def watched(self, group: int, columns: list[str]):
        groups.extend([group] if "text" in columns else [])
        return read(self, group, columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", watched)
    assert bank.texts(["id-6", "id-2", "id-3"]) == ["text 6", "text 2", "text 3"]
    assert groups == [1, 3]
    assert bank.contents(["id-2", "id-3"]) == [("text 2", [("user", "text 2")]), ("text 3", [])]
    assert list(bank.all_texts()) == written


def test_a_bank_without_texts_says_so(make_bank: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="keeps no texts"):
        Bank.open(make_bank(texts=False)).texts(["document-0"])


def test_routing_may_use_good_and_unchecked_experts_alone(bank_path: Path) -> None:
    assert [expert.id for expert in Bank.open(bank_path).routable()] == ["birds", "tea"]


def test_an_unknown_expert_gets_the_nearest_ids(bank_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown expert 'bird', did you mean 'birds'\?") as caught:
        Bank.open(bank_path).adapter("bird")
    assert "birds" in caught.value.remedy


def test_an_expert_that_failed_has_no_adapter_and_says_why(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path)
    failed = Outcome(status="failed", documents=0, nll=None, reference_nll=None, reason="loss is NaN")
    experts = (*manifest.experts[:2], replace(manifest.experts[2], outcome=failed, adapter=None))
    commit(tmp_path, replace(manifest, experts=experts))
    bank = Bank.open(tmp_path, verify=True)
    assert [expert.id for expert in bank.routable()] == ["birds"]
    with pytest.raises(UsageError, match="loss is NaN"):
        bank.adapter("tea")
    assert verify(bank) == []


def test_experts_of_a_shared_trunk_share_its_tensors_and_merge_at_its_rank(make_bank) -> None:
    bank = Bank.open(make_bank(shared=True))
    trunk, adapters = bank.trunk(), [bank.adapter(name) for name in IDS]
    for module in trunk:
        updates = [adapter[module].scaled(0.3) for adapter in adapters]
        assert all(update.A is trunk[module].A for update in updates)
        assert stack(updates).rank == 2
        expected = sum(update.delta().double() for update in updates)
        torch.testing.assert_close(stack(updates).delta().double(), expected, atol=1e-5, rtol=1e-5)


def test_threads_that_open_experts_at_once_get_one_trunk(make_bank) -> None:
    bank = Bank.open(make_bank(shared=True))
    barrier, found = threading.Barrier(8), []

    def read(name: str) -> None:
        barrier.wait()
        found.append(bank.adapter(name)["layers.0.up_proj"].A)

    threads = [threading.Thread(target=read, args=(IDS[i % 3],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(A) for A in found}) == 1


def test_an_expert_with_an_a_of_its_own_is_refused_under_a_shared_trunk(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path, shared=True)
    trained = manifest.experts[2].adapter.training if manifest.experts[2].adapter else None
    stranger = write_adapter(tmp_path, "experts/tea", random_adapter(5), "tiny", False, trained)
    experts = (*manifest.experts[:2], replace(manifest.experts[2], adapter=stranger))
    commit(tmp_path, replace(manifest, experts=experts))
    bank = Bank.open(tmp_path)
    assert bank.adapter("birds")
    with pytest.raises(BankError, match=r"experts/tea-.* the A of layers.0.*is not the trunk's"):
        bank.adapter("tea")
    assert any("not the trunk's" in problem for problem in verify(bank))


def test_an_imported_expert_keeps_its_own_a_under_a_shared_trunk(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path, shared=True)
    imported = write_adapter(tmp_path, "experts/tea", random_adapter(5), "tiny", False)
    commit(tmp_path, replace(manifest, experts=(*manifest.experts[:2], replace(manifest.experts[2], adapter=imported))))
    bank = Bank.open(tmp_path)
    trunk = bank.trunk()
    assert trunk is not None
    assert all(not torch.equal(update.A, trunk[name].A) for name, update in bank.adapter("tea").items())
    assert all(update.A is trunk[name].A for name, update in bank.adapter("birds").items())
    assert verify(bank) == []


@pytest.mark.parametrize("tenth", range(10))
def test_an_expert_cut_at_any_tenth_is_refused_with_both_sizes_s12(bank_path: Path, tenth: int) -> None:
    file = weights_of(bank_path, "boats")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * tenth // 10])
    with pytest.raises(BankError) as caught:
        Bank.open(bank_path)
    assert file.relative_to(bank_path).as_posix() in caught.value.what
    assert f"({len(whole) * tenth // 10:,} bytes)" in caught.value.what
    assert f"({len(whole):,} bytes)" in caught.value.what


def test_a_flipped_bit_in_any_file_is_found_by_verify_s13(bank_path: Path) -> None:
    bank = Bank.open(bank_path)
    names = bank.manifest.named_files()
    for name in names:
        file = bank_path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        good = file.read_bytes()
        file.write_bytes(data)
        assert any(problem.startswith(f"{name} was changed") for problem in verify(bank))
        with pytest.raises(BankError, match="sha256"):
            Bank.open(bank_path, verify=True)
        file.write_bytes(good)
    assert verify(bank) == []


def test_verify_goes_on_past_whatever_file_is_missing_or_empty(bank_path: Path) -> None:
    bank = Bank.open(bank_path)
    for name in bank.manifest.named_files():
        file = bank_path / name
        good = file.read_bytes()
        file.write_bytes(b"")
        assert verify(Bank(bank_path, bank.manifest))[0].startswith(f"{name} is 0.0 MB (0 bytes), the manifest says")
        file.unlink()
        assert verify(Bank(bank_path, bank.manifest))[0] == f"{name} is missing"
        file.write_bytes(good)
    assert verify(Bank(bank_path, bank.manifest)) == []


def test_missing_files_are_named(bank_path: Path) -> None:
    weights_of(bank_path, "boats").unlink()
    with pytest.raises(BankError, match=r"experts/boats-\w+/adapter_model.safetensors is missing"):
        Bank.open(bank_path)


def test_an_expert_that_vanishes_after_opening_is_named(bank_path: Path) -> None:
    bank = Bank.open(bank_path)
    shutil.rmtree(weights_of(bank_path, "boats").parent)
    with pytest.raises(BankError, match=r"experts.boats-\w+"):
        bank.adapter("boats")
    assert bank.adapter("birds")


def test_a_git_lfs_pointer_is_recognised_s14(bank_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    weights_of(bank_path, "boats").write_text(pointer)
    with pytest.raises(BankError, match=r"Git-LFS pointer.*\n.*git lfs pull"):
        Bank.open(bank_path)


def test_links_out_of_the_bank_are_refused(bank_path: Path, tmp_path: Path) -> None:
    file = weights_of(bank_path, "boats")
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BankError, match="not a plain file"):
        Bank.open(bank_path)
    file.unlink()
    shutil.move(tmp_path / "elsewhere", file)
    shutil.move(file.parent, tmp_path / "folder")
    file.parent.symlink_to(tmp_path / "folder")
    with pytest.raises(BankError, match=r"experts/boats-\w+ is a link"):
        Bank.open(bank_path)


def test_a_bank_that_was_moved_and_copied_opens_s42(bank_path: Path, tmp_path: Path) -> None:
    digest = Bank.open(bank_path).manifest.digest
    shutil.copytree(bank_path, tmp_path / "copy")
    bank_path.rename(tmp_path / "moved")
    for name in ("copy", "moved"):
        bank = Bank.open(tmp_path / name, verify=True)
        assert bank.manifest.digest == digest
        assert bank.adapter("tea")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert Bank.open(tmp_path / "link").adapter("tea")


def test_centroids_of_another_shape_or_value_are_found(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path)
    good = {"centroids": torch.eye(4)[:3], "means": torch.ones(3, 4)}
    cases = {
        "2 centroids for 3 experts": good | {"centroids": torch.eye(4)[:2]},
        "not a unit vector": good | {"centroids": torch.ones(3, 4)},
        r"means is nothing": {"centroids": good["centroids"]},
        r"\[3, 5\]": good | {"means": torch.ones(3, 5)},
        "float64": good | {"centroids": torch.eye(4)[:3].double()},
    }
    for words, tensors in cases.items():
        files = manifest.files | {"centroids": write_tensors(tmp_path, "centroids", tensors)}
        commit(tmp_path, replace(manifest, files=files))
        problems = verify(Bank.open(tmp_path))
        assert len(problems) == 1
        with pytest.raises(AssertionError, match=words):
            assert not problems


def test_embeddings_and_documents_must_be_as_many(tmp_path: Path) -> None:
    manifest = write_bank(tmp_path)
    embeddings = write_tensors(tmp_path, "embeddings", {"embeddings": torch.zeros(5, 4).half()})
    commit(tmp_path, replace(manifest, files=manifest.files | {"embeddings": embeddings}))
    assert verify(Bank.open(tmp_path)) == [f"{tmp_path}: 6 documents, but 5 embeddings"]


def test_a_parquet_file_that_is_none_is_named(bank_path: Path) -> None:
    bank = Bank.open(bank_path)
    file = next(bank_path.glob("documents-*"))
    file.write_bytes(b"PAR1" * 100)
    with pytest.raises(BankError, match=r"documents-\w+.parquet is not a whole parquet file"):
        bank.documents()


def test_opening_reads_no_tensor_and_imports_neither_peft_nor_transformers(bank_path: Path) -> None:
    code = (
        "import sys, pathlib, safetensors.torch\n"
        "from localmoe.bank.store import Bank\n"
        "safetensors.torch.load_file = None\n"
        "bank = Bank.open(pathlib.Path(sys.argv[1]))\n"
        "print(len(bank.routable()), [m for m in ('peft', 'transformers', 'pyarrow') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bank_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "2 []"


def test_nothing_that_opening_and_reading_does_changes_the_folder(bank_path: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in bank_path.rglob("*")}

    before = state()
    bank = Bank.open(bank_path, verify=True)
    verify(bank)
    bank.texts(["document-1"])
    assert state() == before
    assert json.loads((bank_path / "manifest-000001.json").read_text())["generation"] == 1
    assert read_current(bank_path) == bank.manifest
