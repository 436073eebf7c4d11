"""Tables of an evaluation: what stands in them, and as Markdown."""

import math
from dataclasses import replace

import made_results
import pytest

from localmoe.evaluate.results import ComparisonRow, Results, Spread
from localmoe.evaluate.statistics import compare
from localmoe.evaluate.tables import (
    Cell,
    Column,
    Table,
    costs_table,
    experts_table,
    headline,
    main_baseline,
    markdown,
    methods_table,
    subset_tables,
)
from localmoe.quantities import interval_text


@pytest.fixture(scope="module")
def results() -> Results:
    return made_results.results()


def _column(table: Table, name: str) -> dict[str, Cell]:
    place = [column.name for column in table.columns].index(name)
    return {row[0].text: row[place] for row in table.rows}


def test_the_baseline_is_the_fine_tune_where_it_was_run() -> None:
    every = made_results.results()
    assert main_baseline(every) == "fine-tuned"
    without = {name: gain for name, gain in made_results.GAINS.items() if name != "fine-tuned"}
    assert main_baseline(made_results.results(gains=without)) == "base"
    alone = made_results.results(gains={"merged": 0.01})
    assert main_baseline(alone) is None
    assert headline(alone) is None


def test_every_method_has_a_row_with_its_gain_and_cost(results: Results) -> None:
    table = methods_table(results)
    assert [row[0].text for row in table.rows] == [
        f"{name} (default)" if name == "merged" else name for name in made_results.GAINS
    ]
    gains = _column(table, "gain over fine-tuned")
    assert gains["merged (default)"].tone == "good"
    assert gains["null"].tone == "bad"
    assert gains["fine-tuned"].text == ""
    assert _column(table, "added")["merged (default)"].text == "31 ms"
    assert _column(table, "documents")["ttt-trunk"].text == "40"
    assert "cannot be compared" in " ".join(table.notes)


def test_costs_are_told_stage_by_stage_and_in_tokens(results: Results) -> None:
    merged = results.method("merged")
    assert merged is not None
    stages = merged.seconds | {"per_token": Spread(0.02, 0.03)}
    ours = replace(merged, seconds=stages, detail=merged.detail | {"expert_bytes": 3 * 2**20})
    methods = tuple(ours if method.default else method for method in results.methods)
    table = costs_table(replace(results, methods=methods))
    assert [row[0].text for row in table.rows] == [
        "base",
        *(
            f"{name} (default)" if name == "merged" else name
            for name in made_results.GAINS
            if name in made_results.ADDED
        ),
    ]
    assert _column(table, "first token")["base"].text and not _column(table, "added")["base"].text
    assert _column(table, "added")["merged (default)"].text.startswith("31 ms (")
    assert _column(table, "per token")["merged (default)"].text == "20 ms (30 ms)"
    quick = replace(ours, seconds=stages | {"merge": Spread(0.00042, 0.0061)})
    few = costs_table(replace(results, methods=(quick,)))
    assert _column(few, "merge")["merged (default)"].text == "0.42 ms (6.1 ms)"
    assert _column(table, "added, in tokens")["merged (default)"].value == pytest.approx(0.031 / 0.02)
    assert table.notes == ("An expert takes 3.0 MiB on disk.",)


def test_without_a_subset_the_documents_are_not_repeated_in_every_row() -> None:
    gains = {name: gain for name, gain in made_results.GAINS.items() if name != "ttt-trunk"}
    table = methods_table(made_results.results(gains=gains))
    assert "documents" not in [column.name for column in table.columns]
    assert not table.notes
    assert subset_tables(made_results.results(gains=gains)) == []


def test_without_the_fair_baseline_the_table_says_what_a_gain_may_be() -> None:
    gains = {"base": 0.0, "trunk": 0.1, "merged": 0.2}
    assert "fine-tuned was not run" in methods_table(made_results.results(gains=gains)).notes[0]
    assert "was not run" not in " ".join(methods_table(made_results.results()).notes)


def test_the_subset_table_scores_every_method_on_the_same_documents(results: Results) -> None:
    (table,) = subset_tables(results)
    merged, fine = results.method("merged"), results.method("fine-tuned")
    assert merged is not None and fine is not None
    ours = [merged.nll[place] for place in made_results.TTT]
    theirs = [fine.nll[place] for place in made_results.TTT]
    tokens = [results.tokens[place] for place in made_results.TTT]
    value = _column(table, "perplexity")["merged (default)"].value
    assert value == pytest.approx(math.exp(sum(ours) / sum(tokens)))
    assert _column(table, "gain over fine-tuned")["merged (default)"].value == compare(ours, theirs, tokens).gain


def test_the_subset_table_has_every_interval_with_the_evaluations_seed_and_over_the_method_of_the_subset() -> None:
    made = made_results.results(seed=3)
    over = ComparisonRow("merged", "ttt-trunk", True, 0.0, (0.0, 0.0), len(made_results.TTT), "")
    (table,) = subset_tables(replace(made, comparisons=(*made.comparisons, over)))
    nll = {method.name: dict(zip(method.documents, method.nll, strict=True)) for method in made.methods}
    tokens = [made.tokens[place] for place in made_results.TTT]
    for baseline in ("fine-tuned", "ttt-trunk"):
        gains = _column(table, f"gain over {baseline}")
        assert len(gains) == len(made.methods)
        for name in nll:
            cell = gains["merged (default)" if name == "merged" else name]
            ours, theirs = ([nll[one][place] for place in made_results.TTT] for one in (name, baseline))
            found = compare(ours, theirs, tokens, 3)
            expected = "" if name == baseline else interval_text(found.gain, found.low, found.high)
            assert cell.text == expected


def test_experts_share_out_all_documents(results: Results) -> None:
    table = experts_table(results)
    assert table is not None
    assert sum(cell.value or 0 for cell in _column(table, "documents").values()) == len(results.documents)


def test_markdown_escapes_bars_and_aligns_numbers() -> None:
    table = Table(
        "t", (Column("a"), Column("b", right=True)), ((Cell("x|y\nz", None, "strong"), Cell("1", 1.0)),), ("n",)
    )
    assert markdown(table) == "| a | b |\n| --- | ---: |\n| **x\\|y z** | 1 |\n\nn\n"
