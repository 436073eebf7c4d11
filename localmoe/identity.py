"""Identity: a base model known again by hashes of its architecture and weights, and where it was last seen."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from torch import Tensor, nn

from localmoe.errors import UsageError


@dataclass(frozen=True)
class Fingerprint:
    """Two hashes that identify a base: of its architecture, and of a sample of its weights."""

    architecture: str
    weights: str


def home() -> Path:
    """Folder for what can be made again (converted models): $LOCALMOE_HOME, or the user's cache folder."""
    chosen = os.environ.get("LOCALMOE_HOME")
    return Path(chosen) if chosen is not None else Path(platformdirs.user_cache_dir("localmoe"))


def fingerprint(model: Any) -> Fingerprint:
    """Hashes of the architecture (configuration and shapes) and of sampled weights (specification, "Identity").

    Raises UsageError for a base of which a part is offloaded: its weights are not there to be read.
    """
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise UsageError(
                f"{name} is offloaded: the base does not fit the devices, and experts cannot be applied to it there",
                "take a smaller base or more devices, or leave out --device-map to run it on one of them",
            )
        weights.update(name.encode())
        for part in _parts(parameter.detach()):
            flat = part.reshape(-1)
            # rounded as bf16 would be, so that a base is the same whichever dtype this machine computes in
            weights.update(flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().numpy().tobytes())
    return Fingerprint(architecture(model), weights.hexdigest())


def architecture(model: Any) -> str:
    """Hash of configuration and shapes, whatever the weights are and however they are stored."""
    config = model.config.to_dict()
    for key in (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
        "quantization_config",
    ):
        config.pop(key, None)
    shapes = {name: list(parameter.shape) for name, parameter in sorted(model.named_parameters())}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in shapes:  # a packed weight has another shape
            shapes[f"{name}.weight"] = [module.out_features, module.in_features]
    return hashlib.sha256(json.dumps([config, shapes], sort_keys=True, default=str).encode()).hexdigest()


def _parts(weight: Tensor) -> list[Tensor]:
    """The tensors in which a weight is stored: itself, or the numbers and scales of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def remember(name: str, mark: Fingerprint) -> None:
    """Note on this machine where a base was found, so that a bank (which holds no paths) finds it again.

    Warns where the note cannot be written: everything goes on without it.
    """
    where = str(Path(name).resolve()) if Path(name).is_dir() else name
    note = home() / "bases" / _key(mark)
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(where, encoding="utf-8")
        partial.replace(note)
    except OSError as error:
        warnings.warn(f"cannot note in {home()} where {name!r} is: {error.strerror}", stacklevel=2)


def recall(mark: Fingerprint) -> str | None:
    """Where `remember` last saw the base with this fingerprint, if it is still there."""
    note = home() / "bases" / _key(mark)
    if not note.is_file():
        return None
    where = note.read_text(encoding="utf-8")
    return where if not Path(where).is_absolute() or Path(where).is_dir() else None


def _key(mark: Fingerprint) -> str:
    return hashlib.sha256(f"{mark.architecture}{mark.weights}".encode()).hexdigest()[:32]
