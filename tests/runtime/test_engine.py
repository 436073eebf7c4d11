"""The engine: mixes, answers and scores against transformers and PEFT, and base weights that stay as they are."""

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import localmoe
from localmoe.bank.store import Bank
from localmoe.config import ExecutionConfig, GenerateConfig, RouteConfig
from localmoe.errors import BankError, PromptError, UsageError
from localmoe.models import load_model
from localmoe.routing import Mix
from localmoe.runtime.engine import Engine, base_mix, open_engine

SHORT = GenerateConfig(max_new_tokens=16)
PROMPTS = [tiny.sentence(topic, 50, words=6) for topic in tiny.TOPICS]


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))


def _only(engine: Engine, expert: str) -> Mix:
    return Mix((expert,), (1.0,), "linear", engine.bank.manifest.digest, None)


def _greedy(model: Any, engine: Engine, prompt: str) -> str:
    ids = engine.tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    text: str = engine.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_mixes_are_the_same_every_time_and_depend_on_the_prompt(engine: Engine) -> None:
    mixes = [engine.route(prompt) for prompt in PROMPTS]
    assert mixes == [engine.route(prompt) for prompt in PROMPTS]
    assert len({mix.experts for mix in mixes}) > 1
    for mix in mixes:
        assert sum(mix.weights) == pytest.approx(1)
        assert mix.bank == engine.bank.manifest.digest


def test_a_conversation_is_routed_by_its_last_user_message_first(engine: Engine) -> None:
    turns = [
        {"role": "system", "content": tiny.sentence("law", 1)},
        {"role": "user", "content": "boat"},
        {"role": "assistant", "content": tiny.sentence("kitchen", 1)},
        {"role": "user", "content": PROMPTS[0]},
    ]
    assert engine.route(turns) == engine.route(f"{PROMPTS[0]}\n\nboat")


def test_the_generated_text_is_the_streamed_text(engine: Engine) -> None:
    for prompt in PROMPTS[:2]:
        answer = engine.generate(prompt, SHORT)
        assert answer.text == "".join(engine.stream(prompt, SHORT))
        assert answer.mix == engine.route(prompt)
        assert answer.prompt_tokens == len(engine.tokenizer(prompt)["input_ids"])
        assert 0 < answer.new_tokens <= 16
        assert 0 < answer.seconds.first_token <= answer.seconds.total


def test_a_batch_of_prompts_gets_the_answers_that_each_gets_alone(engine: Engine) -> None:
    prompts = [*PROMPTS, PROMPTS[0] + " boat", [{"role": "user", "content": PROMPTS[1]}]]
    for mixes in (None, [base_mix(engine.bank)] * 6, [_only(engine, "e01"), base_mix(engine.bank)] * 3):
        before = tiny.checksum(engine.model)
        answers = engine.generate_batch(prompts, SHORT, mixes)
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            mix = engine.route(prompt) if mixes is None else mixes[place]
            assert answer.mix == mix
            stream = engine.start(prompt, SHORT, mix)
            text = "".join(stream)
            alone = stream.answer(text)
            assert (answer.text, answer.new_tokens) == (text, alone.new_tokens)
            assert answer.prompt_tokens == alone.prompt_tokens
        assert tiny.checksum(engine.model) == before
    assert engine.generate_batch([], SHORT) == []
    with pytest.raises(UsageError, match="mixes"):
        engine.generate_batch(prompts, SHORT, [base_mix(engine.bank)])
    with pytest.raises(PromptError, match="empty"):
        engine.generate_batch(["boat", ""], SHORT)


@pytest.mark.parametrize("way", ["dense", "stacked", "grouped"])
def test_every_way_gives_the_same_answers(
    way: Any, engine: Engine, tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    other = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), execution=ExecutionConfig(execution=way))
    for prompt in PROMPTS[:2]:
        answer = other.generate(prompt, SHORT)
        assert answer.text == engine.generate(prompt, SHORT).text
        assert answer.choice is not None and {answer.choice.prefill, answer.choice.decode} == {way}
        assert other.score(prompt, " sail") == pytest.approx(engine.score(prompt, " sail"), abs=1e-4)


