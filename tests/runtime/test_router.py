"""Prompt routing: neighbours whatever the size of a block, and β where a router needs one."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import localmoe
from localmoe.bank.store import Bank
from localmoe.errors import ConfigError
from localmoe.runtime import router as module
from localmoe.runtime.router import open_router, route_config


def test_the_nearest_documents_do_not_depend_on_how_many_are_read_at_once(
    tiny_bank: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = open_router(tiny_bank, str(tiny_encoder))
    whole = router.nearest(tiny.sentence("sky", 70), 50)
    monkeypatch.setattr(module, "_BLOCK", 7)
    parts = router.nearest(tiny.sentence("sky", 70), 50)
    assert [near.id for near in parts] == [near.id for near in whole]
    assert [near.similarity for near in parts] == pytest.approx([near.similarity for near in whole], abs=1e-6)


def test_only_a_router_that_reads_beta_needs_tune_documents_for_another_number_of_experts(
    tiny_bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.open(tiny_bank)
    monkeypatch.setattr(module, "ENOUGH", 1000)
    with pytest.raises(ConfigError, match="found on tune documents"):
        route_config(bank, {"active": 4})
    assert route_config(bank, {"active": 4, "router": "uniform"}).active == 4
    assert route_config(bank, {"active": 4, "beta": 0.1}).beta == 0.1


def test_the_router_on_means_gets_a_beta_of_its_own(tiny_bank: Path, tiny_encoder: Path) -> None:
    bank = Bank.open(tiny_bank)
    members = route_config(bank, {"router": "members"})
    assert members.beta == route_config(bank, {"router": "members", "active": members.active}).beta
    assert members.beta != bank.manifest.router.beta == route_config(bank, {"router": "threshold"}).beta
    assert route_config(bank, {"router": "members", "beta": 0.1}).beta == 0.1
    assert open_router(tiny_bank, str(tiny_encoder), {"router": "members"}).route(tiny.sentence("sea", 1)).experts


def test_the_noise_of_sift_is_the_banks_unless_it_is_changed(tiny_bank: Path) -> None:
    bank = Bank.open(tiny_bank)
    bank.manifest = replace(bank.manifest, router=replace(bank.manifest.router, sift_lambda=0.5))
    assert route_config(bank, {}).sift_lambda == 0.5
    assert route_config(bank, {"sift_lambda": 2.0}).sift_lambda == 2.0
    with pytest.raises(ConfigError, match="sift_lambda"):
        route_config(bank, {"sift_lambda": 0.0})


def test_a_bank_whose_encoder_is_its_base_builds_routes_and_answers(
    tiny_corpus: Path, tiny_base: Path, tmp_path: Path
) -> None:
    path = localmoe.build(tiny_corpus, tmp_path / "bank", tiny.tiny_config(tiny_base, "base")).path
    assert Bank.open(path).manifest.encoder.id == "base"
    engine = localmoe.open(path)
    prompt = tiny.sentence("sea", 70)
    mix = engine.route(prompt)
    assert mix.experts and open_router(path).route(prompt) == mix
    with engine.merged(mix):
        assert engine.route(prompt) == mix
