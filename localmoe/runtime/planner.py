"""The planner: what each way to execute a mix will cost on this machine, and which one costs least."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from localmoe.errors import UsageError
from localmoe.identity import home
from localmoe.runtime.execution.choice import Choice, Way, Work
from localmoe.runtime.execution.kernels import level

Phase = Literal["base prefill", "base step", "beside prefill", "beside step", "write"]
"""A forward of a prompt and of one token a row, by plain weights and with factors beside them; a dense merge."""

PHASES: tuple[Phase, ...] = ("base prefill", "base step", "beside prefill", "beside step", "write")

_FORMAT = 3  # of a calibration on disk
_FEATURES = 4
_SMALLEST = 1e-6  # seconds; what is measured to take less takes this long
_SHARED_READ = 0.5  # of a rank whose A is shared only B is read


@dataclass(frozen=True)
class Point:
    """The measured seconds of one phase with `tokens` tokens and factors of rank `inner`, of which `read` are read."""

    phase: Phase
    tokens: int
    read: float
    inner: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """Phase → seconds for each feature of `_features`, all ≥ 0."""

    seconds: Mapping[Phase, tuple[float, ...]]

    def time(self, phase: Phase, tokens: int, read: float = 0.0, inner: float = 0.0) -> float:
        """Predicted seconds of one phase."""
        return sum(w * x for w, x in zip(self.seconds[phase], _features(tokens, read, inner), strict=True))


@dataclass(frozen=True)
class Plan:
    """What is predicted of each choice that could do the work, from the prompt's ids to the last token, in seconds."""

    predicted: Mapping[Choice, float]

    @property
    def choice(self) -> Choice:
        """The one that costs least; the first of equals."""
        return min(self.predicted, key=self.predicted.__getitem__)


@dataclass(frozen=True)
class CalibratedPlanner:
    """Chooses by a calibration."""

    calibration: Calibration

    def __call__(self, work: Work) -> Choice:
        """The cheapest choice."""
        return self.plan(work).choice

    def plan(self, work: Work) -> Plan:
        """What every choice that can do `work` is predicted to cost."""
        if work.mixes > 1:
            ways: list[tuple[Way, Way]] = [("grouped", "grouped")]
        else:
            ways = [("stacked", "stacked")]
            ways += [("stacked", "dense"), ("dense", "dense")] if work.plain else []
        return Plan({Choice(*pair): predict(self.calibration, work, Choice(*pair)) for pair in ways})


def predict(calibration: Calibration, work: Work, choice: Choice) -> float:
    """Seconds to merge or gather, to run the prompts, and to draw `new_tokens` tokens a row."""
    read, inner, again = work.rank, work.rank, work.rank
    if work.shared:  # one expert of their rank for every mix, whose B is read again at every token
        inner = work.rank / max(work.experts, 1)
        again = inner * (1 - _SHARED_READ + _SHARED_READ * work.mixes)
        read = work.rank * _SHARED_READ + (again - inner)
    tokens, steps = work.rows * work.prompt_tokens, max(work.new_tokens - 1, 0)
    merges = choice.prefill == "dense" or (choice.decode == "dense" and steps > 0)
    write = calibration.time("write", 0, read, inner) if merges and not work.held else 0.0
    if choice.prefill == "dense":
        prefill = calibration.time("base prefill", tokens)
    else:
        prefill = calibration.time("beside prefill", tokens, read, inner)
    if choice.decode == "dense":
        step = calibration.time("base step", work.rows)
    else:
        step = calibration.time("beside step", work.rows, again, inner)
    return write + prefill + steps * step


def fit(points: Sequence[Point]) -> Calibration:
    """Weights ≥ 0 of the features of every phase that was measured, by least squares of the relative errors."""
    found: dict[Phase, tuple[float, ...]] = {}
    for phase in dict.fromkeys(point.phase for point in points):
        rows = [point for point in points if point.phase == phase]
        seconds = torch.tensor([max(point.seconds, _SMALLEST) for point in rows], dtype=torch.float64)
        features = torch.tensor([_features(p.tokens, p.read, p.inner) for p in rows], dtype=torch.float64)
        found[phase] = _non_negative(features / seconds[:, None])
    missing = [phase for phase in PHASES if phase not in found and phase != "write"]
    if missing:
        raise UsageError(f"nothing was measured of {', '.join(missing)}")
    return Calibration(found)


def _features(tokens: int, read: float, inner: float) -> tuple[float, ...]:
    """What time is a sum of: a call, every token, every rank that is read, every rank that is applied to a token."""
    return 1.0, float(tokens), read, inner * max(tokens, 1)


def _non_negative(features: torch.Tensor) -> tuple[float, ...]:
    """w ≥ 0 that minimises ‖X w − 1‖ for X [n, f] fp64: the best of the fits that use some of the features."""
    count = features.shape[1]
    scale = features.amax(dim=0).clamp(min=1e-12)
    wanted, best, least = torch.ones(len(features), dtype=torch.float64), torch.zeros(count).double(), float("inf")
    for used in (used for size in range(1, count + 1) for used in combinations(range(count), size)):
        columns = (features / scale)[:, used]
        weights = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
        error = float((columns @ weights - wanted).square().sum())
        if bool((weights >= 0).all()) and error < least - 1e-9:
            least, best = error, torch.zeros(count).double().index_copy(0, torch.tensor(used), weights)
    return tuple((best / scale).tolist())


def recall_calibration(key: str) -> Calibration | None:
    """What `remember_calibration` noted, or None; a note that cannot be read is none."""
    try:
        values = json.loads(_note(key).read_text(encoding="utf-8"))
        found: dict[Phase, tuple[float, ...]] = {p: tuple(map(float, values[p])) for p in PHASES if p in values}
    except (OSError, ValueError, TypeError):
        return None
    whole = all(phase in found for phase in PHASES if phase != "write")
    return Calibration(found) if whole and all(len(each) == _FEATURES for each in found.values()) else None


def remember_calibration(key: str, calibration: Calibration) -> None:
    """Note a calibration on this machine; where it cannot be written everything goes on without."""
    note = _note(key)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as file:
            json.dump(dict(calibration.seconds), file)
        Path(file.name).replace(note)
    except OSError:
        return


def calibration_key(architecture: str, dtype: torch.dtype, device: torch.device, kinds: tuple[str, ...]) -> str:
    """What decides the times: processor or GPU, cores, threads, torch, kernels, dtype, architecture, forms."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = (
        _FORMAT,
        where,
        cores,
        torch.get_num_threads(),
        torch.__version__,
        level(),
        str(dtype),
        architecture,
        kinds,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _note(key: str) -> Path:
    return home() / "calibrations" / f"{key}.json"


@cache
def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
