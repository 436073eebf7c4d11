"""Quantised bases: experts run beside the weights; what cannot be is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import localmoe
from localmoe.config import ExecutionConfig, GenerateConfig
from localmoe.errors import BankError, UsageError
from localmoe.identity import fingerprint
from localmoe.models import check_linears, load_model
from localmoe.quantisation import KINDS, quantise
from localmoe.runtime.engine import base_mix, open_engine
from localmoe.runtime.execution import Choice

FORMATS = ("torchao int8", "bitsandbytes int8", "bitsandbytes nf4", "bitsandbytes nf4 twice")
PROMPT = tiny.sentence("sea", 50, words=6)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, of width 64."""
    folder = tmp_path_factory.mktemp("models") / "wide-base"
    tiny.causal_model("llama", **tiny.WIDE).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_bank(wide_base: Path, tiny_encoder: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank on the wide base."""
    bank = tmp_path_factory.mktemp("banks") / "bank"
    return localmoe.build(tiny_corpus, bank, tiny.tiny_config(wide_base, tiny_encoder)).path


def quantised_folder(base: Path, kind: str, folder: Path) -> Path:
    """A folder of the base as a library quantises and saves it, with its tokenizer."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    configs: dict[str, Any] = {
        "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
        "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes nf4 twice": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=configs[kind](), dtype=torch.bfloat16)
    shutil.copytree(base, folder, ignore=lambda _folder, names: [n for n in names if n.endswith(".safetensors")])
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_quantised_where_it_is_opened_and_answers_say_so(
    kind: str, wide_bank: Path, wide_base: Path, tiny_encoder: Path
) -> None:
    engine = open_engine(wide_bank, str(wide_base), str(tiny_encoder), quantised=kind)
    plain = open_engine(wide_bank, str(wide_base), str(tiny_encoder))
    answer = engine.generate(PROMPT, GenerateConfig(max_new_tokens=4))
    assert answer.base_variant and answer.choice == Choice("stacked", "stacked")
    assert [a.text for a in engine.generate_batch([PROMPT], GenerateConfig(max_new_tokens=4))] == [answer.text]
    for chosen in (base_mix(engine.bank), engine.route(PROMPT)):
        scores = [each.score(PROMPT, " sail", chosen) for each in (engine, plain)]
        assert scores[0] != scores[1]
        assert scores[0] == pytest.approx(scores[1], abs=0.05 if kind == "int8" else 0.5)
    dense = open_engine(
        wide_bank, str(wide_base), str(tiny_encoder), execution=ExecutionConfig(execution="dense"), quantised=kind
    )
    with pytest.raises(UsageError, match="cannot be merged into"):
        dense.generate(PROMPT)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bank_runs_on_its_base_as_it_was_quantised_in_a_folder(
    kind: str, wide_bank: Path, wide_base: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = quantised_folder(wide_base, kind, tmp_path / "quantised")
    with pytest.raises(BankError, match="other weights") as caught:
        open_engine(wide_bank, str(folder), str(tiny_encoder))
    assert "--base-variant" in caught.value.remedy
    engine = open_engine(wide_bank, str(folder), str(tiny_encoder), base_variant=True)
    plain = open_engine(wide_bank, str(wide_base), str(tiny_encoder))
    answer = engine.generate(PROMPT, GenerateConfig(max_new_tokens=4))
    assert answer.base_variant and answer.choice == Choice("stacked", "stacked")
    for chosen in (base_mix(engine.bank), engine.route(PROMPT)):
        scores = [each.score(PROMPT, " sail", chosen) for each in (engine, plain)]
        assert scores[0] != scores[1]
        assert scores[0] == pytest.approx(scores[1], abs=0.5 if "nf4" in kind else 0.1)
    assert fingerprint(engine.model) == fingerprint(load_model(str(folder)))  # whatever ran on it
    assert fingerprint(engine.model).architecture == fingerprint(plain.model).architecture
    chosen = ExecutionConfig(execution="dense")
    dense = open_engine(wide_bank, str(folder), str(tiny_encoder), base_variant=True, execution=chosen)
    with pytest.raises(UsageError, match="cannot be merged into"):
        dense.generate(PROMPT)
    with pytest.raises(UsageError, match="quantised already"):
        open_engine(wide_bank, str(folder), str(tiny_encoder), base_variant=True, quantised="int8")


def test_a_bank_is_built_on_a_folder_of_torchao_and_refused_on_one_of_bitsandbytes(
    tiny_base: Path, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    base = quantised_folder(tiny_base, "torchao int8", tmp_path / "torchao")
    for recipe in ("trunk", "joint"):
        config = tiny.tiny_config(base, tiny_encoder, recipe=recipe)
        bank = localmoe.build(tiny_corpus, tmp_path / recipe, config)
        engine = open_engine(bank.path, str(base), str(tiny_encoder))
        assert not engine.generate(PROMPT, GenerateConfig(max_new_tokens=2)).base_variant
        assert engine.score(PROMPT, " sail") < engine.score(PROMPT, " sail", base_mix(engine.bank)) - 0.5  # nats
    other = quantised_folder(tiny_base, "bitsandbytes int8", tmp_path / "bitsandbytes")
    with pytest.raises(UsageError, match="Linear8bitLt") as caught:
        localmoe.build(tiny_corpus, tmp_path / "bank", tiny.tiny_config(other, tiny_encoder))
    assert "--base-variant" in caught.value.remedy


def test_a_folder_that_cannot_be_loaded_says_which_package_is_missing(
    wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised_folder(wide_base, "bitsandbytes nf4", tmp_path / "quantised")
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match="requires bitsandbytes") as caught:
        load_model(str(folder))
    assert caught.value.remedy == "pip install 'localmoe[nf4]'"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UsageError, match="GPTQ") as caught:
        load_model(str(folder))
    assert "--quantised int8" in caught.value.remedy


def test_rows_that_bitsandbytes_reads_wrongly_are_refused_or_left_as_they_are(tiny_base: Path, tmp_path: Path) -> None:
    folder = quantised_folder(tiny_base, "bitsandbytes nf4", tmp_path / "quantised")
    with pytest.raises(UsageError, match="no multiple of 64"):
        load_model(str(folder))
    with pytest.raises(UsageError, match="multiple of 64"):
        quantise(load_model(str(tiny_base)), "nf4")
    model = tiny.causal_model("llama", **(tiny.WIDE | {"intermediate_size": 80}))  # down_proj has rows of 80
    before = [layer.mlp.down_proj.weight.clone() for layer in model.model.layers]
    quantise(model, "nf4")
    for layer, weight in zip(model.model.layers, before, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, weight) and not layer.mlp.up_proj.weight.is_floating_point()


def test_linears_of_another_library_are_refused() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    check_linears(model, "here")
    odd = torch.nn.Module()
    odd.in_features = odd.out_features = 32  # type: ignore[assignment]
    model.model.layers[0].self_attn.q_proj = odd
    with pytest.raises(UsageError, match=r"'here' is quantised, and model\.layers\.0\.self_attn\.q_proj is a Module"):
        check_linears(model, "here")


def test_what_cannot_be_quantised_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    with pytest.raises(UsageError, match="int3"):
        quantise(model, "int3")
    found = importlib.util.find_spec
    for kind, package in (("int8", "torchao"), ("int4", "torchao"), ("nf4", "bitsandbytes")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else found(name))
            with pytest.raises(UsageError, match=package):
                quantise(model, kind)
        with pytest.raises(UsageError, match="Conv1D"):
            quantise(tiny.base("gpt2"), kind)
    with pytest.raises(UsageError, match="on a processor alone"):
        quantise(tiny.causal_model("llama", **tiny.LLAMA).to("meta"), "int4")
