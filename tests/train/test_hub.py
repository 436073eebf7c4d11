"""Datasets of the hub, without the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError, TemporaryError
from localmoe.train.corpus import ReportBuilder, read_corpus

datasets = pytest.importorskip("datasets")


def stream(rows: list[dict[str, object]]) -> object:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(answer)` makes load_dataset return the answer, or raise it, and returns the list of calls."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def set_answer(answer: object) -> list[tuple[object, ...]]:
        def load_dataset(path, name=None, split=None, streaming=False):
            calls.append((path, name, split, streaming))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return set_answer


def read(source: str, **config: object) -> list[tuple[str, str]]:
    found = read_corpus(source, CorpusConfig(**config), ReportBuilder())  # type: ignore[arg-type]
    return [(document.source, document.text) for document in found]


def test_a_dataset_is_streamed_and_its_rows_numbered(hub):
    calls = hub(stream([{"text": "a"}, {"text": "b"}]))
    assert read("owner/name:train") == [("owner/name:train:1", "a"), ("owner/name:train:2", "b")]
    assert calls == [("owner/name", None, "train", True)]


def test_a_configuration_may_stand_before_the_split(hub):
    calls = hub(stream([{"text": "a"}]))
    read("wikitext:wikitext-2-raw-v1:test")
    assert calls == [("wikitext", "wikitext-2-raw-v1", "test", True)]


def test_only_the_wanted_columns_of_a_dataset_are_read(hub):
    class Columns:
        column_names = ("body", "image", "who")

        def select_columns(self, names):
            assert names == ["body", "who"]
            return [{"body": "a", "who": None}]

    hub(Columns())
    assert read("name:train", text_field="body", access_field="who") == [("name:train:1", "a")]


def test_a_single_split_need_not_be_named_and_one_of_several_must_be(hub):
    hub({"all": stream([{"text": "a"}])})
    assert read("name") == [("name:1", "a")]
    hub({"train": stream([]), "test": stream([])})
    with pytest.raises(CorpusError, match="train, test") as error:
        read("name")
    assert error.value.remedy == "name one: name:train"


def test_a_dataset_without_text_lists_its_fields(hub):
    class Columns:
        column_names = ("question", "answer")

    hub(Columns())
    with pytest.raises(CorpusError, match="'question', 'answer'") as error:
        read("name:train")
    assert "corpus.text_field=question" in error.value.remedy


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionError("Couldn't reach 'name' on the Hub"), TemporaryError),
        (TimeoutError("slow"), TemporaryError),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'name' doesn't exist on the Hub"), CorpusError),
        (ValueError("Bad split: x. Available splits: ['train']"), CorpusError),
        (RuntimeError("Dataset scripts are no longer supported"), CorpusError),
    ],
)
def test_trouble_of_the_network_is_temporary_and_of_the_dataset_is_not(hub, raised, expected):
    hub(raised)
    with pytest.raises(expected) as error:
        read("name:x")
    assert str(raised) in str(error.value)
    assert "no file or folder 'name:x'" in str(error.value)


def test_a_dataset_that_breaks_off_is_a_temporary_error(hub):
    class Broken:
        column_names = None

        def __iter__(self) -> Iterator[dict[str, object]]:
            yield {"text": "a"}
            raise ConnectionError("Server Disconnected")

    hub(Broken())
    with pytest.raises(TemporaryError, match="broke off after 1 records"):
        read("name:train")


def test_without_the_package_the_pip_line_is_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError) as error:
        read("owner/name")
    assert "pip install 'localmoe[datasets]'" in error.value.remedy


@pytest.mark.parametrize(
    "source", ["./name", "/name", "../name", "a/b/c", "name/", "name.jsonl", "name.txt.gz", "name.gz", "a b"]
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(hub, source):
    calls = hub(stream([{"text": "a"}]))
    with pytest.raises(CorpusError, match="no file or folder"):
        read(source)
    assert calls == []
