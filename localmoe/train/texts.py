"""Texts: the bytes of a file decoded piece by piece, and pieces put together to documents of bounded size."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from localmoe.train.documents import MAX_DOCUMENT_BYTES, NotRead

PIECE_BYTES = 2**20
"""How much of a stream is read at once."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and what they say; UTF-32 first, for its mark begins with that of UTF-16."""


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes declare by their mark; UTF-8 if there is none."""
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")


def decoded(stream: BinaryIO) -> Iterator[str]:
    """The text of a stream in pieces; raises NotRead where it is binary (holds NUL) or undecodable."""
    piece = stream.read(PIECE_BYTES)
    encoding = encoding_of(piece)
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    while True:
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            if encoding == "utf-8" and b"\0" in piece:
                raise NotRead("binary") from error
            raise NotRead("undecodable", f"not {encoding} near byte {offset + error.start}") from error
        if "\0" in text:
            raise NotRead("binary")
        yield text
        if not piece:
            return
        offset += len(piece)
        piece = stream.read(PIECE_BYTES)


def parts(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(mark, text) of every part of a text: one part ("", text), or ("#1", …), ("#2", …) if it is long.

    Parts joined are the text again; none is longer than MAX_DOCUMENT_BYTES characters. They end after a line
    end, else after white space, else (none in the second half of a part) anywhere.
    """
    held = ""
    number = 0
    for piece in pieces:
        held += piece
        while len(held) > MAX_DOCUMENT_BYTES:
            number += 1
            end = _end_of_part(held)
            yield f"#{number}", held[:end]
            held = held[end:]
    yield f"#{number + 1}" if number else "", held


def _end_of_part(text: str) -> int:
    for ends in ("\n", " \t\r\u3000"):
        last = max(text.rfind(end, MAX_DOCUMENT_BYTES // 2, MAX_DOCUMENT_BYTES) for end in ends)
        if last >= 0:
            return last + 1
    return MAX_DOCUMENT_BYTES
