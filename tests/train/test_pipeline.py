"""The build: a corpus in, a bank out; resumed, repeated, refused, and never mixed between access sets."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from building import Make, notes_of, write_folder

import localmoe
from localmoe.bank.manifest import Outcome
from localmoe.bank.store import Bank, verify
from localmoe.lora import attached
from localmoe.models import load_model
from localmoe.train import experts, training
from localmoe.train.course import DivergedError, Job, batches_of
from localmoe.train.progress import Event
from localmoe.train.training import train

# one build


def test_a_bank_is_whole_and_holds_every_document_and_expert(tiny_bank: Path) -> None:
    bank = Bank.open(tiny_bank)
    assert verify(bank) == []
    assert len(bank.manifest.experts) == 4
    documents = bank.documents().to_pylist()
    assert len(documents) == len(bank.embeddings()) == 60
    train_documents = [document for document in documents if document["split"] == "train"]
    for expert in bank.manifest.experts:
        members = [document for document in train_documents if document["expert"] == expert.id]
        assert len(members) == expert.documents > 0
        assert sum(document["tokens"] for document in members) == expert.tokens
    assert all((document["expert"] is not None) == (document["split"] == "train") for document in documents)
    assert bank.texts([documents[0]["id"]])[0].endswith(".")
    assert not (tiny_bank / "work").exists()


def test_no_absolute_path_is_anywhere_in_a_bank(tiny_bank: Path, tiny_base: Path, tiny_corpus: Path) -> None:
    for file in tiny_bank.rglob("*"):
        if file.is_file():
            for path in (tiny_base, tiny_corpus, tiny_bank):
                assert str(path).encode() not in file.read_bytes()


def test_every_number_of_the_manifest_is_that_of_an_oracle(tiny_bank: Path, tiny_base: Path) -> None:
    """The loss on tune documents, once more, from the texts in the bank and the model's own logits."""
    from transformers import AutoTokenizer

    bank, model = Bank.open(tiny_bank), load_model(str(tiny_base))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    trunk = bank.trunk()
    outcome = bank.manifest.trunk_outcome
    assert trunk is not None and outcome is not None
    tune = sorted(row["id"] for row in bank.documents().to_pylist() if row["split"] == "tune")[: outcome.documents]
    for adapter, expected in ((trunk, outcome.nll), ({}, outcome.reference_nll)):
        total, count = 0.0, 0
        for text in bank.texts(tune):
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
            with torch.no_grad(), attached(model, adapter):
                logits = model(ids).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        assert total / count == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("recipe", ["trunk", "trunk-shared", "paper"])
def test_every_recipe_builds_experts_that_peft_loads_with_our_logits(
    recipe: str, config: Make, tiny_corpus: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(train={"recipe": recipe}))
    assert (bank.trunk() is None) == (recipe == "paper")
    model, plain = load_model(str(tiny_base)), load_model(str(tiny_base))
    ids = tiny.passages(20)[0].tokens[None]
    for expert in bank.manifest.experts[:2]:
        assert expert.adapter is not None
        theirs = PeftModel.from_pretrained(plain, str(bank.path / expert.adapter.folder)).eval()
        with torch.no_grad(), attached(model, bank.adapter(expert.id)):
            torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        plain = theirs.unload()
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() < 1e-5


def test_experts_that_share_the_factors_of_the_trunk_are_merged_at_its_rank(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    from localmoe.merging import merge_adapters

    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(train={"recipe": "trunk-shared"}))
    trunk = bank.trunk()
    adapters = [bank.adapter(expert.id) for expert in bank.manifest.experts]
    assert trunk is not None
    for name in trunk:
        assert all(adapter[name].A is trunk[name].A for adapter in adapters)
        assert not torch.equal(adapters[0][name].B, adapters[1][name].B)
    merged = merge_adapters(adapters, [0.25] * len(adapters))
    assert {update.rank for update in merged.values()} == {4}  # type: ignore[union-attr]


