"""Small corpora and what a build says, for tests of whole builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localmoe.config import BuildConfig
from localmoe.train.progress import Event

Make = Callable[..., BuildConfig]


def write_folder(path: Path, texts: list[str]) -> Path:
    path.mkdir(parents=True)
    for number, text in enumerate(texts):
        (path / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return path


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def notes_of(events: list[Event], stage: str) -> str:
    return "\n".join(event.note for event in events if event.stage == stage and event.note)
