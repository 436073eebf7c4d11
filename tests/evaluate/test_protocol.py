"""The protocol on a tiny bank: the prefix alone routes, and every method is scored on the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import localmoe
from localmoe.errors import CorpusError, UsageError
from localmoe.evaluate.protocol import Cut, Trial, held_out, mutated, query_tokens, score_alone, score_merged, trials_of
from localmoe.packing import Passage
from localmoe.runtime.engine import Engine, base_mix


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))


def nothing(_done: int) -> None: ...


def test_trials_come_from_the_test_split_alone_and_label_the_suffix_alone(engine: Engine) -> None:
    trials = held_out(engine, prefix_tokens=5, most_tokens=40)
    table = engine.bank.documents().to_pylist()
    assert {trial.document for trial in trials} <= {row["id"] for row in table if row["split"] == "test"}
    for trial in trials:
        assert not trial.passage.labels[:5].any() and trial.passage.labels[5:].all()
        assert len(trial.passage) <= 40


def test_changing_the_suffix_does_not_change_the_mix(engine: Engine) -> None:
    trials = held_out(engine, prefix_tokens=5, most_tokens=40)
    changed = [
        replace(
            trial,
            passage=Passage(
                torch.cat([trial.passage.tokens[:5], trial.passage.tokens[5:].flip(0)]), trial.passage.labels
            ),
        )
        for trial in trials
    ]
    assert score_merged(engine, trials, nothing)[1] == score_merged(engine, changed, nothing)[1]


def test_the_base_scores_as_the_models_own_logits_say(engine: Engine) -> None:
    trials = held_out(engine, prefix_tokens=5, most_tokens=40)
    found = score_alone(engine, trials, None, nothing)
    for trial, total in zip(trials, found, strict=True):
        ids = trial.passage.tokens
        with torch.no_grad():
            logits = engine.model(ids[None]).logits[0].double().log_softmax(-1)
        expected = -sum(float(logits[place - 1, ids[place]]) for place in range(5, len(ids)))
        assert total == pytest.approx(expected, rel=1e-2)


def test_scoring_waits_for_the_model_as_every_answer_does(engine: Engine) -> None:
    trials = held_out(engine, prefix_tokens=5, most_tokens=40)
    with engine.merged(engine.route("boat")), pytest.raises(UsageError, match="half read"):
        score_alone(engine, trials, None, nothing)
    assert score_alone(engine, trials, None, nothing)


def test_an_expert_merged_alone_scores_as_that_adapter_beside_the_base(engine: Engine) -> None:
    trials = held_out(engine, prefix_tokens=5, most_tokens=40)[:2]
    expert = engine.bank.routable()[0].id
    beside = score_alone(engine, trials, engine.bank.adapter(expert), nothing)
    mix = replace(base_mix(engine.bank), experts=(expert,), weights=(1.0,))
    merged = [float(engine.token_nll(trial.passage, mix).sum()) for trial in trials]
    assert merged == pytest.approx(beside, rel=1e-2)


def test_progress_counts_up_to_all_trials(engine: Engine) -> None:
    trials: list[Trial] = held_out(engine, prefix_tokens=5, most_tokens=40)
    seen: list[int] = []
    score_merged(engine, trials, seen.append)
    assert seen == list(range(1, len(trials) + 1))


def test_a_prefix_longer_than_every_document_is_an_error_that_says_what_to_do(engine: Engine) -> None:
    with pytest.raises(CorpusError, match="shorter prefix"):
        held_out(engine, prefix_tokens=100_000, most_tokens=200_000)


def test_a_conversation_takes_loss_on_its_answers_and_routes_by_its_questions(
    tiny_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    records = [
        {"prompt": tiny.sentence(topic, number, 6), "completion": tiny.sentence(topic, number + 50, 4)}
        for topic in tiny.TOPICS
        for number in range(8)
    ]
    corpus = tmp_path / "talk.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    localmoe.build(corpus, tmp_path / "bank", tiny.tiny_config(tiny_base, tiny_encoder))
    engine = localmoe.open(tmp_path / "bank", str(tiny_base), str(tiny_encoder))
    cut = Cut(5, 5, 120)
    answers = {record["prompt"]: record["completion"] for record in records}
    trials = trials_of(engine, "test", cut)
    assert trials
    for trial in trials:
        assert trial.suffix == answers[trial.prefix]
        said = engine.tokenizer.decode(trial.passage.tokens[trial.passage.labels])
        assert said.startswith(trial.suffix) and trial.prefix not in said
        assert mutated(engine, trial, cut).prefix == trial.prefix
        read = engine.tokenizer.decode(query_tokens(trial, Cut(120, 120, 120)))
        assert trial.prefix in read and trial.suffix not in read
        assert len(query_tokens(trial, cut)) == 5
