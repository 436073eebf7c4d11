"""Figures: every one of the registry can be made, says what it was made of, and holds the numbers it should."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import made_results
import numpy as np
import pytest
import torch

from localmoe.errors import UnknownNameError, UsageError
from localmoe.evaluate.figures import scaling
from localmoe.evaluate.figures.figure import Figure, as_table, figures, write_figure
from localmoe.evaluate.figures.making import make_figures
from localmoe.evaluate.figures.material import HeldOut, Material
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.routing import similarities
from localmoe.runtime.engine import base_mix

NAMES = [
    *("1-left", "1-right", "4-left", "4-middle", "4-right", "5", "6-left", "6-middle", "6-right", "8", "9", "10"),
    *("table-1", "table-2", "table-5", "table-6", "table-7", "table-8", "table-9", "table-10"),
    *("beta", "clusterings", "encoders", "prefix-length", "run-times"),
]


@pytest.fixture(scope="module")
def made(material: Material) -> dict[str, Figure]:
    return {name: figures[name](material) for name in NAMES}


def test_the_registry_holds_every_figure_and_table() -> None:
    assert sorted(NAMES) == list(figures)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_can_be_written(name: str, made: dict[str, Figure], tmp_path: Path) -> None:
    figure = made[name]
    files = write_figure(tmp_path, name, figure)
    assert [file.suffix for file in files] == [".csv", ".json", ".md" if figure.draw is None else ".png"]
    assert all(file.stat().st_size > 0 for file in files)
    assert figure.title and figure.caption
    data = json.loads(files[1].read_text(encoding="utf-8"))
    assert len(data["rows"]) == len(figure.rows) > 0
    with files[0].open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(figure.rows)
    for row in figure.rows:
        for value in row.values():
            assert not isinstance(value, float) or math.isfinite(value)
        if "low" in row:
            assert row["low"] <= row["gain"] + 1e-9 and row["gain"] <= row["high"] + 1e-9


def _row(figure: Figure, **values: object) -> dict[str, object]:
    (found,) = [row for row in figure.rows if all(row.get(name) == value for name, value in values.items())]
    return found


def test_active_experts_are_counted_as_routing_counts_them(made: dict[str, Figure], held: HeldOut) -> None:
    config = replace(held.engine.config, beta=0.1, tau=0.01)
    counts = [len(mix.experts) for mix in held.mixes(config)]
    assert _row(made["4-right"], beta=0.1, tau=0.01)["active"] == pytest.approx(np.mean(counts))


def test_beta_zero_is_the_nearest_expert_alone(made: dict[str, Figure], held: HeldOut) -> None:
    nearest = held.nll(held.mixes(replace(held.engine.config, router="nearest")), "test")
    expected = held.measured(nearest)["perplexity"]
    for tau in (0.01, 0.1):
        row = _row(made["beta"], beta=0.0, tau=tau)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert row["active_mean"] == 1
    assert _row(made["5"], weights="uniform", models="merged", active=1)["perplexity"] == pytest.approx(expected)
    assert _row(made["5"], weights="uniform", models="ensembled", active=1)["perplexity"] == pytest.approx(expected)
    assert made["table-2"].rows[0]["perplexity"] == pytest.approx(expected)


def test_gains_are_over_the_bank_s_own_mixes(made: dict[str, Figure], held: HeldOut) -> None:
    shipped = held.measured(held.nll(held.mixes(), "test"))["perplexity"]
    for name in ("5", "8", "beta"):
        for row in made[name].rows:
            assert row["gain"] == pytest.approx(1 - row["perplexity"] / shipped)


def test_no_query_reads_what_it_is_scored_on(made: dict[str, Figure]) -> None:
    pairs = [(row["query"], row["prefix"]) for row in made["10"].rows]
    assert pairs == [(4, 8), (8, 8), (4, 12), (8, 12), (12, 12)]


def test_routing_accuracy_counts_the_own_cluster_among_the_nearest(made: dict[str, Figure], held: HeldOut) -> None:
    scores = similarities(held.queries(), held.engine.router.centroids)
    for row in made["6-right"].rows:
        hits = [
            own in torch.argsort(line, descending=True, stable=True)[: row["k"]].tolist()
            for line, own in zip(scores, held.clusters, strict=True)
        ]
        assert row["accuracy"] == pytest.approx(np.mean(hits))
    assert made["6-right"].rows[-1]["accuracy"] == 1


def test_the_matrix_holds_every_expert_on_every_cluster_that_has_documents(
    made: dict[str, Figure], held: HeldOut
) -> None:
    experts = held.engine.router.centroids.experts
    assert len(made["6-left"].rows) == len(experts) * len(set(held.clusters))
    row = made["6-left"].rows[0]
    places = [place for place, own in enumerate(held.clusters) if experts[own] == row["cluster"]]
    nll = held.nll([held.alone(str(row["expert"]))] * len(held), "test")
    counts = held.counts()
    mean = sum(nll[place] for place in places) / sum(counts[place] for place in places)
    assert row["perplexity"] == pytest.approx(math.exp(mean))


def test_k_means_has_no_worse_inertia_bound_and_shares_sum_up(made: dict[str, Figure]) -> None:
    for row in made["clusterings"].rows:
        assert row["smallest"] <= row["median"] <= row["largest"]
        assert row["inertia"] > 0
    assert [row["clusters"] for row in made["6-middle"].rows] == [1, 2, 3]
    curve = [row["inertia"] for row in made["6-middle"].rows]
    assert curve == sorted(curve, reverse=True)
    assert made["clusterings"].rows[0]["inertia"] == pytest.approx(curve[-1], rel=1e-6)


def test_the_ends_of_the_normalised_gain_are_base_and_ttt(made: dict[str, Figure]) -> None:
    assert _row(made["1-left"], method="base")["share"] == 0
    assert _row(made["1-left"], method="ttt-trunk")["share"] == 1
    base = _row(made["1-left"], method="base")["seconds"]
    assert base == pytest.approx(0.05 + 99 * 0.02)
    assert _row(made["1-left"], method="ttt-trunk")["seconds"] == pytest.approx(base + 14.2)
    assert _row(made["1-left"], method="ensemble-3")["seconds"] == pytest.approx(3 * base)


def test_evaluations_without_test_time_training_are_left_out_of_the_gain_and_said(
    made: dict[str, Figure], material: Material
) -> None:
    results = material.results[0][1]
    poor = replace(results, methods=tuple(one for one in results.methods if not one.name.startswith("ttt")))
    with_poor = figures["1-left"](replace(material, results=(*material.results, ("poor", poor))))
    assert with_poor.rows == made["1-left"].rows
    assert with_poor.settings["left_out"] == ["poor"] and "poor" in with_poor.caption
    with pytest.raises(UsageError, match="poor: this figure needs"):
        figures["1-left"](replace(material, results=(("poor", poor),)))


def test_means_over_evaluations_are_of_methods_that_all_of_them_have() -> None:
    rows = [
        {"results": name, "method": "merged", "share": share, "seconds": 2.0}
        for name, share in (("a", 0.5), ("b", 0.7))
    ]
    alone = {"results": "a", "method": "merged-3", "share": 1.0, "seconds": 9.0}
    assert scaling._means([*rows, alone]) == [{"method": "merged", "share": 0.6, "seconds": 2.0}]


def test_points_of_other_documents_are_left_out_and_said(made: dict[str, Figure], material: Material) -> None:
    assert {row["experts"] for row in made["1-right"].rows} == {4, 7, None}
    assert made["1-right"].settings["left_out"] == ["made up: ttt-trunk was scored on 2 documents only"]
    others = replace(material, results=(*material.results, ("others", made_results.results())))
    again = figures["1-right"](others)
    assert again.rows == made["1-right"].rows
    assert again.settings["left_out"][-1] == "others: scored on other documents"
    assert "others: scored on other documents" in again.caption


def test_banks_are_compared_with_the_first_as_they_are_shipped(made: dict[str, Figure], material: Material) -> None:
    first, second = [row for row in made["1-right"].rows if row.get("method") == "as shipped"]
    assert (first["experts"], first["over_first_gain"]) == (4, 0.0)
    shipped = [held.nll(held.mixes(), "test") for held in material.every_held_out()]
    counts = material.held_out().counts()
    found = compare(shipped[1], shipped[0], counts, material.evaluation.seed)
    assert [second[f"over_first_{key}"] for key in ("gain", "low", "high")] == [found.gain, found.low, found.high]
    assert second["perplexity"] == perplexity(shipped[1], counts)


def test_the_cost_of_tokens_grows_by_the_measured_pace(made: dict[str, Figure]) -> None:
    row = _row(made["4-left"], active=10, tokens=100)
    assert row["base"] == pytest.approx(2.01)
    assert row["merged"] == pytest.approx(2.03)
    assert row["ensemble"] == pytest.approx(20.1)
    assert [row["merge"] for row in made["4-middle"].rows] == [0.01, 0.01]


def test_the_experts_of_a_query_are_its_nearest(made: dict[str, Figure], held: HeldOut) -> None:
    for row in made["table-8"].rows:
        nearest = held.engine.router.nearest(row["query"], 1)[0]
        assert f"({nearest.expert})" in row["nearest 1"]


def test_texts_come_from_the_base_and_two_experts(made: dict[str, Figure], material: Material, held: HeldOut) -> None:
    for name in ("table-9", "table-10"):
        models = [row["model"] for row in made[name].rows]
        assert models[0] == "base model"
        assert len(models) == 3
    assert figures["table-10"](material).rows == made["table-10"].rows  # drawn from a seed
    from localmoe.config import GenerateConfig

    config = GenerateConfig(max_new_tokens=3, temperature=material.config.temperature)
    stream = held.engine.start("boat sail", config, base_mix(held.engine.bank))
    assert made["table-10"].rows[0]["text"] == "".join(stream).strip()


def test_all_leaves_out_what_cannot_be_made_and_says_why(material: Material, tmp_path: Path) -> None:
    poor = Material(material.config, material.evaluation, results=material.results)
    done: list[str] = []
    left_out = make_figures(["all"], poor, tmp_path, lambda name, figure, files: done.append(name))
    assert sorted([*done, *left_out, "table-7"]) == list(figures)  # which is table-6, of a bank of code
    assert "made from a bank" in left_out["5"]
    assert "table-1" in done


def test_what_was_named_must_be_made(material: Material, tmp_path: Path) -> None:
    poor = Material(material.config, material.evaluation)
    with pytest.raises(UsageError, match="made from a bank"):
        make_figures(["5"], poor, tmp_path, lambda *_: None)
    with pytest.raises(UnknownNameError, match="tabel-1"):
        make_figures(["tabel-1"], poor, tmp_path, lambda *_: None)


def test_numbers_stand_right_in_tables() -> None:
    figure = Figure("t", "c", ({"name": "a", "value": 0.123456, "count": 1234}, {"name": "b", "value": None}))
    table = as_table(figure)
    assert [column.right for column in table.columns] == [False, True, True]
    assert [cell.text for cell in table.rows[0]] == ["a", "0.1235", "1,234"]
    assert [cell.text for cell in table.rows[1]] == ["b", "", ""]
