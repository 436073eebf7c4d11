"""PEFT folders: to and from the names and settings of `adapter_config.json`; nothing else knows them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.bank.files import check_finite, read_tensors
from localmoe.bank.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, decode_json
from localmoe.errors import BankError
from localmoe.lora import Adapter, LowRank

_KEY = re.compile(r"base_model\.model\.(?P<module>.{1,200})\.lora_(?P<factor>[AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Keys that say how an adapter was trained or is to be found, and change nothing about ΔW of a finished one.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type"),
}
_READ = {"alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# Patterns come from strangers: three simple repetitions and two groups at most, or matching could take for ever.
_SIMPLE_PATTERN = re.compile(r"[^*+?{]*(?:(?:\.\*|\\d\+)[^*+?{]*){0,3}")


def to_peft(
    adapter: Adapter, base: str, fan_in_fan_out: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter as (`adapter_config.json`, state dict): ΔW = (alpha/r)·B·A per module.

    A module with one c for all rows keeps its factors and gets alpha = c·r; where rows differ (a merged
    adapter), c goes into B (product in fp32) and alpha = r. Factors are rounded to `dtype`.
    `base`: hub id or name of a folder; `fan_in_fan_out`: the base's weights are transposed (GPT-2's Conv1D).
    Raises BankError for an adapter without modules and for non-finite factors, after rounding.
    """
    if not adapter:
        raise BankError("an adapter without a single module cannot be written", "check the target modules")
    tensors, ranks, alphas = {}, {}, {}
    for module, update in sorted(adapter.items()):
        B, ranks[module], alphas[module] = update.B, update.rank, _alpha(update.c)
        if not bool((update.c == update.c[0]).all()):
            B, alphas[module] = B.float() * update.c, float(update.rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = update.A.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.to(dtype)
    check_finite(tensors | {f"{module}: c": update.c for module, update in adapter.items()}, "the adapter")
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): _number(a) for name, a in alphas.items() if a != alpha},
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter}),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    return config, tensors


def from_peft(folder: Path, shapes: Mapping[str, tuple[int, int]] | None = None) -> tuple[Adapter, dict[str, Any]]:
    """A foreign PEFT folder as (adapter, its configuration), read and checked whole.

    c = alpha/r, or alpha/√r with `use_rslora`, in every row. `shapes`: module name → (d_out, d_in) of the
    base's linear layers; with it, modules that the base does not have are refused too.
    Raises BankError for all that would change what the tensors mean (DoRA, biases, saved modules, unknown
    settings), and for unknown or missing tensors, wrong shapes, non-finite values and damaged files.
    """
    adapter, config = read_adapter(folder)
    check_values(adapter, str(folder / ADAPTER_WEIGHTS))
    if shapes is not None:
        check_fits(adapter, shapes, str(folder / ADAPTER_WEIGHTS))
    return adapter, config


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """As `from_peft`, but memory-mapped: no value is looked at; factors keep the dtype they are stored in."""
    config = _read_config(folder)
    where = str(folder / ADAPTER_WEIGHTS)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(read_tensors(folder / ADAPTER_WEIGHTS).items()):
        match = _KEY.fullmatch(key)
        if match is None:
            raise BankError(f"{where}: {key} is not a LoRA factor", "save the adapter again with LoRA factors alone")
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.dtype not in _DTYPES:
            raise BankError(
                f"{where}: {key} is {tensor.dtype} {list(tensor.shape)}, not a matrix of real numbers",
                "save the adapter again in bf16",
            )
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise BankError(f"{where} holds no LoRA factor", "save the adapter again")
    return {module: _low_rank(module, pair, config, where) for module, pair in factors.items()}, config


