"""Rows: splits, samples and counts of documents."""

from pathlib import Path

import pytest
import tiny

from localmoe.config import BuildConfig, CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.documents import Document, content_id, split_of
from localmoe.train.rows import Rows, read_rows
from localmoe.train.work import Work, collect

TOKENIZER = tiny.tokenizer()


def _rows(folder: Path, texts: list[str], corpus: CorpusConfig, seed: int = 0) -> Rows:
    file, _, _ = collect(folder, [Document(content_id(text), f"{i}.txt", text) for i, text in enumerate(texts)])
    work = Work(folder, "key")
    work.adopt("documents.parquet", file)
    return read_rows(work, TOKENIZER, BuildConfig(corpus=corpus, seed=seed), lambda done: None)


TEXTS = [tiny.sentence(topic, number) for topic in tiny.TOPICS for number in range(10)]


def test_splits_are_those_of_the_ids_and_counts_add_up(tmp_path: Path) -> None:
    corpus = CorpusConfig(tune_fraction=0.3, test_fraction=0.2, passage_tokens=16)
    rows = _rows(tmp_path, TEXTS, corpus, seed=3)
    assert rows.split == [split_of(content_id(text), 3, corpus) for text in TEXTS]
    assert set(rows.split) == {"train", "tune", "test"}
    counts = rows.counts()
    assert sum(counts["split_documents"].values()) == len(TEXTS)
    every = sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS)
    assert sum(counts["split_tokens"].values()) + counts["unused_tokens"] == every
    assert rows.where("train") == [row for row, name in enumerate(rows.split) if name == "train"]
    assert rows.train.tolist() == [name == "train" for name in rows.split]


def test_a_sample_holds_at_most_its_tokens_and_a_larger_one_holds_the_smaller(tmp_path: Path) -> None:
    chosen = []
    for number, most in enumerate((150, 600, 10**6)):
        rows = _rows(tmp_path / str(number), TEXTS, CorpusConfig(sample_tokens=most, test_fraction=0, tune_fraction=0))
        picked = rows.where("train")
        assert rows.tokens[picked].sum() <= most
        chosen.append(set(picked))
    assert chosen[0] < chosen[1] < chosen[2] == set(range(len(TEXTS)))


def test_a_sample_too_small_for_one_document_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="left to train on") as caught:
        _rows(tmp_path, TEXTS, CorpusConfig(sample_tokens=1))
    assert "sample_tokens" in caught.value.remedy


def test_documents_without_a_token_to_predict_are_unused(tmp_path: Path) -> None:
    rows = _rows(tmp_path, ["a", *TEXTS], CorpusConfig())
    assert rows.split[0] == "unused"
    assert (rows.tokens[0], rows.unused[0]) == (0, 1)


def test_one_document_is_trained_on_whatever_its_split(tmp_path: Path) -> None:
    corpus = CorpusConfig(tune_fraction=0.4, test_fraction=0.4)
    text = next(text for text in TEXTS if split_of(content_id(text), 0, corpus) != "train")
    assert _rows(tmp_path, [text], corpus).split == ["train"]


def test_documents_are_tokenized_once(tmp_path: Path) -> None:
    first = _rows(tmp_path, TEXTS, CorpusConfig())
    work = Work(tmp_path, "key")
    again = read_rows(work, None, BuildConfig(), lambda done: None)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.split == first.split
