"""The plan of a build: what it says is what `build` then does, and nothing stays behind."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from localmoe.config import BuildConfig, ClusterConfig, SearchConfig, TrainConfig
from localmoe.errors import CorpusError
from localmoe.models import load_model
from localmoe.train import plan as planning
from localmoe.train.clusters import FIRST
from localmoe.train.plan import AMPLE, FEW, SCARCE, UNLIKE, Plan, advice, plan
from localmoe.train.progress import Event
from localmoe.train.rates import EXPERTS


@pytest.fixture
def config(tiny_base: Path, tiny_encoder: Path) -> BuildConfig:
    return tiny.tiny_config(tiny_base, tiny_encoder)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_plan_foretells_the_bank_that_build_makes(
    tiny_corpus: Path, tiny_bank: Path, config: BuildConfig, scratch: Path
) -> None:
    from localmoe.bank.store import Bank

    manifest = Bank.open(tiny_bank).manifest
    found = plan(tiny_corpus, config, probe=False)
    assert found.sizes == tuple(expert.tokens for expert in manifest.experts)
    assert found.documents == manifest.corpus["split_documents"]
    assert {name: found.tokens[name] for name in ("train", "tune", "test")} == manifest.corpus["split_tokens"]
    assert found.tokens["unused"] == manifest.corpus["unused_tokens"]
    assert (found.wanted, found.embedded, found.times) == (4, found.documents["train"], None)
    adapters = sum(adapter.weights.bytes for adapter in manifest.adapters)
    vectors = 2 * manifest.encoder.dim * sum(found.documents.values())
    assert adapters * 0.5 < found.bank_bytes - vectors < adapters * 2  # tiny factors: headers weigh much
    assert list(scratch.iterdir()) == []


def test_a_sample_stands_for_all_tokens(
    tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "EMBEDDED", 12)
    found = plan(tiny_corpus, config, probe=False)
    assert found.embedded == 12
    assert sum(found.sizes) == pytest.approx(found.tokens["train"], abs=12)


def test_fewer_experts_than_wanted_can_be_seen(tiny_corpus: Path, config: BuildConfig) -> None:
    found = plan(tiny_corpus, replace(config, cluster=ClusterConfig(clusters=9, min_tokens=600)), probe=False)
    assert found.wanted == 9
    assert len(found.sizes) < 9 and min(found.sizes) >= 600


def _measured(source: Path, config: BuildConfig, events: list[Event]) -> Plan:
    found = plan(source, config, watch=events.append)
    assert found.times is not None and found.times.tokens_per_second > 0
    return found


def test_times_follow_from_tokens_and_measured_speed(tiny_corpus: Path, config: BuildConfig) -> None:
    events: list[Event] = []
    found = _measured(
        tiny_corpus,
        replace(config, train=TrainConfig(recipe="trunk", rank=4, epochs=2, trunk_epochs=0.5, batch=8)),
        events,
    )
    times = found.times
    assert times is not None
    assert times.experts == pytest.approx(2 * found.tokens["train"] / times.expert_tokens_per_second)
    assert times.trunk == pytest.approx(found.tokens["train"] / 2 / times.tokens_per_second)  # all are public
    assert times.tokens_per_second != times.expert_tokens_per_second  # 8 passages a step, and one
    assert any(event.stage == "experts" and event.done > 0 for event in events)
    assert times.rates == 0
    assert times.total == times.embed + times.trunk + times.experts + times.checks
    assert min(times.embed, times.checks) > 0
    assert any(event.stage == "trunk" and event.done > 0 for event in events)


def test_a_joint_training_is_timed_as_a_whole_and_needs_memory_for_its_experts(
    tiny_corpus: Path, tiny_base: Path, config: BuildConfig
) -> None:
    events: list[Event] = []
    asked = replace(config, train=TrainConfig(recipe="joint", rank=4, epochs=3, batch=8))
    found = _measured(tiny_corpus, asked, events)
    assert found.times is not None and found.times.experts == 0
    assert found.times.trunk == pytest.approx(3 * found.tokens["train"] / found.times.tokens_per_second)
    outputs = sum(update.B.shape[0] for update in tiny.random_adapter(load_model(str(tiny_base))).values())
    assert found.training_bytes == 4 * len(found.sizes) * 4 * outputs  # fp32
    assert plan(tiny_corpus, config, probe=False).training_bytes == 0
    assert not any(event.stage == "experts" for event in events)


def test_the_paper_s_recipe_needs_neither_time_nor_disk_for_a_trunk(tiny_corpus: Path, config: BuildConfig) -> None:
    with_trunk = plan(tiny_corpus, config, probe=False)
    paper = _measured(tiny_corpus, replace(config, train=TrainConfig(rank=4, recipe="paper")), [])
    assert paper.times is not None and paper.times.trunk == 0
    assert paper.bank_bytes < with_trunk.bank_bytes


def test_the_probe_stops_after_its_steps(
    tiny_corpus: Path, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "STEPS", 2)
    events: list[Event] = []
    _measured(tiny_corpus, replace(config, train=TrainConfig(recipe="trunk", rank=4, batch=2)), events)
    assert len([event for event in events if event.stage == "trunk" and event.done > 0]) == 3


def test_a_corpus_of_one_document_has_a_plan(tmp_path: Path, config: BuildConfig) -> None:
    file = tmp_path / "one.txt"
    file.write_text(tiny.sentence("sea", 1), encoding="utf-8")
    assert len(_measured(file, config, []).sizes) == 1


def test_what_build_refuses_plan_refuses_and_cleans_up(tmp_path: Path, config: BuildConfig, scratch: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="0 documents"):
        plan(tmp_path / "empty", config)
    assert list(scratch.iterdir()) == []


def test_the_advice_turns_where_an_adapter_is_full(tiny_corpus: Path, config: BuildConfig) -> None:
    found = plan(tiny_corpus, config, probe=False)
    rank = config.train.rank
    per_rank = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # q and o, k and v, gate, up and down of two layers
    assert found.tokens_per_parameter == pytest.approx(found.tokens["train"] / (rank * per_rank))
    assert 0.3 < found.explained < 1  # four topics without a common word
    for ratio, word in ((AMPLE, "likely to pay"), (2 * SCARCE, "measure it"), (SCARCE / 2, "scarce")):
        assert word in advice(replace(found, tokens_per_parameter=ratio))


@pytest.mark.parametrize(
    ("documents", "ratio", "explained", "word"),
    [
        (FEW - 1, SCARCE, UNLIKE, "so few"),
        (FEW, SCARCE, 0.0, "Raise --rank first"),
        (FEW, SCARCE, UNLIKE, "more than rank 4 holds"),
        (FEW, SCARCE / 2, UNLIKE, "so unlike"),
        (FEW, SCARCE / 2, UNLIKE / 2, "so alike"),
    ],
)
def test_the_advice_for_a_joint_training_says_on_which_side_of_the_border_a_corpus_lies(
    documents: int, ratio: float, explained: float, word: str, tiny_corpus: Path, config: BuildConfig
) -> None:
    found = plan(tiny_corpus, replace(config, train=replace(config.train, recipe="joint")), probe=False)
    told = advice(replace(found, documents={"train": documents}, tokens_per_parameter=ratio, explained=explained))
    assert word in told and f"{explained:.0%} of the variance" in told
    fewest = advice(replace(found, documents={"train": FIRST}, tokens_per_parameter=ratio, explained=0.0))
    assert "so few" in fewest and "variance" not in fewest


def test_rates_to_try_take_time_too(tiny_corpus: Path, config: BuildConfig) -> None:
    found = _measured(tiny_corpus, replace(config, search=SearchConfig((0.5, 1, 2), tokens=100)), [])
    assert found.times is not None
    few = found.times.experts * min(1, EXPERTS / len(found.sizes))  # a trial of the experts' rate trains a few of them
    assert found.times.rates == pytest.approx(3 * (100 / found.times.tokens_per_second + few))


def test_a_joint_training_tries_the_rates_of_trunk_and_experts(tiny_corpus: Path, config: BuildConfig) -> None:
    joint = replace(config, train=replace(config.train, recipe="joint"), search=SearchConfig((0.5, 1, 2), tokens=100))
    found = _measured(tiny_corpus, joint, [])
    assert found.times is not None
    assert found.times.rates == pytest.approx(3 * 2 * 100 / found.times.tokens_per_second)


def test_rates_that_cannot_be_tried_take_no_time(tiny_corpus: Path, config: BuildConfig) -> None:
    without = replace(config, search=SearchConfig((0.5, 1, 2)), corpus=replace(config.corpus, tune_fraction=0.0))
    found = _measured(tiny_corpus, without, [])
    assert found.times is not None and found.times.rates == 0
