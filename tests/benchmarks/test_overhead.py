"""What the overhead benchmarks compute from times, and that both sides of it are asked for the same mix."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from batch import _row
from bench import in_turn, ratio, stages
from machine import limits
from material import BETA, TAU, centroids, mixed_queries, routing, write_experts
from plots import against_experts, bars
from sides import Times

from localmoe.routing import Centroids, route


def times(first_token: float, total: float = 9.0, **others: float) -> Times:
    spent = dict.fromkeys(("embed", "select", "load", "merge", "restore"), 0.0) | others
    return Times(first_token=first_token, total=total, **spent)


def test_sides_take_turns_with_the_same_text_and_query() -> None:
    asked: list[tuple[str, str, int]] = []

    def side(name: str):  # type: ignore[no-untyped-def]
        def answer(text: str, query: int) -> Times:
            asked.append((name, text, query))
            return times(1.0)

        return answer

    emptied: list[int] = []
    found = in_turn({"a": side("a"), "b": side("b")}, map(str, count()), [7, 8, 9], before=emptied.append)
    assert asked == [("a", "0", 7), ("b", "0", 7), ("b", "1", 8), ("a", "1", 8), ("a", "2", 9), ("b", "2", 9)]
    assert emptied == [7, 7, 8, 8, 9, 9]
    assert {name: len(rows) for name, rows in found.items()} == {"a": 3, "b": 3}


def test_what_is_added_is_the_median_over_rounds_of_the_difference_in_a_round() -> None:
    rounds = {
        "base": [times(t).data() for t in (1.0, 5.0, 2.0)],
        "localmoe": [times(t).data() for t in (2.0, 9.0, 2.5)],
        "ttmerge": [times(t).data() for t in (4.0, 13.0, 9.0)],
    }
    medians = stages(rounds)
    assert medians["base"]["added_first_token"] == 0
    assert medians["localmoe"]["added_first_token"] == 1.0
    assert medians["localmoe"]["first_token"] == 2.5
    assert medians["ttmerge"]["added_first_token"] == 7.0
    assert ratio(medians) == 7.0


def test_what_we_add_is_over_the_faster_base_of_each_round() -> None:
    rounds = {
        "base": [times(t).data() for t in (1.0, 5.0, 2.0)],
        "base by our engine": [times(t).data() for t in (2.0, 1.0, 1.5)],
        "localmoe": [times(t).data() for t in (3.0, 4.0, 3.0)],
        "ttmerge": [times(t).data() for t in (3.0, 7.0, 4.0)],
    }
    medians = stages(rounds)
    assert medians["localmoe"]["added_first_token"] == 2.0
    assert medians["ttmerge"]["added_first_token"] == 2.0


def test_there_is_no_ratio_to_nothing() -> None:
    rounds = {name: [times(1.0).data()] for name in ("base", "localmoe", "ttmerge")}
    assert ratio(stages(rounds)) is None


@pytest.mark.parametrize(("experts", "active"), [(32, 1), (32, 10), (40, 30), (100, 100)])
def test_a_query_gives_exactly_n_experts_and_the_weights_of_ttmerge(experts: int, active: int) -> None:
    rows = Centroids(tuple(f"e{row:03d}" for row in range(experts)), centroids(experts), "bank")
    queries = mixed_queries(experts, active, 3)
    chosen = set()
    for query in queries:
        mix = route(torch.from_numpy(query)[None], rows, routing())[0]
        kernel = np.exp(-(1 - query[:experts].astype(np.float64)) / BETA)  # ttmerge, merging_model.py
        p = kernel / kernel.sum()
        passed = np.flatnonzero(p > TAU)
        assert mix.experts == tuple(f"e{row:03d}" for row in passed)
        assert len(passed) == active
        assert np.allclose(mix.weights, p[passed] / p[passed].sum(), atol=1e-5)
        chosen.add(mix.experts)
    assert len(chosen) == (1 if active == experts else 3)


def test_limits_are_the_slower_of_bytes_and_products() -> None:
    speed = {"read_bytes_per_second": 100.0, "copy_bytes_per_second": 50.0, "gemm_flop_per_second": 1e9}
    found = limits([(6, 4)], rank=2, experts=3, prompt=5, speed=speed)
    factors, weight = 2 * 6 * (6 + 4), 2 * 6 * 4
    assert found["dense"] == pytest.approx(factors / 100 + 2 * weight / 50)
    assert found["stacked"] == pytest.approx(factors / 100)
    slow = limits([(6, 4)], rank=2, experts=3, prompt=5, speed=speed | {"gemm_flop_per_second": 1.0})
    assert slow == {"dense": pytest.approx(2 * 6 * 4 * 6), "stacked": pytest.approx(2 * 5 * 6 * (6 + 4))}
    one_A = limits([(6, 4)], rank=2, experts=3, prompt=5, speed=speed, shared=True)
    assert one_A["stacked"] == pytest.approx(2 * 2 * (3 * 6 + 4) / 100)


def test_the_bars_of_the_figure_add_up_to_the_call() -> None:
    row = times(0.5, total=0.6, select=0.1, load=0.05, merge=0.2, restore=0.1).data()
    assert sum(bars(row).values()) == pytest.approx(600)
    assert bars(row)["rest of the first token"] == pytest.approx(150)


def test_the_line_of_a_side_is_its_first_token_and_the_pace_of_the_nearest_answers() -> None:
    def part(first_token: float, total: float) -> dict[str, object]:
        return {"medians": {side: times(first_token, total).data() for side in ("base", "localmoe", "ttmerge")}}

    report = {
        "first": {"N=3 r=16": part(1.0, 1.0), "N=30 r=16": part(2.0, 2.0), "N=3 r=64": part(9.0, 9.0)},
        "answers": {"N=3 r=16 32 tokens": part(1.0, 32.0), "N=3 r=64 32 tokens": part(9.0, 999.0)},
    }
    assert against_experts(report, 16, 11)["localmoe"] == [(3, 11.0), (30, 12.0)]


def test_ratios_of_a_batch_are_medians_of_rounds() -> None:
    row = _row({"base": [1.0, 2.0, 3.0], "localmoe": [2.0, 2.0, 4.0]}, 8, [5, 7, 9], [])
    assert row["tokens_per_second"] == {"base": 4.0, "localmoe": 4.0}
    assert row["ratios"] == {"localmoe / base": 0.75}
    assert row["distinct_experts"] == 7


@pytest.mark.parametrize("shared", [False, True])
def test_experts_of_one_a_have_one_in_the_bank_that_is_measured(tmp_path: Path, shared: bool) -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    bank = write_experts(tmp_path, model, "base", 3, 2, shared).bank
    module = next(iter(bank.adapter("e000")))
    first, second = (bank.adapter(name)[module].A for name in ("e000", "e001"))
    assert (first is second) == shared
