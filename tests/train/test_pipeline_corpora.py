"""Tests of whole builds of odd corpora: access sets, few documents, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from building import Make, notes_of, write_folder, write_records

import localmoe
from localmoe.bank.store import Bank, verify
from localmoe.config import ClusterConfig
from localmoe.errors import BankError, ConfigError, CorpusError, TemporaryError, UnknownNameError, UsageError
from localmoe.train.plan import plan
from localmoe.train.progress import Event

# access


def _restricted(file: Path, public: bool = True) -> Path:
    sets: list[list[str]] = [["hr"], ["hr", "law"], ["law"]]
    if public:
        sets.append([])
    records = [
        {"text": f"{tiny.sentence(topic, number)} {place}", "who": names}
        for place, names in enumerate(sets)
        for topic in ("sea", "law")
        for number in range(6)
    ]
    return write_records(file, records)


def test_no_expert_has_documents_of_two_access_sets(config: Make, tmp_path: Path) -> None:
    corpus = _restricted(tmp_path / "corpus.jsonl")
    bank = localmoe.build(corpus, tmp_path / "bank", config(corpus={"access_field": "who"}, cluster={"clusters": 8}))
    access = {expert.id: expert.access for expert in bank.manifest.experts}
    assert set(access.values()) == {(), ("hr",), ("hr", "law"), ("law",)}
    for document in bank.documents().to_pylist():
        if document["expert"] is not None:
            assert access[document["expert"]] == tuple(document["access"])


def test_the_trunk_and_beta_depend_on_public_documents_alone(config: Make, tmp_path: Path) -> None:
    settings = config(corpus={"access_field": "who"}, cluster={"clusters": 4})
    corpus = _restricted(tmp_path / "corpus.jsonl")
    first = localmoe.build(corpus, tmp_path / "first", settings).manifest
    lines = corpus.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["who"]:
            record["text"] += " secret"
    second = localmoe.build(write_records(corpus, records), tmp_path / "second", settings).manifest
    assert first.trunk is not None and second.trunk is not None
    assert first.trunk.sha256 == second.trunk.sha256
    assert first.trunk_outcome == second.trunk_outcome
    assert first.router == second.router
    public = [[expert.adapter for expert in m.experts if not expert.access] for m in (first, second)]
    assert public[0] == public[1]
    assert {e.adapter for e in first.experts} != {e.adapter for e in second.experts}


def test_without_public_documents_there_is_no_trunk_and_it_says_so(config: Make, tmp_path: Path) -> None:
    corpus = _restricted(tmp_path / "corpus.jsonl", public=False)
    events: list[Event] = []
    settings = config(corpus={"access_field": "who"}, cluster={"clusters": 3})
    bank = localmoe.build(corpus, tmp_path / "bank", settings, watch=events.append)
    assert bank.trunk() is None
    assert "no document is public" in notes_of(events, "trunk")
    assert all(expert.access and expert.adapter is not None for expert in bank.manifest.experts)
    shared = dataclasses.replace(settings, train=dataclasses.replace(settings.train, recipe="trunk-shared"))
    with pytest.raises(ConfigError, match="needs public documents"):
        localmoe.build(corpus, tmp_path / "other", shared)
    assert not list((tmp_path / "other").rglob("embeddings*"))  # it is said before anything is spent
    with pytest.raises(ConfigError, match="needs public documents"):
        plan(corpus, shared, probe=False)


# small and odd corpora


@pytest.mark.parametrize(
    ("texts", "experts_expected"),
    [([tiny.sentence("sea", 0)], 1), ([tiny.sentence("sea", n) for n in range(2)], 2), (["boat sail"] * 5, 1)],
    ids=["one", "fewer-than-clusters", "all-identical"],
)
def test_a_small_corpus_has_fewer_experts_and_says_why(
    texts: list[str], experts_expected: int, config: Make, tmp_path: Path
) -> None:
    corpus = write_folder(tmp_path / "corpus", texts)
    events: list[Event] = []
    settings = config(cluster={"min_tokens": 0}, corpus={"tune_fraction": 0.0, "test_fraction": 0.0})
    bank = localmoe.build(corpus, tmp_path / "bank", settings, watch=events.append)
    assert len(bank.manifest.experts) == experts_expected
    assert f"{experts_expected} clusters instead of 4: there are no more" in notes_of(events, "cluster")
    assert all(expert.outcome.status == "unchecked" for expert in bank.manifest.experts)
    assert "was not tuned" in notes_of(events, "route")
    assert verify(bank) == []


def test_clusters_that_would_be_too_small_are_refused_and_it_says_so(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    settings = config(cluster={"clusters": 9, "min_tokens": 600})
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", settings, watch=events.append)
    count = len(bank.manifest.experts)
    assert 1 < count < 9
    assert all(expert.tokens >= 600 for expert in bank.manifest.experts)
    assert f"{count} clusters instead of 9: " in notes_of(events, "cluster")
    assert "cluster.min_tokens" in notes_of(events, "cluster")


def test_a_row_group_that_ends_with_the_last_document_is_no_obstacle(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localmoe.bank import files

    monkeypatch.setattr(files, "_ROWS", 3)
    corpus = write_folder(tmp_path / "corpus", [tiny.sentence("sea", n) for n in range(6)])
    bank = localmoe.build(corpus, tmp_path / "bank", config(cluster={"clusters": 1}))
    assert len(bank.embeddings()) == 6
    assert sorted(bank.texts(bank.documents()["id"].to_pylist())) == sorted(tiny.sentence("sea", n) for n in range(6))


def test_a_bank_inside_its_own_corpus_is_not_read(config: Make, tmp_path: Path) -> None:
    corpus = write_folder(tmp_path / "corpus", [tiny.sentence("sea", n) for n in range(6)])
    first = localmoe.build(corpus, corpus / "bank", config(cluster={"clusters": 1}))
    events: list[Event] = []
    second = localmoe.build(corpus, corpus / "bank", config(cluster={"clusters": 1}), watch=events.append)
    assert len(first.documents()) == 6
    assert second.manifest == first.manifest
    assert "nothing to do" in events[-1].note


def test_chat_records_are_trained_on_answers_only(config: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chats = [{"prompt": tiny.sentence("sea", n), "completion": "Aye " * n + "captain"} for n in range(1, 7)]
    settings = config(
        cluster={"clusters": 1},
        corpus={"tune_fraction": 0.0, "test_fraction": 0.0, "passage_tokens": 128},
        train={"epochs": 1.0},
    )
    bank = localmoe.build(write_records(tmp_path / "chats.jsonl", chats), tmp_path / "bank", settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    answers = sum(len(tokenizer(chat["completion"] + "<|end|>")["input_ids"]) for chat in chats)
    (expert,) = bank.manifest.experts
    assert expert.adapter is not None and expert.adapter.training is not None
    assert expert.adapter.training.tokens == answers < expert.tokens


def test_without_keep_texts_no_text_is_in_the_bank(config: Make, tiny_corpus: Path, tmp_path: Path) -> None:
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config(keep_texts=False))
    assert "texts" not in bank.manifest.files
    with pytest.raises(UsageError, match="keeps no texts"):
        bank.texts([bank.documents()["id"][0].as_py()])
    # file by file: neither a whole text nor a work folder is left
    sample = tiny.sentence("sea", 0).encode()
    assert not any(sample in file.read_bytes() for file in bank.path.rglob("*") if file.is_file())
    assert not (bank.path / "work").exists()


# refused


def test_passages_longer_than_the_context_are_refused(config: Make, tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context of 128") as caught:
        localmoe.build(tiny_corpus, tmp_path / "bank", config(corpus={"passage_tokens": 129}))
    assert "corpus.passage_tokens=128" in caught.value.remedy
    with pytest.raises(ConfigError, match="context of 128"):
        plan(tiny_corpus, config(corpus={"passage_tokens": 129}), probe=False)


def test_an_unknown_router_is_refused_before_anything_is_spent(config: Make, tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nearest'"):
        localmoe.build(tiny_corpus, tmp_path / "bank", config(route={"router": "nearst"}))
    assert not (tmp_path / "bank" / "work").exists()


def test_an_empty_corpus_is_refused_and_leaves_no_documents(config: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="0 documents"):
        localmoe.build(tmp_path / "empty", tmp_path / "bank", config())
    assert not list((tmp_path / "bank" / "work").iterdir())


def test_a_folder_that_holds_other_things_and_a_file_are_refused(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        localmoe.build(tiny_corpus, home, config())
    assert [file.name for file in home.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        localmoe.build(tiny_corpus, home / "thesis.tex", config())


def test_a_full_disk_is_a_temporary_error_and_the_same_command_goes_on(
    config: Make, tiny_corpus: Path, tiny_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
        with pytest.raises(TemporaryError, match="are free"):
            localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert shutil.disk_usage is usage
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", config())
    assert bank.manifest.digest == Bank.open(tiny_bank).manifest.digest


def test_a_bank_opens_with_its_own_base_and_encoder_alone(
    tiny_bank: Path, tiny_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    for name, settings, seed in (("wider", {"intermediate_size": 64}, 0), ("other", {}, 1)):
        tiny.causal_model("llama", seed, **tiny.LLAMA | settings).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(BankError, match="another architecture"):
        localmoe.open(tiny_bank, str(tmp_path / "wider"), str(tiny_encoder))
    with pytest.raises(BankError, match="other weights") as caught:
        localmoe.open(tiny_bank, str(tmp_path / "other"), str(tiny_encoder))
    assert "--base-variant" in caught.value.remedy
    variant = localmoe.open(tiny_bank, str(tmp_path / "other"), str(tiny_encoder), base_variant=True)
    own = localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder), base_variant=True)
    assert variant.generate("boat").base_variant and not own.generate("boat").base_variant
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    settings_file = tmp_path / "encoder" / "sentence_bert_config.json"
    settings = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(settings | {"max_seq_length": 16}))
    with pytest.raises(BankError, match="encoder"):
        localmoe.open(tiny_bank, str(tiny_base), str(tmp_path / "encoder"))


def test_a_build_with_clusters_of_its_own_choice_takes_as_many_as_the_tokens_allow(
    config: Make, tiny_corpus: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(config(), cluster=ClusterConfig(clusters=None, min_tokens=500))
    bank = localmoe.build(tiny_corpus, tmp_path / "bank", settings)
    tokens = sum(expert.tokens for expert in bank.manifest.experts)
    assert 1 < len(bank.manifest.experts) <= tokens // 1000
