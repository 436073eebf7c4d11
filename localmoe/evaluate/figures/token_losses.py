"""Token losses on disk: nll of every token of a document under one mix, so that sweeps share forwards and resume."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from localmoe.errors import UsageError

FILE = "token-losses.sqlite"


class TokenLosses:
    """Arrays of fp32 by a content key, kept one by one as they are made."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS losses (key TEXT PRIMARY KEY, nll BLOB) WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path} cannot be used: {error}", "remove it: its losses are computed again") from error

    def __contains__(self, key: str) -> bool:
        return self._file.execute("SELECT 1 FROM losses WHERE key = ?", (key,)).fetchone() is not None

    def __getitem__(self, key: str) -> np.ndarray:
        """[m] fp32; raises KeyError."""
        row = self._file.execute("SELECT nll FROM losses WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return np.frombuffer(row[0], dtype="<f4")

    def __setitem__(self, key: str, nll: np.ndarray) -> None:
        self._file.execute("INSERT OR REPLACE INTO losses VALUES (?, ?)", (key, nll.astype("<f4").tobytes()))

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