def test_a_bank_opens_after_it_was_moved(tiny_bank: Path, tmp_path: Path, tiny_base: Path, tiny_encoder: Path) -> None:
    shutil.copytree(tiny_bank, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    bank = Bank.open(tmp_path / "second")
    assert verify(bank) == []
    engine = localmoe.open(tmp_path / "second")  # this machine remembers where base and encoder are
    assert engine.generate("boat sail").new_tokens > 0


# again, and after an interruption


def test_the_same_build_again_does_nothing_and_says_so(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").rglob("*") if file.is_file()}
    monkeypatch.setattr(training, "train", None)
    events: list[Event] = []
    second = localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=events.append)
    assert second.manifest == first.manifest
    assert "nothing to do" in events[-1].note
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").rglob("*") if file.is_file()}
    after.pop(tmp_path / "bank" / "build.lock"), files.pop(tmp_path / "bank" / "build.lock")
    assert after == files
    assert not (tmp_path / "bank" / "work").exists()


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_build_that_was_interrupted_goes_on_and_ends_with_the_same_bank(
    place: int, config: Make, tiny_corpus: Path, tiny_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = 0

    def stop(event: Event) -> None:
        nonlocal finished
        finished += event.stage == "experts" and event.note.startswith("e0")
        if finished > place:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=stop)
    assert not list((tmp_path / "bank").glob("manifest-*"))
    trained: list[str] = []
    write = experts.write_adapter

    def counted(bank: Path, name: str, *arguments: Any) -> Any:
        trained.append(name)
        return write(bank, name, *arguments)

    monkeypatch.setattr(experts, "write_adapter", counted)
    events: list[Event] = []
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=events.append)
    assert trained == [f"experts/e0{k}" for k in range(place + 1, 4)]
    assert f"{place + 1} of 4 experts are done" in notes_of(events, "experts")
    assert bank.manifest.digest == Bank.open(tiny_bank).manifest.digest


