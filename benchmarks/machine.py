"""The machine: what it is, how fast it reads memory and multiplies, and the limits that follow for a merge."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, threads, instruction set and versions."""
    found = {
        "device": device,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "localmoe")},
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_bytes": torch.cuda.get_device_properties(0).total_memory}
    return found


def _version(name: str) -> str | None:
    """None for what runs from its source without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronise(device: str) -> None:
    """Wait for all that a GPU was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeats: int, device: str) -> list[float]:
    """How long `work` took, each time, after one time that does not count."""
    work()
    found = []
    for _ in range(repeats):
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - begun)
    return found


def speeds(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second that are read (a sum) and copied (read and written), and FLOP a second of a large product."""
    size = 256 * MIB if device == "cpu" else 1024 * MIB
    block = torch.ones(size // 4, device=device)
    other = torch.empty_like(block)
    read = size / statistics.median(seconds(block.sum, 7, device))
    copied = 2 * size / statistics.median(seconds(lambda: other.copy_(block), 7, device))
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    flops = 2 * n**3 / statistics.median(seconds(lambda: a @ b, 5, device))
    return {"read_bytes_per_second": read, "copy_bytes_per_second": copied, "gemm_flop_per_second": flops}


def limits(
    shapes: list[tuple[int, int]], rank: int, experts: int, prompt: int, speed: dict[str, float], shared: bool = False
) -> dict[str, float]:
    """Seconds that a mix must add to the first token, if bytes and FLOPs were all; weights and factors in bf16.

    dense: one pass over factors and weights, or 2·Σ d_out·d_in·N·r FLOP; stacked: the factors are read once, or
    2·P·N·r·Σ(d_out + d_in) FLOP for a prompt of P tokens. shared: experts of one A, of which N·B are read and added up
    to one of rank r, which is applied.
    """
    inner = rank if shared else rank * experts
    applied = 2 * inner * sum(d_out + d_in for d_out, d_in in shapes)
    factors = 2 * rank * sum(experts * d_out + (1 if shared else experts) * d_in for d_out, d_in in shapes)
    weights = 2 * sum(d_out * d_in for d_out, d_in in shapes)
    read, copy, gemm = (
        speed[key] for key in ("read_bytes_per_second", "copy_bytes_per_second", "gemm_flop_per_second")
    )
    return {
        "dense": max(factors / read + 2 * weights / copy, weights * inner / gemm),
        "stacked": max(factors / read, prompt * applied / gemm),
    }


def forget_peak(device: str) -> None:
    """Peaks count from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> dict[str, int]:
    """The most memory this process has had, on the host (files' pages included) and on the device."""
    found = {"host": _status("VmHWM")}
    if device == "cuda":
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def resident_bytes() -> dict[str, int]:
    """Resident memory now: anonymous, and pages of files."""
    return {"anonymous": _status("RssAnon"), "file": _status("RssFile")}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
