"""The work folder: what is written is read back, whole or not at all."""

import errno
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch

from localmoe.bank import files
from localmoe.packing import Passage
from localmoe.train.documents import Document, Message
from localmoe.train.work import Work, collect

DOCUMENTS = [
    Document("a" * 16, "one.txt", "text Ω"),
    Document("b" * 16, "chat.jsonl:2", "", (Message("user", "hi"), Message("assistant", "ho")), ("staff",), ("t", "u")),
    Document("c" * 16, "two.txt", "more", (), (), ("t",)),
]


def _collected(bank: Path, documents: list[Document]) -> Work:
    file, _, count = collect(bank, documents)
    assert count == len(documents)
    work = Work(bank, "key")
    work.adopt("documents.parquet", file)
    return work


@pytest.mark.parametrize("rows", [1, 2, 3, 1024])
def test_documents_come_back_as_they_were_in_batches_that_are_never_empty(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROWS", rows)
    batches = list(_collected(tmp_path, DOCUMENTS).documents())
    assert [document for batch in batches for document in batch] == DOCUMENTS
    assert all(0 < len(batch) <= rows for batch in batches)


def test_long_documents_are_read_in_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHARACTERS", 20)
    assert len(list(_collected(tmp_path, DOCUMENTS).documents())) > 1


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_the_documents_asked_for_come_with_their_rows(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROWS", rows)
    work = _collected(tmp_path, DOCUMENTS)
    assert list(work.chosen([2, 0])) == [(0, DOCUMENTS[0]), (2, DOCUMENTS[2])]
    assert list(work.chosen([])) == []


def test_the_digest_knows_content_order_access_and_tags(tmp_path: Path) -> None:
    def digest(documents: list[Document]) -> str:
        return collect(tmp_path, documents)[1]

    first, chat, last = DOCUMENTS
    moved = Document(first.id, "elsewhere.txt", first.text)
    assert digest([first, chat]) == digest([moved, chat])
    others = [[chat, first], [first], [first, last], [Document(first.id, "", first.text, access=("x",)), chat]]
    assert len({digest(documents) for documents in [[first, chat], *others]}) == 5


def test_a_reader_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield DOCUMENTS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(tmp_path, broken())
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("rows", [2, 1024])
def test_the_passages_asked_for_come_back_in_the_order_of_their_rows(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROWS", rows)
    written: list[tuple[Passage, ...]] = [tuple(tiny.passages(*range(2, 2 + n), seed=n)) for n in (1, 0, 3, 2, 1)]
    work = Work(tmp_path, "key")
    work.write_passages(written)
    found = work.passages([0, 1, 3, 4])
    assert [len(document) for document in found] == [1, 0, 2, 1]
    for mine, own in zip(found, (written[0], written[1], written[3], written[4]), strict=True):
        for passage, expected in zip(mine, own, strict=True):
            assert passage.tokens.dtype == torch.int64
            assert torch.equal(passage.tokens, expected.tokens)
            assert torch.equal(passage.labels, expected.labels)


def test_the_passages_of_long_documents_stand_in_smaller_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHARACTERS", 20)
    work = Work(tmp_path, "key")
    work.write_passages([tuple(tiny.passages(8, 8)), tuple(tiny.passages(8, 8)), tuple(tiny.passages(2))])
    with pyarrow.parquet.ParquetFile(work.path / "passages.parquet") as reader:
        assert [reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups)] == [1, 1, 1]


def test_json_and_arrays_come_back(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    work.write_json("experts/e0.json", {"loss": 0.1})
    work.write_array("x.npy", array)
    assert work.has("experts/e0.json") and not work.has("other.json")
    assert work.read_json("experts/e0.json") == {"loss": 0.1}
    np.testing.assert_array_equal(work.read_array("x.npy"), array)


def test_arrays_are_joined_to_the_bytes_that_numpy_saves(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    whole = np.arange(15, dtype=np.float32).reshape(5, 3)
    work.write_array("a.npy", whole[:2])
    work.write_array("b.npy", whole[2:])
    work.join_arrays("joined.npy", (5, 3), ["a.npy", "b.npy"])
    np.save(tmp_path / "numpy.npy", whole)
    assert (work.path / "joined.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_an_array_that_does_not_fit_on_the_disk_says_so_by_its_errno_and_leaves_no_part_s6(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on the size of files stands for the disk
    work = Work(tmp_path, "key")
    work.write_array("part.npy", np.zeros((512, 8), dtype=np.float32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    codes = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for write in (
            lambda: work.write_array("large.npy", np.zeros((1024, 8), dtype=np.float32)),
            lambda: work.join_arrays("joined.npy", (1024, 8), ["part.npy", "part.npy"]),
        ):
            with pytest.raises(OSError) as raised:
                write()
            codes.append(raised.value.errno)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert codes == [errno.EFBIG, errno.EFBIG]
    assert [entry.name for entry in work.path.iterdir()] == ["part.npy"]


def test_what_cannot_be_written_leaves_neither_file_nor_part(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    with pytest.raises(TypeError):
        work.write_json("bad.json", {"x": object()})
    assert not list(work.path.iterdir())


def test_discard_removes_this_and_abandoned_builds_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "manifest-000001.json").write_text("{}")
    for key in ("old", "new"):
        Work(tmp_path, key).write_json("x.json", 1)
    Work(tmp_path, "new").discard()
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest-000001.json"]
