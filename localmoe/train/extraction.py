"""Extraction: plain text out of PDF, HTML and Jupyter notebooks (extra `documents`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from localmoe.train.documents import MAX_DOCUMENT_BYTES, NotRead
from localmoe.train.texts import encoding_of

DECLARED_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def extract(suffix: str, stream: BinaryIO) -> Iterator[str]:
    """The text in a file of the kind `suffix` (of EXTRACTORS), in pieces free of NUL and lone surrogates.

    Raises NotRead for a missing package, and for a file that is binary, undecodable, damaged or too large
    (HTML and notebooks are held whole).
    """
    try:
        for piece in EXTRACTORS[suffix](stream):
            yield piece.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")
    except (NotRead, OSError):
        raise
    except ImportError as error:
        raise NotRead("missing_package", str(error)) from error
    except Exception as error:  # parsers of foreign files: a damaged one can raise anything
        raise NotRead("unreadable", f"{type(error).__name__}: {error}") from error


def _pdf(stream: BinaryIO) -> Iterator[str]:
    import pypdf

    reader = pypdf.PdfReader(stream)
    if reader.is_encrypted and not reader.decrypt(""):
        raise NotRead("unreadable", "it asks for a password")
    for page in reader.pages:
        yield page.extract_text() + "\n\n"


def _html(stream: BinaryIO) -> Iterator[str]:
    """The main text of the page; all of its text where no main text is found."""
    import trafilatura

    page = _html_source(_whole(stream))
    text = trafilatura.extract(page, include_comments=False)
    yield text if text is not None else trafilatura.baseline(page)[1]


def _notebook(stream: BinaryIO) -> Iterator[str]:
    """The sources of all cells; outputs are left out."""
    import nbformat

    notebook = nbformat.reads(_text(_whole(stream), "utf-8"), as_version=4)
    for cell in notebook.cells:
        yield cell.source + "\n\n"


EXTRACTORS: Mapping[str, Callable[[BinaryIO], Iterator[str]]] = {
    ".pdf": _pdf,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".ipynb": _notebook,
}


def _whole(stream: BinaryIO) -> bytes:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise NotRead("too_large", f"more than {MAX_DOCUMENT_BYTES} bytes")
    return data


def _html_source(data: bytes) -> str:
    """Decoded by the byte order mark or as UTF-8, else by the charset that the page declares; not guessed."""
    try:
        return _text(data, encoding_of(data))
    except NotRead:
        declared = DECLARED_CHARSET.search(data[:2048])
        if declared is None:
            raise
        encoding = declared[1].decode()
        if _text(declared[0], encoding) != declared[0].decode():  # the declaration itself was ASCII
            raise
        return _text(data, encoding)


def _text(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except (LookupError, UnicodeError) as error:
        if encoding == "utf-8" and b"\0" in data:
            raise NotRead("binary") from error
        raise NotRead("undecodable", f"not {encoding}") from error
    if "\0" in text:
        raise NotRead("binary")
    return text
