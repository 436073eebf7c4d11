"""Fixtures: the tiny bank, committed into a folder of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bank import write_bank

from localmoe.bank.generations import commit


@pytest.fixture
def make_bank(tmp_path: Path) -> Callable[..., Path]:
    """Commits the tiny bank and returns its folder."""

    def make(name: str = "bank", shared: bool = False, texts: bool = True) -> Path:
        path = tmp_path / name
        commit(path, write_bank(path, shared, texts))
        return path

    return make


@pytest.fixture
def bank_path(make_bank: Callable[..., Path]) -> Path:
    return make_bank()