def test_the_mix_of_no_experts_is_the_base_model(engine: Engine, tiny_base: Path) -> None:
    plain = load_model(str(tiny_base))
    for prompt in PROMPTS:
        text = "".join(engine.start(prompt, SHORT, base_mix(engine.bank)))
        assert text == _greedy(plain, engine, prompt)


def test_the_mix_of_one_expert_is_peft_with_its_adapter(engine: Engine, tiny_base: Path) -> None:
    from peft import PeftModel

    differs = 0
    for expert in engine.bank.manifest.experts[:2]:
        assert expert.adapter is not None
        folder = engine.bank.path / expert.adapter.folder
        theirs = PeftModel.from_pretrained(load_model(str(tiny_base)), str(folder)).eval()
        for prompt in PROMPTS:
            text = "".join(engine.start(prompt, SHORT, _only(engine, expert.id)))
            assert text == _greedy(theirs, engine, prompt)
            differs += text != "".join(engine.start(prompt, SHORT, base_mix(engine.bank)))
    assert differs > 0


def test_an_empty_prompt_and_one_beyond_the_context_are_errors_at_once(engine: Engine) -> None:
    for prompt in ("", " \n", [{"role": "user", "content": " "}]):
        with pytest.raises(PromptError, match="empty"):
            engine.generate(prompt, SHORT)
        with pytest.raises(PromptError, match="empty"):
            engine.route(prompt)
    with pytest.raises(PromptError, match="context holds 128"):
        engine.start("boat " * 200, SHORT)


def test_a_score_is_the_mean_loss_of_the_suffix_under_the_mix_of_the_prefix(engine: Engine) -> None:
    prefix, suffix = PROMPTS[0], " sail rope mast star"
    head = engine.tokenizer(prefix)["input_ids"]
    tail = engine.tokenizer(suffix)["input_ids"]
    ids = torch.tensor([head + tail])
    for mix in (None, base_mix(engine.bank), _only(engine, "e02")):
        with engine.merged(engine.route(prefix) if mix is None else mix), torch.no_grad():
            logits = engine.model(ids).logits[0].double()
        expected = F.cross_entropy(logits[len(head) - 1 : -1], torch.tensor(tail))
        assert engine.score(prefix, suffix, mix) == pytest.approx(expected.item(), abs=1e-5)


def test_a_score_without_a_suffix_or_beyond_the_context_is_an_error(engine: Engine) -> None:
    for prefix, suffix in (("boat", ""), ("", "boat")):
        with pytest.raises(PromptError, match="nothing to score"):
            engine.score(prefix, suffix)
    with pytest.raises(PromptError, match="context holds 128"):
        engine.score("boat", "\n" * 128)


def test_the_nearest_documents_are_train_documents_in_falling_similarity(engine: Engine) -> None:
    found = engine.nearest(PROMPTS[1], 7)
    similarities = [neighbour.similarity for neighbour in found]
    assert len(found) == 7
    assert similarities == sorted(similarities, reverse=True)
    assert all(neighbour.source.startswith("kitchen/") for neighbour in found)
    documents = {row["id"]: row for row in engine.bank.documents().to_pylist()}
    vector = engine.encoder.encode([PROMPTS[1]])[0]
    for neighbour in found:
        assert documents[neighbour.id]["split"] == "train"
        assert documents[neighbour.id]["expert"] == neighbour.expert
        (text,) = engine.bank.texts([neighbour.id])
        assert neighbour.similarity == pytest.approx(float(engine.encoder.encode([text])[0] @ vector), abs=2e-3)
    train = sum(row["split"] == "train" for row in documents.values())
    assert len(engine.nearest(PROMPTS[1], 1000)) == train


