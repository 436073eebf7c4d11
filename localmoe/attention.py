"""Causal attention within each of several packed passages; on a CPU in bf16 by matrix products of our own.

PyTorch's fused attention reaches a small part of a CPU's bf16 speed, backwards above all. Batched products over blocks
of queries take about 0.7 of its time (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "localmoe_packed"
"""Name under which transformers knows `packed_attention`."""

_BLOCK = 256  # queries whose scores are alive at once; keys after the block are skipped
_KEPT = 512  # tokens of a passage whose probabilities are kept for the way back: 2 · heads · n² bytes a layer


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # whatever else transformers hands to every attention function
) -> tuple[Tensor, None]:
    """Causal attention within each passage: query [1, heads, Σn, d], key and value [1, kv heads, Σn, d].

    `cu_seq_lens_q` carries the passage *lengths* (transformers hands this name through to every layer).
    """
    if cu_seq_lens_q is None:
        raise ValueError("packed attention was called without the passage lengths")
    if softcap is not None or dropout:
        raise ValueError("packed attention knows no soft cap and no dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = list(cu_seq_lens_q)
    attend = _by_products if query.device.type == "cpu" and query.dtype == torch.bfloat16 else _fused
    if attend is _fused and len(set(lengths)) == 1:
        return _even(query, key, value, len(lengths), scale, sliding_window), None
    parts = (torch.split(states, lengths, 2) for states in (query, key, value))
    outputs = [attend(q, k, v, scale, sliding_window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _even(query: Tensor, key: Tensor, value: Tensor, count: int, scale: float, window: int | None) -> Tensor:
    """Passages of one length, all by one call; [1, Σn, heads, d] as transformers wants it."""
    q, k, v = (
        states[0].reshape(states.shape[1], count, -1, states.shape[3]).transpose(0, 1) for states in (query, key, value)
    )
    return _fused(q, k, v, scale, window).transpose(1, 2).flatten(0, 1)[None]


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Passages of one length [count, heads, n, d] by PyTorch's own kernel."""
    length = query.shape[2]
    whole = window is None or length <= window
    mask = None if whole else _mask(0, length, 0, 1, window, query.dtype, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=whole, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _by_products(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """One passage: queries of the heads that share a key head are laid under one another."""
    _, heads, length, _ = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    grouped = query.reshape(kv_heads, groups, length, -1)
    output: Tensor = _Products.apply(grouped, key[0], value[0], scale, window)  # type: ignore[no-untyped-call]
    return output.reshape(1, heads, length, -1)


class _Products(torch.autograd.Function):
    """O = softmax(s·Q Kᵀ + M) V by blocks of queries; of long passages P is computed again on the way back.

    Q [h, g, n, d], K and V [h, n, d]. dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)),
    dQ = s·dS K, dK = s·dSᵀ Q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept = []
        for part, mask, columns in _blocks(query, window):
            probabilities = _probabilities(_rows(query[:, :, part]), key[:, columns], mask, scale)
            output[:, :, part] = torch.bmm(probabilities, value[:, columns]).view(output[:, :, part].shape)
            if query.shape[2] <= _KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.window = scale, window
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        (g,) = grads
        dq = torch.empty_like(query, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(key), torch.zeros_like(value)
        for number, (part, mask, columns) in enumerate(_blocks(query, ctx.window)):
            q, do = _rows(query[:, :, part]), _rows(g[:, :, part])
            k, v = key[:, columns], value[:, columns]
            p = kept[number] if kept else _probabilities(q, k, mask, ctx.scale)
            dv[:, columns] += torch.bmm(p.transpose(1, 2), do)
            ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
            dq[:, :, part] = torch.bmm(ds, k).mul_(ctx.scale).view(dq[:, :, part].shape)
            dk[:, columns] += torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
        return dq, dk, dv, None, None


def _rows(states: Tensor) -> Tensor:
    """[h, g, m, d] → [h, g·m, d]."""
    return states.reshape(states.shape[0], -1, states.shape[-1])


def _probabilities(rows: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.baddbmm(mask.expand(rows.shape[0], -1, -1), rows, key.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1)


def _blocks(query: Tensor, window: int | None) -> Iterator[tuple[slice, Tensor, slice]]:
    """Queries of a block, its mask [1, g·m, keys], and the keys that any of them sees."""
    groups, length = query.shape[1], query.shape[2]
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield (
            slice(start, stop),
            _mask(start, stop, first, groups, window, query.dtype, query.device),
            slice(first, stop),
        )


@lru_cache(maxsize=64)
def _mask(
    start: int, stop: int, first: int, groups: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where query i in [start, stop) sees key j in [first, stop): i − window < j ≤ i; else −∞. [1, g·m, keys]."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
    seen = (distance >= 0) & (distance < (stop if window is None else window))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).repeat(groups, 1)[None].to(device)
