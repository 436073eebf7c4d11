"""Adapters in a bank: written as immutable PEFT folders that carry their content's hash."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from localmoe.bank.files import encode_tensors, holds, record_of, sync_folder, temporary, write_durably
from localmoe.bank.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ID_PATTERN,
    AdapterRecord,
    FileRecord,
    Training,
    adapter_folder,
    adapter_hash,
    encode_json,
    portable,
)
from localmoe.bank.peft import to_peft
from localmoe.errors import UsageError
from localmoe.lora import Adapter

_NAME = re.compile(f"trunk|experts/{ID_PATTERN}")


def write_adapter(
    path: Path,
    name: str,
    adapter: Adapter,
    base: str,
    fan_in_fan_out: bool,
    training: Training | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AdapterRecord:
    """Writes an adapter into the bank at `path` as the PEFT folder `<name>-<hash>`, unless it is there.

    `name`: "trunk" or "experts/<id>"; `base`, `fan_in_fan_out`: as in `to_peft`; `training`: None = imported.
    Raises BankError for non-finite factors, TemporaryError if the disk is full, UsageError for a path as `base`.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} cannot name an adapter", "ids are a-z, 0-9, '.', '_', '-', at most 64 of them")
    try:
        portable(base)
    except ValueError as error:
        raise UsageError(f"base model: {error}", "a bank must mean the same on every machine") from error
    config, tensors = to_peft(adapter, base, fan_in_fan_out, dtype)
    contents = {ADAPTER_CONFIG: encode_json(config), ADAPTER_WEIGHTS: encode_tensors(tensors)}
    records = {file: record_of(data) for file, data in contents.items()}
    written = records[ADAPTER_CONFIG], records[ADAPTER_WEIGHTS]
    folder = adapter_folder(name, adapter_hash(*written))
    _place(path / folder, contents, records)
    return AdapterRecord(folder, *written, rank=config["r"], alpha=config["lora_alpha"], training=training)


def _place(target: Path, contents: Mapping[str, bytes], records: Mapping[str, FileRecord]) -> None:
    def is_whole() -> bool:
        return all(holds(target / file, record) for file, record in records.items())

    if not is_whole():
        need = sum(record.bytes for record in records.values())
        with temporary(target.parent, 0) as damaged, temporary(target.parent, need) as new:
            new.mkdir()
            for file, data in contents.items():
                write_durably(new / file, data)
            sync_folder(new)
            if target.exists() and not is_whole():  # what it should hold is known: it is replaced
                os.rename(target, damaged)
            try:
                os.rename(new, target)
            except OSError:
                if not is_whole():  # else another process wrote the same just now
                    raise
    sync_folder(target.parent)
