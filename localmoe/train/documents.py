"""Documents: what a record must hold to be one, its content id, and the split it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from localmoe.config import CorpusConfig
from localmoe.errors import ConfigError, CorpusError
from localmoe.train.corpus_report import Reason

MAX_DOCUMENT_BYTES = 8 * 2**20
"""Bound of one document: a text file longer than this many characters is cut, a longer record is not read."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class NotRead(Exception):  # noqa: N818 - an outcome that the report counts, not an error that a user sees
    """Why a file or a record gives no document; `read_corpus` counts it and reads on."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Record:
    """What a reader found; a plain text is the record whose only field is `corpus.text_field`.

    `file` is what patterns match: the path in the folder, the file's name, or the dataset id;
    `source` is `file`, with "#2" for the second part of a long text or ":123" for line or row 123.
    """

    file: str
    source: str
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One document: plain text, or a conversation (then `text` is "").

    `id` is the content id; `source` is relative, never an absolute path; `access` is the sorted set of names
    who may use it, () = public; `tags` are sorted too.
    """

    id: str
    source: str
    text: str
    messages: tuple[Message, ...] = ()
    access: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def query(self) -> str:
        """What is embedded: the text, or the last user message, then the earlier ones, the latest first."""
        if not self.messages:
            return self.text
        turns = [message.content for message in self.messages if message.role == "user"]
        return "\n\n".join(turn for turn in reversed(turns) if turn.strip())

    @property
    def content(self) -> str:
        """All of it, readable: the text, or "role: content" of every message."""
        if not self.messages:
            return self.text
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


def content_id(text: str, messages: tuple[Message, ...] = ()) -> str:
    """16 hex digits of BLAKE2b over the kind and the content; not over source, access or tags."""
    if messages:
        turns = [[message.role, message.content] for message in messages]
        return _digest("chat", json.dumps(turns, ensure_ascii=False))
    return _digest("text", text)


def split_of(document_id: str, seed: int, config: CorpusConfig) -> Literal["train", "tune", "test"]:
    """The split of a document, from its id and the seed alone.

    u = BLAKE2b(seed, id) / 2⁶⁴ in [0, 1): test if u < test_fraction, tune if u < test_fraction +
    tune_fraction, else train. So equal contents never part, and no document moves when others come or go.
    Raises ConfigError if the fractions leave nothing to train on.
    """
    held_out = config.test_fraction + config.tune_fraction
    if held_out >= 1:
        raise ConfigError(
            f"corpus.test_fraction + corpus.tune_fraction = {held_out:g} leaves nothing to train on",
            "make them smaller, e.g. corpus.test_fraction=0.05 corpus.tune_fraction=0.05",
        )
    u = int(_digest("split", f"{seed}:{document_id}"), 16) / 2**64
    if u < config.test_fraction:
        return "test"
    return "tune" if u < held_out else "train"


def document_of(record: Record, config: CorpusConfig, access: tuple[str, ...], tags: tuple[str, ...]) -> Document:
    """The document in a record; `access` and `tags` come from its path and are joined with its own.

    The text field, `messages`, `prompt` + `completion` are looked for in this order. Joined access sets are
    stricter than either alone, for an expert asks for all of its names. Raises NotRead for a record that
    holds no document, CorpusError for an access field that is neither a name nor a list of names.
    """
    names = _access(record, config) | set(access)
    text, messages = _content(record.fields, config.text_field)
    labels = _names(record.fields, config.tags_field)
    if labels is None:
        raise NotRead("malformed", f"{config.tags_field!r} is neither a string nor a list of strings")
    content = [text, *(message.content for message in messages)]
    if sum(map(len, content)) > MAX_DOCUMENT_BYTES:
        raise NotRead("too_large", f"more than {MAX_DOCUMENT_BYTES} characters")
    if any("\0" in part for part in content):
        raise NotRead("binary", "a NUL character")
    try:
        identity = content_id(text, messages)
    except UnicodeEncodeError as error:
        raise NotRead("undecodable", "half of a surrogate pair") from error
    return Document(identity, record.source, text, messages, tuple(sorted(names)), tuple(sorted(labels | set(tags))))


def _content(fields: Mapping[str, object], text_field: str) -> tuple[str, tuple[Message, ...]]:
    """The text or the messages, exactly one of them not empty."""
    if fields.get(text_field) is not None:
        text = _string(fields[text_field], text_field)
        if not text.strip():
            raise NotRead("empty")
        return text, ()
    if fields.get("messages") is not None:
        messages = _messages(fields["messages"])
    elif fields.get("prompt") is not None and fields.get("completion") is not None:
        prompt, completion = (_string(fields[name], name) for name in ("prompt", "completion"))
        messages = (Message("user", prompt), Message("assistant", completion))
    elif text_field in fields:
        raise NotRead("empty", f"{text_field!r} is null")
    else:
        raise NotRead("no_text")
    for role in ("user", "assistant"):
        if not any(message.role == role and message.content.strip() for message in messages):
            raise NotRead("empty", f"no text of the {role}")
    return "", messages


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise NotRead("malformed", f"'messages' holds a {type(value).__name__}, not a list")
    messages = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise NotRead("malformed", f"messages[{number}] is a {type(item).__name__}, not an object")
        role = item.get("role")
        if role not in ROLES:
            raise NotRead("malformed", f"messages[{number}].role is not one of {', '.join(ROLES)}")
        messages.append(Message(str(role), _string(item.get("content"), f"messages[{number}].content")))
    return tuple(messages)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise NotRead("malformed", f"{name!r} holds a {type(value).__name__}, not a string")
    return value


def _access(record: Record, config: CorpusConfig) -> set[str]:
    """The record's own access set; anything but names is an error, so that no typing slip makes it public."""
    names = _names(record.fields, config.access_field)
    if names is None or not all(name.strip() for name in names):
        raise CorpusError(
            f"{record.source}: the access field {config.access_field!r} holds neither a name nor a list of names",
            "write a name or a list of names there, or leave the field out for a public record",
        )
    return names


def _names(fields: Mapping[str, object], field: str | None) -> set[str] | None:
    """A string or a list of strings as a set, none of them for null and absent; None for anything else."""
    value = None if field is None else fields.get(field)
    if value is None:
        return set()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        return None
    return set(values)


def _digest(kind: str, content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8, person=kind.encode()).hexdigest()