def test_a_mix_of_another_bank_is_refused(engine: Engine) -> None:
    with pytest.raises(BankError, match="another bank"), engine.merged(Mix(("e00",), (1.0,), "linear", "else", None)):
        pass


def test_how_to_route_comes_from_the_bank_unless_it_is_given(
    engine: Engine, tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    record = engine.bank.manifest.router
    assert (engine.config.router, engine.config.beta, engine.config.tau) == (record.name, record.beta, record.tau)
    given = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), RouteConfig(router="nearest"))
    assert [len(given.route(prompt).experts) for prompt in PROMPTS] == [1] * 4
    same = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), RouteConfig(active=record.wanted, tau=record.tau))
    assert same.config == engine.config
    more = open_engine(tiny_bank, str(tiny_base), str(tiny_encoder), RouteConfig(active=4.0))
    assert more.config.beta is not None and more.config.beta > record.beta


# the base weights


def test_the_base_weights_are_the_same_after_exceptions_and_closed_streams(engine: Engine) -> None:
    before = tiny.checksum(engine.model)
    with pytest.raises(ZeroDivisionError), engine.merged(engine.route(PROMPTS[0])):
        raise ZeroDivisionError
    pieces = engine.stream(PROMPTS[0], GenerateConfig(max_new_tokens=60))
    next(iter(pieces))
    pieces.close()  # type: ignore[attr-defined]
    with pytest.raises(PromptError):
        engine.generate("")
    engine.score(PROMPTS[0], " sail")
    assert tiny.checksum(engine.model) == before
    assert "".join(engine.start(PROMPTS[1], SHORT, base_mix(engine.bank))) == _greedy(engine.model, engine, PROMPTS[1])


def test_a_thread_with_an_answer_half_read_gets_an_error_instead_of_waiting_for_itself(engine: Engine) -> None:
    half_read = engine.stream(PROMPTS[0], SHORT)
    begun = next(half_read)
    with pytest.raises(UsageError, match="half read"):
        engine.generate(PROMPTS[1], SHORT)
    with pytest.raises(UsageError, match="half read"):
        engine.score(PROMPTS[1], " sail")
    answers: list[str] = []
    other = threading.Thread(target=lambda: answers.append(engine.generate(PROMPTS[1], SHORT).text))
    other.start()
    whole = begun + "".join(half_read)
    other.join()
    assert whole == engine.generate(PROMPTS[0], SHORT).text
    assert answers == [engine.generate(PROMPTS[1], SHORT).text]


def test_two_engines_over_one_model_take_turns(engine: Engine) -> None:
    other = Engine(engine.bank, engine.model, engine.tokenizer, engine.encoder, engine.config)
    stream = engine.stream(PROMPTS[0], SHORT)
    next(stream)
    with pytest.raises(UsageError, match="half read"):
        other.generate(PROMPTS[1], SHORT)
    stream.close()  # type: ignore[attr-defined]
    assert other.generate(PROMPTS[1], SHORT).text == engine.generate(PROMPTS[1], SHORT).text


def test_prompts_of_two_threads_get_the_answers_that_they_get_alone(engine: Engine) -> None:
    before = tiny.checksum(engine.model)
    alone = {prompt: engine.generate(prompt, SHORT).text for prompt in PROMPTS}
    together: dict[tuple[int, str], str] = {}

    def ask(number: int) -> None:
        for prompt in PROMPTS if number else PROMPTS[::-1]:
            together[number, prompt] = "".join(engine.stream(prompt, SHORT))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {(number, prompt): alone[prompt] for number in range(2) for prompt in PROMPTS}
    assert tiny.checksum(engine.model) == before


def test_an_engine_opens_from_the_public_name(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> None:
    opened = localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))
    assert isinstance(opened, localmoe.Engine)
    assert opened.bank.manifest == Bank.open(tiny_bank).manifest
