"""Packed experts: parts that are put together as they are, whatever their size and the number of threads."""

import pytest
import torch

from localmoe.runtime.execution import packed
from localmoe.runtime.execution.packed import join, views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [1, 10**9])
def test_parts_are_put_together_in_their_order(dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_LARGE", large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    whole = torch.randn(100).to(dtype)
    first, second, third = views(whole, [30, 0, 70])
    out = torch.empty(130, dtype=dtype)
    join([third, second, first, first], out)
    assert torch.equal(out, torch.cat([whole[30:], whole[:30], whole[:30]]))