def check_values(adapter: Adapter, where: str) -> None:
    """Raises BankError that names the first module with a NaN or an infinity."""
    check_finite({f"{m}.lora_{f}": getattr(u, f) for m, u in adapter.items() for f in "AB"}, where)


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Raises BankError unless every module is one of the base model, (d_out, d_in) and all."""
    unknown = sorted(set(adapter) - set(shapes))
    if unknown:
        some = ", ".join(unknown[:3])
        raise BankError(
            f"{where}: {len(unknown)} of {len(adapter)} modules are not in the base model: {some}",
            "use the base model that the adapter was trained for",
        )
    for module, update in adapter.items():
        found = (update.B.shape[0], update.A.shape[1])
        if found != tuple(shapes[module]):
            raise BankError(
                f"{where}: {module} is {list(found)}, in the base model it is {list(shapes[module])}",
                "use the base model that the adapter was trained for",
            )


def _most_common(values: Iterable[float]) -> Any:
    """The most frequent value; of several, the largest."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _low_rank(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise BankError(f"{where}: {module} has lora_{next(iter(pair))} alone", "copy or save the adapter again")
    A, B = pair["A"], pair["B"]
    rank = _matching(config["rank_pattern"], module, config["r"])
    if not A.shape[0] == B.shape[1] == rank:
        raise BankError(
            f"{where}: {module}: A {list(A.shape)}, B {list(B.shape)}, but {ADAPTER_CONFIG} says rank {rank}",
            "save the adapter again, weights and configuration together",
        )
    alpha = _matching(config["alpha_pattern"], module, config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
    return LowRank(A, B, torch.full((rank,), scale, dtype=torch.float32))


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration with all that is read from it checked and present; other keys as they are."""
    file = folder / ADAPTER_CONFIG
    if not (folder / ADAPTER_WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise BankError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code and is not read",
            "convert it where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(folder)",
        )
    try:
        config = decode_json(file)
    except FileNotFoundError as error:
        raise BankError(
            f"{folder} is not a PEFT folder: {file.name} is missing", "name the adapter's folder"
        ) from error
    _check_plain(config, file)
    checked = dict(config)
    checked["use_rslora"] = _checked(config.get("use_rslora", False), bool, file, "use_rslora")
    checked["r"] = _checked(config.get("r"), int, file, "r")
    checked["lora_alpha"] = _checked(config.get("lora_alpha"), float, file, "lora_alpha")
    checked["rank_pattern"] = _read_pattern(config.get("rank_pattern"), int, file, "rank_pattern")
    checked["alpha_pattern"] = _read_pattern(config.get("alpha_pattern"), float, file, "alpha_pattern")
    return checked


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    """Raises BankError for all that is more than B·A, and for keys that are not known to be harmless."""
    if config.get("peft_type") != "LORA":
        raise BankError(f"{file}: peft_type is {config.get('peft_type')!r}", "only LoRA adapters can be experts")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise BankError(
            f"{file}: init_lora_weights = {start!r} trained against changed base weights",
            "convert it to a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for key, value in config.items():
        off = value is None or value is False or value == "none" or value in ({}, [], "")
        if key not in _HARMLESS | _READ and not off:
            raise BankError(
                f"{file}: {key} = {value!r} is more than a plain LoRA and would be lost",
                "train or export the adapter without it",
            )


def _read_pattern(patterns: Any, kind: type, file: Path, key: str) -> dict[str, Any]:
    if patterns is None:
        return {}
    if not isinstance(patterns, dict):
        raise BankError(f"{file}: {key} is not an object", "save the adapter again")
    for pattern, value in patterns.items():
        _checked(value, kind, file, f"{key}[{pattern!r}]")
        if not _is_simple(pattern):
            raise BankError(f"{file}: {key}: {pattern!r} is no simple pattern", "name the modules in full")
    return patterns


def _is_simple(pattern: str) -> bool:
    if _SIMPLE_PATTERN.fullmatch(pattern) is None or pattern.count("(") > 2:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _checked(value: Any, kind: type, file: Path, key: str) -> Any:
    """`value`, if it is a bool, a positive integer or a number that fits fp32, as `kind` asks."""
    if kind is bool:
        fits = isinstance(value, bool)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if not fits:
        raise BankError(f"{file}: {key} = {value!r} cannot be used", "save the adapter again")
    return value


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _exactly(module: str) -> str:
    """A pattern for this module alone."""
    return f"^{re.escape(module)}"


def _alpha(c: Tensor) -> float:
    """The alpha with c[0] = fp32(alpha / r): a short one where there is one (24, not 24.00000036)."""
    rank = c.shape[0]
    exact = float(c[0]) * rank
    short = round(exact, 4)
    return short if torch.tensor(short / rank, dtype=torch.float32) == c[0] else exact


def _number(value: float) -> float | int:
    """PEFT writes whole alphas as integers."""
    return int(value) if value == int(value) else value
