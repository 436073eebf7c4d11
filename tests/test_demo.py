"""The demo on a tiny bank: it shows what it measures, and a bank with fewer experts shows other numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

import localmoe
from localmoe import demo
from localmoe.bank.generations import remove
from localmoe.config import BuildConfig
from localmoe.errors import CorpusError
from localmoe.runtime import calibration
from localmoe.runtime.engine import Engine
from localmoe.terminal.demonstration import demonstrate


@pytest.fixture
def small(tiny_corpus: Path, tiny_base: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def configuration(base: str, encoder: str) -> BuildConfig:
        return tiny.tiny_config(tiny_base, tiny_encoder)

    monkeypatch.setattr(demo, "corpus", lambda: tiny_corpus)
    monkeypatch.setattr(demo, "configuration", configuration)
    monkeypatch.setattr(demo, "PREFIX_TOKENS", 5)


def nothing(_done: int, _total: int) -> None: ...


def test_removing_experts_from_the_bank_changes_the_merged_numbers_and_no_others(
    tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path, small: None
) -> None:
    path = tmp_path / "bank"
    shutil.copytree(tiny_bank, path)
    before = demo.measure(localmoe.open(path, str(tiny_base), str(tiny_encoder)), nothing)
    remove(path, [expert.id for expert in localmoe.Bank.open(path).routable()[1:]])
    after = demo.measure(localmoe.open(path, str(tiny_base), str(tiny_encoder)), nothing)
    assert (before.base, before.trunk) == (after.base, after.trunk)
    assert before.merged != after.merged
    assert after.active == 1.0


def test_the_demo_shows_clusters_perplexities_prompts_cost_and_what_to_try(
    tmp_path: Path, tiny_base: Path, tiny_encoder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrate(tmp_path / "bank", str(tiny_base), str(tiny_encoder))
    shown = capsys.readouterr().out
    for heading in (
        "1  Build",
        "2  Clusters",
        "3  Is it worth it",
        "4  Three prompts",
        "5  What it cost",
        "6  Try next",
    ):
        assert heading in shown
    assert shown.count("─ merged ─") == shown.count("─ base ─") == len(demo.PROMPTS)
    assert "paired bootstrap" in shown and "in all" in shown


def test_a_python_without_source_is_an_error_that_names_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(CorpusError, match="localmoe build FOLDER BANK"):
        demo.corpus()


def test_the_demo_trains_on_no_more_than_it_says() -> None:
    config = demo.configuration("base", "encoder")
    assert config.corpus.sample_tokens == demo.SAMPLE_TOKENS <= 120_000
    assert config.cluster.clusters is not None and config.cluster.clusters >= 8


def test_the_first_prompt_is_not_charged_with_measuring_the_machine(
    tmp_path: Path, tiny_base: Path, tiny_encoder: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    ask = demo.ask

    def measured_before(engine: Engine, prompt: str) -> demo.Exchange:
        assert calibration.known(engine.executor)
        return ask(engine, prompt)

    monkeypatch.setattr(demo, "ask", measured_before)
    demonstrate(tmp_path / "bank", str(tiny_base), str(tiny_encoder))
