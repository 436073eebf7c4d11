"""LowRank: its sum, scale and dense form against the loop in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe.lora import LowRank, stack


def update(rank: int, seed: int, A: Tensor | None = None, dtype: torch.dtype = torch.float32) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    own = torch.randn(rank, 6, generator=random).to(dtype)
    B = torch.randn(8, rank, generator=random).to(dtype)
    return LowRank(own if A is None else A, B, torch.rand(rank, generator=random) + 0.5)


def loop(*updates: LowRank) -> Tensor:
    """Σ_k Σ_i c_ki b_ki a_kiᵀ in fp64."""
    total = torch.zeros(8, 6, dtype=torch.float64)
    for one in updates:
        for i in range(one.c.shape[0]):
            total += one.c[i].double() * torch.outer(one.B[:, i].double(), one.A[i].double())
    return total


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_form_is_b_c_a_in_fp32(dtype: torch.dtype) -> None:
    one = update(3, 0, dtype=dtype)
    assert one.delta().dtype == torch.float32 and close(one.delta(), loop(one))


def test_scaling_changes_c_alone() -> None:
    one = update(3, 0)
    half = one.scaled(0.5)
    assert half.A is one.A and half.B is one.B
    assert close(half.delta(), 0.5 * loop(one)) and close(one.delta(), loop(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_of_mixed_ranks_is_the_sum(dtype: torch.dtype) -> None:
    updates = [update(rank, rank, dtype=dtype) for rank in (4, 8, 2)]
    stacked = stack(updates)
    assert stacked.rank == 14 and stacked.A.dtype == stacked.B.dtype == dtype
    assert close(stacked.delta(), loop(*updates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_one_a_stack_at_its_rank_and_sum_b_in_fp32(dtype: torch.dtype) -> None:
    A = update(4, 9, dtype=dtype).A
    updates = [update(4, seed, A, dtype) for seed in range(5)]
    stacked = stack(updates)
    assert stacked.rank == 4 and stacked.A is A and stacked.B.dtype == torch.float32
    assert close(stacked.delta(), loop(*updates))


def test_equal_but_separate_as_are_stacked_and_still_the_sum() -> None:
    first = update(2, 0)
    second = update(2, 1, A=first.A.clone())
    assert stack([first, second]).rank == 4
    assert close(stack([first, second]).delta(), loop(first, second))


def test_one_a_shared_by_some_only_is_still_the_sum() -> None:
    first = update(2, 0)
    updates = [first, update(2, 1, A=first.A), update(3, 2)]
    assert stack(updates).rank == 7
    assert close(stack(updates).delta(), loop(*updates))


def test_a_stack_of_one_is_that_update() -> None:
    one = update(3, 0)
    assert stack([one]) is one


def test_stacking_leaves_its_updates_as_they_were() -> None:
    A = update(2, 0).A
    updates = [update(2, seed, A) for seed in range(2)]
    before = [loop(one) for one in updates]
    stack(updates)
    assert all(torch.equal(loop(one), was) for one, was in zip(updates, before, strict=True))


def test_an_update_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        update(2, 0).c = torch.ones(2)  # type: ignore[misc]