@pytest.mark.parametrize("recipe", ["trunk", "trunk-shared", "paper"])
def test_experts_trained_side_by_side_as_on_a_gpu_are_those_of_one_after_the_other(
    recipe: str, config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = localmoe.build(tiny_corpus, tmp_path / "one", config(train={"recipe": recipe}))
    monkeypatch.setattr(experts, "wave_size", lambda model: 3)
    monkeypatch.setattr(training, "places_for", lambda model, jobs: min(2, len(jobs)))
    together = localmoe.build(tiny_corpus, tmp_path / "two", config(train={"recipe": recipe}))
    assert len(together.manifest.experts) == 4
    for one, two in zip(one_by_one.manifest.experts, together.manifest.experts, strict=True):
        assert one.outcome.status == two.outcome.status
        assert one.outcome.nll == pytest.approx(two.outcome.nll, abs=1e-3)
        assert one.adapter is not None and two.adapter is not None
        assert one.adapter.training is not None and two.adapter.training is not None
        assert one.adapter.training.tokens == two.adapter.training.tokens


@pytest.mark.parametrize("step", [2, 8, 13])
def test_ctrl_c_in_the_middle_of_a_training_loses_that_training_alone(
    step: int, config: Make, tiny_corpus: Path, tiny_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = 0, training.loss

    def pressed(*arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "loss", pressed)
    with pytest.raises(KeyboardInterrupt):
        localmoe.build(tiny_corpus, tmp_path / "bank", config())
    monkeypatch.setattr(training, "loss", real)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert bank.manifest.digest == Bank.open(tiny_bank).manifest.digest


@pytest.mark.parametrize("stage", ["tokenize", "embed", "cluster", "trunk", "route"])
def test_an_exception_in_any_stage_is_survived(
    stage: str, config: Make, tiny_corpus: Path, tiny_bank: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.stage == stage:
            raise RuntimeError(stage)

    with pytest.raises(RuntimeError, match=stage):
        localmoe.build(tiny_corpus, tmp_path / "bank", config(), watch=stop)
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert bank.manifest.digest == Bank.open(tiny_bank).manifest.digest


def test_a_corpus_that_changed_gives_a_new_generation(config: Make, tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus", documents=4)
    first = localmoe.build(corpus, tmp_path / "bank", config(cluster={"clusters": 1}))
    (corpus / "more.txt").write_text(tiny.sentence("sky", 99), encoding="utf-8")
    second = localmoe.build(corpus, tmp_path / "bank", config(cluster={"clusters": 1}))
    assert (first.manifest.generation, second.manifest.generation) == (1, 2)
    assert second.manifest.corpus["documents"] == 17
    third = localmoe.build(corpus, tmp_path / "bank", config(cluster={"clusters": 1}, seed=1))
    assert third.manifest.generation == 3


def test_experts_from_another_map_are_the_same(
    config: Make, tiny_corpus: Path, tiny_bank: Path, tmp_path: Path
) -> None:
    def backwards(function: Callable[[Any], Any], tasks: list[Any]) -> list[Any]:
        return [function(task) for task in reversed(tasks)][::-1]

    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(), map=backwards)
    assert bank.manifest.digest == Bank.open(tiny_bank).manifest.digest


@pytest.mark.parametrize(("trunk_epochs", "some"), [(0.5, True), (1.0, False)])
def test_experts_read_first_what_a_trunk_of_less_than_one_pass_has_not_read(
    trunk_epochs: float, some: bool, config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def told(model: Any, asked: list[Job], *arguments: Any) -> Any:
        jobs.extend(asked)
        return training.train_all(model, asked, *arguments)

    monkeypatch.setattr(experts, "train_all", told)
    passes = {"trunk_epochs": trunk_epochs, "epochs": 0.25}
    localmoe.build(tiny_corpus, tmp_path / "bank", config(train=passes))
    trunk, *others = jobs
    read = {
        tuple(passage.tokens.tolist())
        for batch in batches_of(trunk.passages, trunk.config, trunk.seed, trunk.tokens)
        for passage in batch
    }
    assert any(job.read for job in others) == some
    if some:
        assert all(tuple(passage.tokens.tolist()) in read for job in others for passage in job.read)
        assert not any(tuple(passage.tokens.tolist()) in read for job in others for passage in job.passages)


# trainings that diverge


def _diverging(monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    rates: list[float] = []

    def unstable(*arguments: Any) -> Any:
        rates.append(arguments[4])
        if len(rates) <= times:
            raise DivergedError("the loss became nan")
        return train(*arguments)

    monkeypatch.setattr(training, "train", unstable)
    return rates


def test_the_trunk_falls_to_the_rate_at_which_the_experts_go_on_and_each_makes_its_own_passes(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float, float]] = []

    def told(model: Any, passages: Any, start: Any, given: Any, rate: float, seed: int, tokens: int, *more: Any) -> Any:
        asked.append((rate, round(tokens / sum(passage.predicted for passage in passages), 2), more[2]))
        return train(model, passages, start, given, rate, seed, tokens, *more)

    monkeypatch.setattr(training, "train", told)
    passes = {"learning_rate": 1e-2, "expert_rate": 0.2, "trunk_epochs": 2.0, "epochs": 1.0}
    localmoe.build(tiny_corpus, tmp_path / "bank", config(train=passes))
    assert asked[0] == (1e-2, 2.0, 0.2)
    assert len(asked) == 5 and set(asked[1:]) == {(0.2 * 1e-2, 1.0, 0.0)}
    localmoe.build(tiny_corpus, tmp_path / "other", config(train=passes | {"expert_rate": 1.0}))
    assert asked[5] == (1e-2, 2.0, 0.25)
    assert set(asked[6:]) == {(1e-2, 1.0, 0.0)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, [8, 1]), ({"expert_batch": 3}, [8, 3]), ({"recipe": "paper"}, [8])],
)
def test_experts_after_a_trunk_take_more_and_smaller_steps(
    config: Make,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    expected: list[int],
) -> None:
    batches: list[int] = []

    def told(model: Any, passages: Any, start: Any, given: Any, *more: Any) -> Any:
        batches.append(given.batch)
        return train(model, passages, start, given, *more)

    monkeypatch.setattr(training, "train", told)
    localmoe.build(tiny_corpus, tmp_path / "bank", config(train=asked))
    assert list(dict.fromkeys(batches)) == expected


def test_a_training_that_diverges_is_repeated_at_half_the_rate(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = _diverging(monkeypatch, times=1)
    corpus = write_folder(tmp_path / "corpus", [tiny.sentence("sea", n) for n in range(4)])
    bank = localmoe.build(corpus, tmp_path / "bank", config(cluster={"clusters": 1}, train={"recipe": "paper"}))
    assert rates == [0.01, 0.005]
    (expert,) = bank.manifest.experts
    assert expert.adapter is not None and expert.adapter.training is not None
    assert (expert.adapter.training.attempts, expert.adapter.training.learning_rate) == (2, 0.005)


@pytest.mark.parametrize(("losses", "rate", "status"), [((3.0, 1.0), 0.25, "good"), ((3.0, 4.0), 1.0, "harmful")])
def test_an_expert_that_is_worse_than_its_trunk_is_trained_once_more_and_the_better_one_is_kept(
    config: Make,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, float],
    rate: float,
    status: str,
) -> None:
    found = iter([Outcome("good", 9, 1.0, 2.0, None)])  # the trunk's

    def told(*_: Any) -> Outcome:
        nonlocal found
        value = next(found, None)
        if value is None:
            found = iter([_judged(nll) for nll in losses])
            value = next(found)
        return value

    monkeypatch.setattr(experts, "outcome", told)
    asked = config(cluster={"clusters": 1}, train={"learning_rate": 1e-2, "expert_rate": 1.0})
    (expert,) = localmoe.build(tiny_corpus, tmp_path / "bank", asked).manifest.experts
    assert expert.adapter is not None and expert.adapter.training is not None
    assert expert.outcome.status == status
    assert expert.adapter.training.learning_rate == pytest.approx(rate * 1e-2)
    assert expert.adapter.training.attempts == (2 if rate == 0.25 else 1)


def _judged(nll: float) -> Outcome:
    return Outcome("good" if nll < 2.0 else "harmful", 9, nll, 2.0, None)


def test_a_training_that_diverges_twice_is_a_failed_expert_that_is_not_routed(
    config: Make, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _diverging(monkeypatch, times=2)
    events: list[Event] = []
    settings = config(cluster={"clusters": 2}, train={"recipe": "paper"})
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", settings, watch=events.append)
    failed, other = bank.manifest.experts
    assert (failed.outcome.status, failed.outcome.reason, failed.adapter) == ("failed", "the loss became nan", None)
    assert other.adapter is not None
    assert bank.routable() == (other,)
    assert "e00 failed: the loss became nan" in notes_of(events, "experts")
    assert verify(bank) == []


def test_if_every_training_diverges_the_bank_opens_and_answers_as_the_base_does(
    config: Make, tmp_path: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    corpus = write_folder(tmp_path / "corpus", [tiny.sentence("sea", n) for n in range(4)])
    settings = config(cluster={"clusters": 1}, train={"learning_rate": 1e30})
    bank = localmoe.build(corpus, tmp_path / "bank", settings)
    assert bank.trunk() is None
    assert [expert.outcome.status for expert in bank.manifest.experts] == ["failed"]
    engine = localmoe.open(bank.path, str(tiny_base), str(tiny_encoder))
    assert engine.route("boat").experts == ()
    assert engine.generate("boat").mix.fallback is not None
