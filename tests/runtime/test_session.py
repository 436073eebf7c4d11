"""Sessions: earlier turns are read once under one mix, again under another, and the answers are the same."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny

import localmoe
from localmoe.config import GenerateConfig
from localmoe.errors import PromptError
from localmoe.runtime.engine import Engine
from localmoe.runtime.execution.cache import ExpertCache

SHORT = GenerateConfig(max_new_tokens=6)
MESSAGES = [tiny.sentence("sea", 1, 4), tiny.sentence("kitchen", 2, 4), tiny.sentence("sea", 3, 4)]


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return localmoe.open(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.mark.parametrize("sticky", [True, False])
def test_a_session_answers_as_the_whole_conversation_read_anew(engine: Engine, sticky: bool) -> None:
    session = engine.session(SHORT, sticky)
    turns: list[dict[str, str]] = []
    mixes = []
    for message in MESSAGES:
        said = "".join(session.say(message))
        turns.append({"role": "user", "content": message})
        mix = mixes[0] if sticky and mixes else engine.route(turns)
        mixes.append(mix)
        alone = engine.start(turns, SHORT, mix)
        assert said == "".join(alone)
        assert session.mix == mix
        turns.append({"role": "assistant", "content": said})
    assert session.turns == turns
    assert (len(set(mixes)) == 1) is sticky  # the topics' mixes differ, so a session that routes anew changes it


def test_under_one_mix_earlier_turns_are_not_read_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = engine.model.forward

    def watched(*arguments: object, **named: object) -> object:
        ids = named.get("input_ids")
        read.append(ids.shape[1])  # type: ignore[union-attr]
        return forward(*arguments, **named)

    session = engine.session(SHORT, sticky=True)
    "".join(session.say(MESSAGES[0]))
    monkeypatch.setattr(engine.model, "forward", watched)
    "".join(session.say(MESSAGES[1]))
    whole = len(engine.tokenizer.apply_chat_template(session.turns[:3], add_generation_prompt=True)["input_ids"])
    assert 0 < max(read) < whole


def test_after_a_turn_the_experts_next_to_its_mix_are_loaded_and_no_others_wait_for_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    future: Future[None] = Future()
    monkeypatch.setattr(engine, "prefetch", lambda experts: asked.append(list(experts)) or future)
    session = engine.session(SHORT)
    "".join(session.say(MESSAGES[0]))
    assert session.mix is not None
    near = engine.router.nearest_experts(engine.router.embed(MESSAGES[0]), 2 * len(session.mix.experts))
    assert len(asked) == 1 and set(asked[0]) == set(near) - set(session.mix.experts)
    assert set(near) >= set(session.mix.experts)
    session.begin(MESSAGES[1])
    assert future.cancelled()
    other = engine.session(SHORT)
    future = Future()
    "".join(other.say(MESSAGES[0]))
    other.reset()
    assert future.cancelled() and len(asked) == 2
    asked.pop()
    sticky = engine.session(SHORT, sticky=True)
    for message in MESSAGES[:2]:
        "".join(sticky.say(message))
    assert len(asked) == 1  # the mix stays: there is nothing to come
    monkeypatch.setattr(engine.executor.host, "limit", engine.executor.host.bytes)
    "".join(session.say(MESSAGES[0]))
    assert len(asked) == 1  # they would take the place of those in use
    monkeypatch.setattr(engine.executor, "host", ExpertCache(0))
    "".join(session.say(MESSAGES[0]))
    assert len(asked) == 1  # nothing is kept


def test_an_answer_that_breaks_leaves_the_conversation_as_it_was_and_a_closed_one_stays(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session(SHORT, sticky=True)
    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            "".join(session.say(MESSAGES[0]))
    assert session.turns == [] and session.mix is None
    pieces = session.say(MESSAGES[0])
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert [turn["content"] for turn in session.turns] == [MESSAGES[0], first]


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    session = engine.session(SHORT, sticky=True)
    "".join(session.say(MESSAGES[0]))
    before = list(session.turns)
    with pytest.raises(PromptError):
        session.begin(tiny.sentence("law", 1, 200))
    assert session.turns == before
    session.reset()
    assert session.turns == [] and session.mix is None
