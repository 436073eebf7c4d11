"""A configuration for tests of whole builds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
from building import Make

from localmoe.config import BuildConfig


@pytest.fixture
def config(tiny_base: Path, tiny_encoder: Path) -> Make:
    """A tiny configuration; keywords change `corpus`, `cluster` or `train` (mappings) or other fields."""

    def make(**changes: Any) -> BuildConfig:
        made = tiny.tiny_config(tiny_base, tiny_encoder)
        for name, value in changes.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(made, name), **value)
            made = dataclasses.replace(made, **{name: value})
        return made

    return make
