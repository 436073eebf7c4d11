"""Quantised bases: experts run beside the weights; what cannot be is refused."""

import importlib.util
from pathlib import Path

import pytest
import tiny

from localmoe.config import ExecutionConfig, GenerateConfig
from localmoe.errors import UsageError
from localmoe.quantisation import quantise
from localmoe.runtime.engine import base_mix, open_engine
from localmoe.runtime.execution import Choice


def test_a_base_is_quantised_where_it_is_opened_and_answers_say_so(
    tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    pytest.importorskip("torchao")
    engine = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), quantised="int8")
    plain = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))
    prompt = tiny.sentence("sea", 50, words=6)
    answer = engine.generate(prompt, GenerateConfig(max_new_tokens=4))
    assert answer.base_variant and answer.choice == Choice("stacked", "stacked")
    assert [a.text for a in engine.generate_batch([prompt], GenerateConfig(max_new_tokens=4))] == [answer.text]
    for chosen in (base_mix(engine.bank), engine.route(prompt)):
        scores = [each.score(prompt, " sail", chosen) for each in (engine, plain)]
        assert scores[0] != scores[1]
        assert scores[0] == pytest.approx(scores[1], abs=0.05)
    dense = open_engine(
        tiny_bank, str(tiny_base), str(tiny_encoder), execution=ExecutionConfig(execution="dense"), quantised="int8"
    )
    with pytest.raises(UsageError, match="cannot be merged into"):
        dense.generate(prompt)


def test_what_cannot_be_quantised_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    with pytest.raises(UsageError, match="int3"):
        quantise(model, "int3")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(UsageError, match="torchao"):
        quantise(model, "int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="Conv1D"):
        quantise(tiny.base("gpt2"), "int8")
