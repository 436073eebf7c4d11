"""Products with factors where they lie: `kernels.c`, compiled when LocalMoE is installed, for processors it suits.

PyTorch's products want the factors of the active experts side by side, and gathering them costs more than multiplying.
Where there was no C compiler, or the processor has no AVX-512 BF16, `level` is 0 and execution gathers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Level = Literal[0, 1, 2]
"""0: none; 1: AVX-512 BF16; 2: AMX tiles."""

NAMES: dict[Level, str] = {0: "none", 1: "AVX-512 BF16", 2: "AMX"}

VERSION = 3
"""Of the functions in kernels.c: a compiled file of another version is not used, nor one that holds none."""

TOKENS: dict[Level, int] = {0: 0, 1: 48, 2: 384}
"""As many tokens are multiplied where the factors lie; for more, gathering them costs less (docs/performance.md)."""


class Located(NamedTuple):
    """Where one factor of all active experts lies: addresses of three arrays [N] int64, which `kept` keeps alive.

    where: the address of each expert's factor; rows: how many it has; places: where its numbers begin in a row of n.
    """

    where: int
    rows: int
    places: int
    experts: int
    kept: tuple[object, ...]


@cache
def level() -> Level:
    """What this machine has."""
    library = _library()
    found = 0 if library is None else library.localmoe_level()
    return 2 if found == 2 else 1 if found == 1 else 0


def located(addresses: NDArray[np.int64], place: int, rows: NDArray[np.int64]) -> Located:
    """The factors at `place` of addresses [targets, N]; rows [2, N]: how many of each expert, and their places."""
    counts = address(rows)
    where = address(addresses) + place * addresses.strides[0]
    return Located(where, counts, counts + rows.strides[0], addresses.shape[1], (addresses, rows))


def address(array: NDArray[Any]) -> int:
    """Where a numpy array begins in memory."""
    found: int = array.__array_interface__["data"][0]
    return found


def narrow(at: Level, x: Tensor, A: Located, weights: Tensor, width: int, buffer: Buffer) -> Tensor:
    """w_k · x A_kᵀ of all experts in one row: x [tokens, d] bf16, weights [tokens or 1, N] fp32 → [tokens, width] fp32.

    A_k [rows_k, d] bf16; d must be a multiple of 32.
    """
    (tokens, d), threads = x.shape, torch.get_num_threads()
    out = torch.empty(tokens, width, dtype=torch.float32, device="cpu")
    step = 0 if len(weights) == 1 else A.experts
    given = (x.data_ptr(), tokens, d, A.where, A.rows, A.places, A.experts, weights.data_ptr(), step)
    _loaded().localmoe_narrow(at, threads, *given, out.data_ptr(), width, buffer.of(tokens, d, 0))
    return out


def widen(at: Level, y: Tensor, Bt: Located, narrow: Tensor, buffer: Buffer) -> None:
    """y += Σ_k n_k Bt_k, rounded once: y [tokens, d_out] bf16, n as `narrow` left it, Bt_k [rows_k, d_out] bf16."""
    (tokens, d_out), threads = y.shape, torch.get_num_threads()
    given = (y.data_ptr(), tokens, d_out, Bt.where, Bt.rows, Bt.places, Bt.experts, narrow.data_ptr(), narrow.shape[1])
    _loaded().localmoe_widen(at, threads, *given, buffer.of(tokens, 0, d_out))


def widen_rows(y: Tensor, Bt: Tensor, sets: NDArray[np.int64], narrow: Tensor, place: int) -> None:
    """y_i += n_i Bt_s(i) for every row i, rounded once: y [rows · T, d_out] and Bt [S, rank, d_out] bf16, sets [rows].

    n [rows · T, width] fp32, of which the columns from `place` are multiplied; every Bt_s is contiguous.
    """
    (tokens, d_out), rows, threads = y.shape, len(sets), torch.get_num_threads()
    given = (y.data_ptr(), rows, tokens // rows, d_out, Bt.data_ptr(), address(sets), Bt.stride(0), Bt.shape[1])
    _loaded().localmoe_widen_rows(threads, *given, narrow.data_ptr() + place * narrow.itemsize, narrow.shape[1])


def add(parts: Sequence[Tensor], weights: Tensor, out: Tensor) -> None:
    """out_s = Σ_k w_sk · part_k in fp32, rounded once: parts [n] bf16, weights [S, N] fp32, out [S, n] bf16.

    Every number is read once for all s; a part of weight 0 is not read.
    """
    all_weights = weights.numpy()
    sets, used = np.nonzero(all_weights)
    where = np.array([part.data_ptr() for part in parts])[used]
    chosen, counts = all_weights[sets, used], np.bincount(sets, minlength=len(weights))
    given = (address(where), address(chosen), address(counts), len(weights), out.shape[1], out.data_ptr())
    _loaded().localmoe_sums(torch.get_num_threads(), *given)


def lay(A: Located, Bt: Located, weights: Tensor, all_A: Tensor, all_B: Tensor) -> None:
    """A_k under one another in all_A [Σ rows, d_in], w_k · Bt_kᵀ beside one another in all_B [d_out, Σ rows]; bf16.

    The weights [N] fp32 are multiplied in fp32, and the product is rounded once.
    """
    given = (A.where, Bt.where, Bt.rows, Bt.experts, all_A.shape[1], len(all_B), weights.data_ptr())
    _loaded().localmoe_lay(torch.get_num_threads(), *given, all_A.data_ptr(), all_B.data_ptr())


def merge(linears: NDArray[np.int64], factors: Factors, weights: Tensor, buffer: Buffer) -> None:
    """out = W0 + Σ_k w_k Bt_kᵀ A_k of every linear, summed in fp32 and rounded once, by AMX tiles.

    linears [4, L]: d_in, d_out, and where W0 and out [d_out, d_in] bf16 begin, contiguous; weights [N] fp32, multiplied
    into Bt as `lay` does.
    """
    threads, most = torch.get_num_threads(), int(factors.rows.sum(axis=1).max())
    kept = linears, *(np.ascontiguousarray(part) for part in factors)
    d_in, d_out, base, out = (address(row) for row in kept[0])
    A, Bt, rows = (address(part) for part in kept[1:])
    given = (threads, linears.shape[1], d_in, d_out, base, out, A, Bt, rows, factors.rows.shape[1])
    _loaded().localmoe_merge(*given, weights.data_ptr(), most, buffer.of_merge(most))


class Factors(NamedTuple):
    """Of several linears and experts: where A and Bt begin, and how many rows they have, [L, N] int64 each."""

    A: NDArray[np.int64]
    Bt: NDArray[np.int64]
    rows: NDArray[np.int64]


class Buffer:
    """Memory for what the products put aside; it grows and is used again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._bytes: dict[tuple[int, int, int, int], int] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self._memory.nbytes

    def of(self, tokens: int, d: int, d_out: int) -> int:
        """Its address, large enough for a product of this shape."""
        key = (tokens, d, d_out, torch.get_num_threads())
        if key not in self._bytes:
            self._bytes = {} if len(self._bytes) > 1000 else self._bytes
            self._bytes[key] = _loaded().localmoe_bytes(*key)
        return self._sized(self._bytes[key])

    def of_merge(self, rows: int) -> int:
        """Its address, large enough for `merge` of as many rows of all experts."""
        return self._sized(_loaded().localmoe_merge_bytes(rows, torch.get_num_threads()))

    def _sized(self, size: int) -> int:
        if self._memory.nbytes < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory.data_ptr()


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("kernels.c was not compiled: ask `level` first")
    return library


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled file beside this one. Its threads are those of torch's OpenMP, which `import torch` has loaded."""
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"kernels_c{suffix}")
        if file.is_file():
            try:
                library = ctypes.CDLL(str(file))
            except OSError:  # of another machine, or torch brings an OpenMP of another kind
                return None
            return _typed(library) if getattr(library, "localmoe_version", int)() == VERSION else None
    return None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    level, address, number = (ctypes.c_int,), (ctypes.c_void_p,), (ctypes.c_int64,)
    factors = (*address * 3, *number)
    head = (*level, *number, *address, *number * 2, *factors, *address, *number)
    arguments = {
        "localmoe_level": (),
        "localmoe_bytes": number * 4,
        "localmoe_narrow": (*head, *address, *number, *address),
        "localmoe_widen": (*head, *address),
        "localmoe_widen_rows": (*number, *address, *number * 3, *address * 2, *number * 2, *address, *number),
        "localmoe_merge_bytes": number * 2,
        "localmoe_merge": (*number * 2, *address * 7, *number, *address, *number, *address),
        "localmoe_lay": (*number, *address * 3, *number * 3, *address * 3),
        "localmoe_sums": (*number, *address * 3, *number * 2, *address),
    }
    sizes = dict.fromkeys(("localmoe_bytes", "localmoe_merge_bytes"), ctypes.c_int64)
    results = {"localmoe_level": ctypes.c_int, **sizes}
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, results.get(name)
    return library
