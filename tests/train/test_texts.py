"""Texts: decoding by pieces, and the cut of long texts."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.train import texts
from localmoe.train.documents import NotRead


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("piece", [4, 5, 7, 1000])
def test_a_text_is_the_same_in_every_marked_encoding_and_however_it_is_read(monkeypatch, encoding, piece):
    text = "grün — 漢字 🎈\r\n" * 5
    monkeypatch.setattr(texts, "PIECE_BYTES", piece)
    assert "".join(texts.decoded(io.BytesIO(text.encode(encoding)))) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc\0def", "binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
        ("a\0b".encode("utf-16"), "binary"),
        ("grün".encode("latin-1"), "undecodable"),
        ("ab 漢".encode()[:-1], "undecodable"),
        (b"\xff\xfea", "undecodable"),
    ],
)
def test_s29_binary_and_undecodable_bytes_are_told_apart(data, reason):
    with pytest.raises(NotRead) as skip:
        list(texts.decoded(io.BytesIO(data)))
    assert skip.value.reason == reason


def test_the_place_of_an_undecodable_byte_is_told(monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 4)
    with pytest.raises(NotRead, match="near byte 10"):
        list(texts.decoded(io.BytesIO(b"abcdefghij\xff")))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=6))
def test_the_parts_of_a_text_are_bounded_and_joined_give_it_back(pieces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "MAX_DOCUMENT_BYTES", 8)
        found = list(texts.parts(pieces))
    whole = "".join(pieces)
    assert "".join(text for _, text in found) == whole
    assert all(len(text) <= 8 for _, text in found)
    marks = [""] if len(whole) <= 8 else [f"#{number + 1}" for number in range(len(found))]
    assert [mark for mark, _ in found] == marks


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two\nthree four", "one two\n"),
        ("one two three", "one two "),
        ("onetwothreefour", "onetwothre"),
        ("a\nonetwothreefour", "a\nonetwoth"),
    ],
)
def test_a_part_ends_at_a_line_else_at_white_space_else_anywhere(monkeypatch, text, first):
    monkeypatch.setattr(texts, "MAX_DOCUMENT_BYTES", 10)
    assert next(iter(texts.parts([text]))) == ("#1", first)
