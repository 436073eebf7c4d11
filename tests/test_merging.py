"""Merging against the loop in fp64, and the contract of every merge method."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.errors import BankError, UnknownNameError, UsageError
from localmoe.lora import Adapter, LowRank
from localmoe.merging import merge_adapters, mergers

MERGERS = tuple(mergers)
every_merger = pytest.mark.parametrize("method", MERGERS)


def update(rank: int, seed: int, d_out: int = 7, d_in: int = 5, dtype: torch.dtype = torch.float32) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=random).to(dtype)
    B = torch.randn(d_out, rank, generator=random).to(dtype)
    return LowRank(A, B, torch.full((rank,), 16.0 / rank))


def adapter(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    return {"q": update(rank, seed, dtype=dtype), "up": update(rank, seed + 100, d_out=9, dtype=dtype)}


def loop(updates: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k Σ_i c_ki b_ki a_kiᵀ in fp64."""
    total = torch.zeros(updates[0].B.shape[0], updates[0].A.shape[1], dtype=torch.float64)
    for one, weight in zip(updates, weights, strict=True):
        for i in range(one.rank):
            total += weight * one.c[i].double() * torch.outer(one.B[:, i].double(), one.A[i].double())
    return total


def dense(merged: LowRank | Tensor) -> Tensor:
    return merged.delta() if isinstance(merged, LowRank) else merged


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# --- linear ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_linear_equals_the_fp64_loop_whatever_the_ranks(
    ranks: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(ranks), max_size=len(ranks)))
    adapters = [adapter(rank, seed, dtype) for seed, rank in enumerate(ranks)]
    merged = merge_adapters(adapters, weights)
    assert list(merged) == ["q", "up"]
    for module, found in merged.items():
        assert isinstance(found, LowRank) and found.rank == sum(ranks)
        assert error_of(found.delta(), loop([one[module] for one in adapters], weights)) < 1e-5


def test_linear_is_not_the_merge_of_factors_scaled_by_the_root_of_the_weight() -> None:
    """PEFT's `linear` computes (Σ√w B)(Σ√w A), whose cross terms B_i A_j no expert has learned."""
    updates, weights = [update(4, seed) for seed in range(3)], [0.5, 0.3, 0.2]
    roots = [math.sqrt(weight * one.c[0].item()) for one, weight in zip(updates, weights, strict=True)]
    A = torch.stack([root * one.A for root, one in zip(roots, updates, strict=True)]).sum(0)
    B = torch.stack([root * one.B for root, one in zip(roots, updates, strict=True)]).sum(0)
    expected = loop(updates, weights)
    assert error_of(B @ A, expected) > 0.5
    (merged,) = merge_adapters([{"q": one} for one in updates], weights).values()
    assert error_of(dense(merged), expected) < 1e-6


def test_experts_that_share_one_a_merge_at_its_rank() -> None:
    shared = update(4, 0).A
    adapters = [{"q": LowRank(shared, update(4, seed).B, update(4, seed).c)} for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    merged = merge_adapters(adapters, weights)["q"]
    assert isinstance(merged, LowRank) and merged.rank == 4 and merged.A is shared
    assert error_of(merged.delta(), loop([one["q"] for one in adapters], weights)) < 1e-6


def test_merging_leaves_the_experts_as_they_were() -> None:
    adapters = [adapter(2, seed) for seed in range(2)]
    before = [loop([one["q"]], [1.0]) for one in adapters]
    for merged in merge_adapters(adapters, [0.5, 0.5]).values():
        assert isinstance(merged, LowRank)
        merged.A.zero_(), merged.B.zero_(), merged.c.zero_()
    assert all(torch.equal(loop([one["q"]], [1.0]), was) for one, was in zip(adapters, before, strict=True))


# --- the contract of every merge method -----------------------------------------------------------------


@every_merger
def test_the_order_of_the_experts_matters_to_rounding_at_most(method: str) -> None:
    adapters, weights = [adapter(rank, rank) for rank in (2, 3, 5)], [0.5, 0.3, 0.2]
    merged = merge_adapters(adapters, weights, method)
    turned = merge_adapters(adapters[::-1], weights[::-1], method)
    for module in merged:
        assert error_of(dense(turned[module]), dense(merged[module]).double()) < 1e-6


@every_merger
def test_a_single_expert_of_weight_one_is_reproduced(method: str) -> None:
    expert = adapter(3, 0)
    merged = merge_adapters([expert], [1.0], method)
    for module, one in expert.items():
        assert error_of(dense(merged[module]), loop([one], [1.0])) < 1e-6


@every_merger
def test_the_merge_has_the_shape_of_the_weight_and_is_finite(method: str) -> None:
    merged = merge_adapters([adapter(2, 0), adapter(3, 1)], [0.4, 0.6], method)
    assert {module: tuple(dense(one).shape) for module, one in merged.items()} == {"q": (7, 5), "up": (9, 5)}
    assert all(dense(one).isfinite().all() and dense(one).dtype == torch.float32 for one in merged.values())


# --- what is refused ------------------------------------------------------------------------------------


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no adapters to merge\na mix without experts is the base model"):
        merge_adapters([], [])


def test_another_number_of_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="2 adapters cannot be merged with 1 weights"):
        merge_adapters([adapter(2, 0), adapter(2, 1)], [1.0])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        merge_adapters([adapter(2, 0), adapter(2, 1)], [0.5, weight])


def test_an_unknown_method_is_named_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="unknown merger 'liner', did you mean 'linear'"):
        merge_adapters([adapter(2, 0)], [1.0], "liner")


@pytest.mark.parametrize(("lacking", "whole"), [(0, 1), (1, 0)])
def test_a_module_that_one_expert_lacks_is_refused_by_name(lacking: int, whole: int) -> None:
    adapters: list[Adapter] = [adapter(2, 0), adapter(2, 1)]
    adapters[lacking] = {"q": adapters[lacking]["q"]}
    assert "up" in adapters[whole]
    with pytest.raises(BankError, match=f"adapter {lacking} of the 2 to merge has no update for module 'up'"):
        merge_adapters(adapters, [0.5, 0.5])


@pytest.mark.parametrize(("d_out", "d_in"), [(8, 5), (7, 4)])
def test_a_module_of_another_shape_is_refused_by_name(d_out: int, d_in: int) -> None:
    adapters = [{"q": update(2, 0)}, {"q": update(2, 1, d_out=d_out, d_in=d_in)}]
    with pytest.raises(BankError, match=rf"module 'q' of shape \[{d_out}, {d_in}\], adapter 0 one of shape"):
        merge_adapters(adapters, [0.5, 0.5])


@pytest.mark.parametrize("part", ["A", "B", "c"])
def test_factors_of_different_ranks_are_refused_by_name(part: str) -> None:
    parts = {"A": torch.ones(2, 5), "B": torch.ones(7, 2), "c": torch.ones(2)}
    parts[part] = {"A": torch.ones(3, 5), "B": torch.ones(7, 3), "c": torch.ones(3)}[part]
    with pytest.raises(BankError, match="module 'q' is not of one rank"):
        merge_adapters([{"q": LowRank(parts["A"], parts["B"], parts["c"])}], [1.0])
