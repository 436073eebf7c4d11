"""Packed attention against the formula in fp64: each passage alone, causal, within its window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe import attention


def states(lengths: list[int], heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(1, count, sum(lengths), 8) for count in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2].requires_grad_()


def oracle(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """[1, Σn, heads, d] in fp64, a loop over passages, heads and places."""
    q, k, v = (t[0].double() for t in (query, key, value))
    groups = q.shape[0] // k.shape[0]
    rows = []
    start = 0
    for length in lengths:
        for place in range(start, start + length):
            first = start if window is None else max(start, place - window + 1)
            heads = []
            for head in range(q.shape[0]):
                scores = k[head // groups, first : place + 1] @ q[head, place] * q.shape[-1] ** -0.5
                heads.append(torch.softmax(scores, 0) @ v[head // groups, first : place + 1])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)[None]


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("block", "kept"), [(4, 0), (4, 512), (256, 0), (256, 512)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_those_of_the_formula(
    window: int | None,
    kv_heads: int,
    block: int,
    kept: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    monkeypatch.setattr(attention, "_KEPT", kept)
    lengths = [5, 1, 9]
    inputs = states(lengths, 4, kv_heads, dtype)
    found, _ = attention.packed_attention(
        torch.nn.Identity(), *inputs, None, cu_seq_lens_q=lengths, sliding_window=window
    )
    expected = oracle(*inputs, lengths, window)
    assert torch.allclose(found.double(), expected, atol=tolerance)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.autograd.grad((found.double() * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.double(), reference.double(), atol=10 * tolerance, rtol=tolerance)


def test_bf16_on_a_cpu_runs_by_products_and_fp32_by_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("_by_products", "_fused"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, f=original: (ran.append(n), f(*a))[1])
    for dtype in (torch.bfloat16, torch.float32):
        attention.packed_attention(torch.nn.Identity(), *states([4], 2, 2, dtype), None, cu_seq_lens_q=[4])
    assert ran == ["_by_products", "_fused"]


def test_what_it_cannot_do_is_an_error() -> None:
    inputs = states([3], 2, 2, torch.float32)
    for wrong in ({}, {"cu_seq_lens_q": [3], "softcap": 5.0}, {"cu_seq_lens_q": [3], "dropout": 0.1}):
        with pytest.raises(ValueError, match="packed attention"):
            attention.packed_attention(torch.nn.Identity(), *inputs, None, **wrong)
