"""`localmoe eval --figure`: the files, what is printed, and that nothing is computed twice."""

import json
from pathlib import Path

import made_results
import pytest
from click.testing import CliRunner

from localmoe.cli import main
from localmoe.evaluate.figures import material
from localmoe.evaluate.results import write_results


@pytest.fixture
def command(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path) -> list[str]:
    models = ["--base", str(tiny_base), "--encoder", str(tiny_encoder)]
    return ["eval", str(tiny_bank), *models, "--prefix", "12", "-o", str(tmp_path / "out")]


def test_a_table_is_printed_and_left_as_markdown(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*command, "--figure", "table-6"])
    assert done.exit_code == 0, done.output
    assert "e00" in done.stdout
    folder = tmp_path / "out" / "figures"
    assert f"table-6: Titles of the clusters: {folder / 'table-6.md'}" in done.stdout.replace("\n", "")
    assert {file.name for file in folder.iterdir()} == {"table-6.csv", "table-6.json", "table-6.md"}


def test_results_of_others_make_the_figures_that_need_no_forward(command: list[str], tmp_path: Path) -> None:
    write_results(tmp_path / "other", made_results.results())
    made = CliRunner().invoke(
        main, [*command, "--figure", "table-1", "--figure", "1-left", "--with", str(tmp_path / "other"), "--json"]
    )
    assert made.exit_code == 0, made.output
    assert [figure["figure"] for figure in json.loads(made.stdout)["figures"]] == ["table-1", "1-left"]
    rows = json.loads((tmp_path / "out" / "figures" / "table-1.json").read_text(encoding="utf-8"))["rows"]
    assert {"model", "other"} == set(rows[0])


def test_the_second_time_reads_what_the_first_one_kept(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*command, "--figure", "beta", "--set", "figure.betas=[0, 0.1]", "--set", "figure.taus=[0.01]"]
    first = CliRunner().invoke(main, asked)
    assert first.exit_code == 0, first.output

    def forbidden(*_: object) -> None:
        raise AssertionError("a forward although the losses are kept")

    monkeypatch.setattr(material, "token_nll", forbidden)
    assert CliRunner().invoke(main, asked).exit_code == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--figure", "11"], "unknown figure '11'"),
        (["--figure", "5", "--set", "figure.actve=[1]"], "did you mean 'active'"),
        (["--figure", "4-left"], "overhead benchmark"),
    ],
)
def test_what_cannot_be_made_is_a_usage_error(command: list[str], more: list[str], says: str) -> None:
    done = CliRunner().invoke(main, [*command, *more])
    assert done.exit_code == 2
    assert says in done.stderr
