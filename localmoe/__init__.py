"""LocalMoE: a bank of small LoRA experts from your corpus, merged anew for every prompt.

The public names are resolved when first used, so that `import localmoe` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Answer": "localmoe.runtime.answers",
    "Bank": "localmoe.bank.store",
    "BuildConfig": "localmoe.config",
    "Engine": "localmoe.runtime.engine",
    "ExecutionConfig": "localmoe.config",
    "GenerateConfig": "localmoe.config",
    "LocalMoEError": "localmoe.errors",
    "LowRank": "localmoe.lora",
    "Mix": "localmoe.routing",
    "RouteConfig": "localmoe.config",
    "build": "localmoe.train.pipeline",
    "load_config": "localmoe.config",
    "open": "localmoe.runtime.engine",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), "open_engine" if name == "open" else name)


def __dir__() -> list[str]:
    return __all__
