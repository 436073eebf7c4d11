"""LocalMoE as a model of lm-evaluation-harness, against plain loops on the merged model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from localmoe.bank.adapters import write_adapter
from localmoe.bank.store import Bank
from localmoe.config import GenerateConfig, RouteConfig
from localmoe.errors import BankError, UnknownNameError, UsageError
from localmoe.evaluate.harness import LocalMoELM
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine, base_mix, open_engine

SEA, BREAD, SKY, LAW = (tiny.sentence(topic, 50, words=6) for topic in tiny.TOPICS)


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture
def lm(engine: Engine) -> LocalMoELM:
    return LocalMoELM(engine, route_on="context")


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "quiz") -> list[Any]:
    return [Instance(kind, {}, argument, 0, (task, number, 1)) for number, argument in enumerate(arguments)]


def by_hand(engine: Engine, mix: Mix, before: list[int], scored: list[int]) -> tuple[float, bool]:
    """Summed log-probability (fp64) of `scored` after `before`, in a forward of its own, and whether it is greedy."""
    with engine.merged(mix), torch.no_grad():
        logits = engine.model(torch.tensor([before + scored])).logits[0].double()
    rows = logits.log_softmax(-1)[len(before) - 1 : -1]
    return float(rows[range(len(scored)), scored].sum()), rows.argmax(-1).tolist() == scored


def test_a_loglikelihood_is_that_of_the_model_merged_for_the_context(engine: Engine, lm: LocalMoELM) -> None:
    pairs = [(f"{context} ", f"{end}") for context in (SEA, BREAD, LAW, SEA) for end in ("sail mast", "flour", "x")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs))
    assert len({engine.route(context) for context, _ in pairs}) == 3
    for (context, end), (logarithm, greedy) in zip(pairs, found, strict=True):
        before = engine.tokenizer(context.rstrip())["input_ids"]
        scored = engine.tokenizer(context + end)["input_ids"][len(before) :]
        expected, likeliest = by_hand(engine, engine.route(context), before, scored)
        assert logarithm == pytest.approx(expected, abs=2e-4)
        assert greedy == likeliest


def test_greedy_means_greedy_under_the_merged_model_and_not_under_the_base(engine: Engine) -> None:
    differs = 0
    for context in (SEA, BREAD, SKY, LAW):
        before = engine.tokenizer(context)["input_ids"]
        for mix, method in ((engine.route(context), "merged"), (base_mix(engine.bank), "base")):
            with engine.merged(mix), torch.no_grad():
                best = int(engine.model(torch.tensor([before])).logits[0, -1].argmax())
            end = engine.tokenizer.decode([best])
            if engine.tokenizer(context + end)["input_ids"] != [*before, best]:
                continue  # this token does not survive the way through text
            answers = [
                LocalMoELM(engine, route_on="context", method=which).loglikelihood(
                    asked("loglikelihood", (context, end))
                )
                for which in (method, "base" if method == "merged" else "merged")
            ]
            assert answers[0][0][1] is True
            differs += answers[1][0][1] is False
    assert differs > 0


def test_the_order_of_requests_is_kept_and_every_mix_is_merged_once(
    engine: Engine, lm: LocalMoELM, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[Mix] = []
    merged = Engine.merged

    @contextmanager
    def counted(self: Engine, mix: Mix) -> Iterator[Any]:
        merges.append(mix)
        with merged(self, mix) as times:
            yield times

    monkeypatch.setattr(Engine, "merged", counted)
    pairs = [(context, f" {end}") for end in ("tide", "oven", "moon") for context in (SEA, BREAD, SKY)]
    together = lm.loglikelihood(asked("loglikelihood", *pairs))
    assert sorted(merges, key=repr) == sorted({engine.route(context) for context, _ in pairs}, key=repr)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = lm.loglikelihood(asked("loglikelihood", pair))
        assert found == (pytest.approx(alone[0], abs=1e-4), alone[1])


def test_logits_are_never_shared_between_mixes_even_where_the_tokens_are_the_same(engine: Engine) -> None:
    """With equal tokens HFLM computes logits once a call: two questions in one text would get one answer."""

    class Asked:
        def doc_to_text(self, doc: dict[str, Any]) -> str:
            return str(doc["question"])

    lm = LocalMoELM(engine, route_on="question")
    lm.questions.know({"quiz": Asked()})
    requests = [Instance("loglikelihood", {"question": q}, ("boat", " oven"), 0, ("quiz", 0, 1)) for q in (SEA, BREAD)]
    found = lm.loglikelihood(requests)
    before = engine.tokenizer("boat")["input_ids"]
    scored = engine.tokenizer("boat oven")["input_ids"][len(before) :]
    expected = [by_hand(engine, engine.route(question), before, scored)[0] for question in (SEA, BREAD)]
    assert [logarithm for logarithm, _ in found] == pytest.approx(expected, abs=2e-4)
    assert abs(expected[0] - expected[1]) > 1e-2


@pytest.mark.parametrize("route_on", ["context", "last_block"])
def test_the_continuation_never_changes_the_mix(engine: Engine, route_on: str) -> None:
    mixes = []
    for end in (" sail", f" {BREAD}", f"\n\n{LAW}"):
        lm = LocalMoELM(engine, route_on=route_on)
        lm.loglikelihood(asked("loglikelihood", (SEA, end)))
        mixes.append([mix for _, mix in lm._used])
    assert mixes[0] == mixes[1] == mixes[2] == [engine.route(SEA)]


def test_few_shot_contexts_are_routed_by_the_last_block_or_by_all_of_it(engine: Engine) -> None:
    context = f"{BREAD}\n\n{LAW}\n\n{SEA}"
    for route_on, text in (("last_block", SEA), ("context", context)):
        lm = LocalMoELM(engine, route_on=route_on)
        lm.loglikelihood(asked("loglikelihood", (context, " sail")))
        assert [mix for _, mix in lm._used] == [engine.route(text)]
        assert lm.routing().route_on == route_on
    with pytest.raises(UnknownNameError, match="last_blok"):
        LocalMoELM(engine, route_on="last_blok")


def test_the_question_needs_the_tasks(engine: Engine) -> None:
    with pytest.raises(UsageError, match="'quiz' is not known"):
        LocalMoELM(engine, route_on="question").loglikelihood(asked("loglikelihood", (SEA, " sail")))


def test_choices_that_stand_in_the_contexts_share_one_mix(engine: Engine) -> None:
    class Winograd:
        def doc_to_text(self, doc: dict[str, Any]) -> int:
            return 1

        def doc_to_choice(self, doc: dict[str, Any]) -> list[str]:
            return [f"{SEA} boat", f"{SEA} bread", f"{SEA} booth"]

    lm = LocalMoELM(engine, route_on="question")
    lm.questions.know({"quiz": Winograd()})
    lm.loglikelihood(asked("loglikelihood", *((context, " tide") for context in Winograd().doc_to_choice({}))))
    assert {text for text, _ in lm._used} == {f"{SEA} b"}


def test_what_the_chat_template_adds_does_not_change_the_mix(engine: Engine) -> None:
    turns = [
        {"role": "system", "content": LAW},
        {"role": "user", "content": BREAD},
        {"role": "assistant", "content": SKY},
        {"role": "user", "content": SEA},
    ]
    for route_on, seen in (("last_block", SEA), ("context", turns)):
        lm = LocalMoELM(engine, route_on=route_on)
        context = lm.apply_chat_template(turns)
        assert context.endswith("<assistant>") and LAW in context
        lm.loglikelihood(asked("loglikelihood", (context, " sail")))
        assert [mix for _, mix in lm._used] == [engine.route(seen)]


def test_generation_is_the_engine_s(engine: Engine, lm: LocalMoELM) -> None:
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    found = lm.generate_until(asked("generate_until", *((context, settings) for context in (SEA, BREAD, SKY, SEA))))
    for context, text in zip((SEA, BREAD, SKY, SEA), found, strict=True):
        assert text == engine.generate(context, GenerateConfig(max_new_tokens=12)).text
    assert found[0] != found[1]


def test_a_whole_text_is_scored_by_the_base_up_to_the_prefix_and_by_its_mix_after_it(engine: Engine) -> None:
    lm = LocalMoELM(engine, prefix_tokens=10, max_length=48)
    texts = [SEA, "", "boat", " ".join(tiny.sentence("kitchen", n) for n in range(3))]
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    start = engine.tokenizer.bos_token_id if engine.tokenizer.bos_token_id is not None else lm.eot_token_id
    assert lm.prefix_token_id == start
    for text, total in zip(texts, found, strict=True):
        tokens = engine.tokenizer(text)["input_ids"]
        head, rest = tokens[:10], tokens[10:48]
        expected = by_hand(engine, base_mix(engine.bank), [start], head)[0] if head else 0.0
        mix = engine.route(engine.tokenizer.decode(head)) if head else base_mix(engine.bank)
        if rest:
            expected += by_hand(engine, mix, [start, *head], rest)[0]
        for first in range(48, len(tokens), 48):  # each later window has as much context as fits
            scored = tokens[first : first + 48]
            width = 48 + 1 - len(scored)
            expected += by_hand(engine, mix, tokens[first - width : first], scored)[0]
        assert total == pytest.approx(expected, abs=1e-3)
    assert len(engine.tokenizer(texts[3])["input_ids"]) > 96


def test_no_token_of_a_whole_text_is_scored_by_weights_that_it_chose(engine: Engine) -> None:
    lm = LocalMoELM(engine, prefix_tokens=6)
    lm.loglikelihood_rolling(asked("loglikelihood_rolling", (SEA,), (f"{SEA} {LAW}",)))
    assert len({mix for _, mix in lm._used}) == 1


def test_without_merging_it_is_the_base_model(engine: Engine) -> None:
    lm = LocalMoELM(engine, method="base")
    before = engine.tokenizer(SEA)["input_ids"]
    scored = engine.tokenizer(f"{SEA} oven")["input_ids"][len(before) :]
    ((logarithm, _),) = lm.loglikelihood(asked("loglikelihood", (SEA, " oven")))
    assert logarithm == pytest.approx(by_hand(engine, base_mix(engine.bank), before, scored)[0], abs=2e-4)
    assert lm.routing().active_max == 0 and lm.name == "base"


def test_the_trunk_answers_as_the_adapter_beside_the_base(engine: Engine, tmp_path: Path) -> None:
    trunk = engine.bank.trunk()
    assert trunk is not None
    theirs = tiny.peft_model(engine.model, trunk, tmp_path)
    lm = LocalMoELM(engine, method="trunk")
    before = engine.tokenizer(SEA)["input_ids"]
    scored = engine.tokenizer(f"{SEA} oven")["input_ids"][len(before) :]
    ((found, _),) = lm.loglikelihood(asked("loglikelihood", (SEA, " oven")))
    with torch.no_grad():
        rows = theirs(input_ids=torch.tensor([before + scored])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    assert found == pytest.approx(float(rows[range(len(scored)), scored].sum()), abs=1e-4)
    ((base, _),) = LocalMoELM(engine, method="base").loglikelihood(asked("loglikelihood", (SEA, " oven")))
    assert abs(found - base) > 1e-3


def test_an_adapter_answers_beside_the_base_and_has_a_cache_of_its_own(engine: Engine) -> None:
    record = engine.bank.manifest.trunk
    assert record is not None
    folder = engine.bank.path / record.folder
    lm, trunk = LocalMoELM(engine, method="adapter", adapter=folder), LocalMoELM(engine, method="trunk")
    requests = asked("loglikelihood", (SEA, " oven"))
    assert lm.loglikelihood(requests) == trunk.loglikelihood(requests)
    assert len({lm.mark, trunk.mark, LocalMoELM(engine, method="base").mark}) == 3
    assert lm.routing().route_on == "nothing"


def test_an_adapter_of_another_base_is_refused_before_anything_is_asked(engine: Engine, tmp_path: Path) -> None:
    other = write_adapter(tmp_path, "trunk", tiny.random_adapter(tiny.base("gpt2")), "gpt2", fan_in_fan_out=True)
    with pytest.raises(BankError, match="are not in the base model"):
        LocalMoELM(engine, method="adapter", adapter=tmp_path / other.folder)


def test_what_is_no_adapter_is_an_error_that_says_so(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        LocalMoELM(engine, method="adapter", adapter=tmp_path)
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        LocalMoELM(engine, method="adapter")


def test_an_empty_context_is_answered_by_the_base_and_counted(lm: LocalMoELM) -> None:
    lm.loglikelihood(asked("loglikelihood", ("", "boat"), (SEA, " boat")))
    routing = lm.routing()
    assert (routing.requests, routing.without_text, routing.mixes) == (2, 1, 2)
    assert routing.active_mean < routing.active_max


def test_the_base_weights_and_the_engine_s_tokenizer_stay_as_they_were(engine: Engine) -> None:
    before, padding = tiny.checksum(engine.model), engine.tokenizer.pad_token
    engine.tokenizer.pad_token = None
    try:
        lm = LocalMoELM(engine)
        lm.loglikelihood(asked("loglikelihood", (SEA, " oven")))
        assert engine.tokenizer.pad_token is None and lm.tokenizer.pad_token is not None
    finally:
        engine.tokenizer.pad_token = padding
    assert tiny.checksum(engine.model) == before


# --- whose answers they are ---------------------------------------------------------------------------------------


def test_the_mark_changes_with_whatever_changes_answers(
    engine: Engine, tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    def routed(**settings: Any) -> Engine:
        return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), RouteConfig(**settings))

    other = tiny.causal_model("llama", seed=5, **tiny.LLAMA)
    models = [
        LocalMoELM(engine),
        LocalMoELM(engine, method="base"),
        LocalMoELM(engine, method="trunk"),
        LocalMoELM(engine, route_on="context"),
        LocalMoELM(engine, prefix_tokens=7),
        LocalMoELM(engine, max_length=64),
        LocalMoELM(routed(beta=0.5)),
        LocalMoELM(routed(router="nearest")),
        LocalMoELM(Engine(engine.bank, engine.model, engine.tokenizer, engine.encoder, engine.config, True)),
        LocalMoELM(Engine(engine.bank, other, engine.tokenizer, engine.encoder, engine.config, True)),
    ]
    template = LocalMoELM(engine)
    template.tokenizer.chat_template = "{{ messages }}"
    assert len({lm.mark for lm in [*models, template]}) == len(models) + 1
    assert LocalMoELM(engine).mark == models[0].mark


def test_a_response_cache_of_another_configuration_is_refused(engine: Engine, tmp_path: Path) -> None:
    requests = asked("loglikelihood", (SEA, " sail"), (BREAD, " oven"))
    path = str(tmp_path / "answers.db")
    first = CachingLM(LocalMoELM(engine), path)
    found = first.loglikelihood(requests)
    again = LocalMoELM(engine)
    assert CachingLM(again, path).loglikelihood(requests) == found
    assert again.routing().requests == 0
    with pytest.raises(UsageError, match="another model, bank or routing"):
        CachingLM(LocalMoELM(engine, method="base"), path)


def test_the_harness_finds_it_by_name_beside_its_own_models(
    tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    found = get_model("localmoe")
    assert found is LocalMoELM and get_model("hf") is not None
    text = f"bank={tiny_bank},base={tiny_base},encoder={tiny_encoder},beta=0,route_on=context"
    lm = found.create_from_arg_string(text, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    assert lm.engine.config.beta == 0 and lm.engine.bank.manifest == Bank.open(tiny_bank).manifest
    info = lm.get_model_info()["localmoe"]
    assert info["bank"] == lm.engine.bank.manifest.digest and info["route_on"] == "context"


def test_arguments_that_cannot_be_are_errors(engine: Engine, tiny_bank: Path) -> None:
    with pytest.raises(UsageError, match="leave the device out"):
        LocalMoELM(engine, device="mps")
    with pytest.raises(UsageError, match="beta"):
        LocalMoELM(engine, beta=0.1)
    with pytest.raises(UnknownNameError, match="'trunck', did you mean 'trunk'"):
        LocalMoELM(engine, method="trunck")
    with pytest.raises(UsageError, match="pretrained"):
        LocalMoELM(tiny_bank, pretrained="x")
