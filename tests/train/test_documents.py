"""Documents: what a record must hold, the content id, the split."""

from __future__ import annotations

import pytest

from localmoe.config import CorpusConfig
from localmoe.errors import ConfigError, CorpusError
from localmoe.train.documents import Document, Message, NotRead, Record, content_id, document_of, split_of

CONFIG = CorpusConfig(access_field="who", tags_field="tags")


def document(**fields: object) -> Document:
    return document_of(Record("a.jsonl", "a.jsonl:1", fields), CONFIG, (), ())


def reason(**fields: object) -> str:
    with pytest.raises(NotRead) as skip:
        document(**fields)
    return skip.value.reason


def test_a_text_becomes_a_document_as_it_is():
    assert document(text=" a\r\nb ") == Document(content_id(" a\r\nb "), "a.jsonl:1", " a\r\nb ")


def test_prompt_and_completion_become_the_turns_of_user_and_assistant():
    found = document(prompt="Why?", completion="So.")
    assert found.messages == (Message("user", "Why?"), Message("assistant", "So."))
    assert found.text == ""
    assert (
        found.id == document(messages=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]).id
    )


def test_the_query_holds_user_turns_only_the_last_one_first():
    turns = [("system", "S"), ("user", "one"), ("assistant", "A"), ("user", "two"), ("assistant", "B")]
    found = document(messages=[{"role": role, "content": content} for role, content in turns])
    assert found.query == "two\n\none"
    assert found.content == "system: S\n\nuser: one\n\nassistant: A\n\nuser: two\n\nassistant: B"


def test_the_named_field_comes_before_messages_and_these_before_prompt_and_completion():
    chat = [{"role": "user", "content": "m"}, {"role": "assistant", "content": "n"}]
    assert document(text="t", messages=chat, prompt="p", completion="c").text == "t"
    assert document(text=None, messages=chat, prompt="p", completion="c").query == "m"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": " \n\t"}, "empty"),
        ({"text": None}, "empty"),
        ({"body": "b"}, "no_text"),
        ({"prompt": "p"}, "no_text"),
        ({"prompt": "p", "completion": " "}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}, "empty"),
        ({"text": 3}, "malformed"),
        ({"messages": "hello"}, "malformed"),
        ({"messages": ["hello"]}, "malformed"),
        ({"messages": [{"role": "human", "content": "hello"}]}, "malformed"),
        ({"messages": [{"role": ["user"], "content": "hello"}]}, "malformed"),
        ({"messages": [{"role": "user", "content": None}]}, "malformed"),
        ({"text": "a", "tags": 5}, "malformed"),
        ({"text": "a\0b"}, "binary"),
        ({"text": "half \ud83d pair"}, "undecodable"),
    ],
)
def test_a_record_without_a_document_says_why(fields, expected):
    assert reason(**fields) == expected


def test_s30_a_record_beyond_the_bound_is_too_large(monkeypatch):
    monkeypatch.setattr("localmoe.train.documents.MAX_DOCUMENT_BYTES", 10)
    assert document(text="x" * 10).text == "x" * 10
    assert reason(text="x" * 11) == "too_large"
    assert reason(prompt="x" * 6, completion="y" * 5) == "too_large"


@pytest.mark.parametrize("public", [{}, {"who": None}, {"who": []}])
def test_a_record_is_public_only_without_an_access_value(public):
    assert document(text="a", **public).access == ()


@pytest.mark.parametrize("value", [0, 7, False, 1.5, "", " ", {}, {"hr": True}, [None], [["hr"]], ["hr", 3], [""]])
def test_an_access_value_of_a_wrong_type_is_an_error_and_never_public(value):
    with pytest.raises(CorpusError, match=r"a\.jsonl:1.*'who'"):
        document(text="a", who=value)


def test_an_access_value_is_checked_even_where_the_record_holds_no_text():
    with pytest.raises(CorpusError):
        document(text="", who=7)


def test_access_and_tags_of_path_and_record_are_joined_and_sorted():
    record = Record("a", "a", {"text": "t", "who": ["z", "a", "z"], "tags": "late"})
    found = document_of(record, CONFIG, ("hr",), ("early", "late"))
    assert found.access == ("a", "hr", "z")
    assert found.tags == ("early", "late")


def test_the_content_id_depends_on_kind_and_content_alone():
    assert len(content_id("a")) == 16
    assert int(content_id("a"), 16) >= 0
    a, b = Message("user", "a"), Message("assistant", "b")
    ids = {
        content_id(""),
        content_id("a"),
        content_id("", (a,)),
        content_id("", (a, b)),
        content_id("", (b, a)),
    }
    ids.add(content_id("", (Message("user", "a\nassistant: b"),)))
    assert len(ids) == 6
    assert document(text="a", who="hr", tags=["x"]).id == content_id("a")


def test_content_ids_do_not_change_between_versions():
    assert content_id("a") == "8b8004f3e5273636"
    assert content_id("", (Message("user", "a"),)) == "b923de42ecee3ba9"


def test_split_fractions_are_honoured():
    n, config = 5000, CorpusConfig(tune_fraction=0.1, test_fraction=0.2)
    splits = [split_of(content_id(str(number)), 0, config) for number in range(n)]
    for name, share in (("test", 0.2), ("tune", 0.1), ("train", 0.7)):
        deviation = (n * share * (1 - share)) ** 0.5
        assert abs(splits.count(name) - n * share) < 4 * deviation


def test_a_split_depends_on_id_and_seed_and_nothing_else():
    config = CorpusConfig(tune_fraction=0.3, test_fraction=0.3)
    ids = [content_id(str(number)) for number in range(200)]
    first = {name: split_of(name, 1, config) for name in ids}
    assert {name: split_of(name, 1, config) for name in reversed(ids)} == first
    assert {name: split_of(name, 2, config) for name in ids} != first


def test_test_documents_stay_test_documents_when_the_tune_share_changes():
    ids = [content_id(str(number)) for number in range(300)]
    tests = [
        {name for name in ids if split_of(name, 0, CorpusConfig(tune_fraction=tune, test_fraction=0.2)) == "test"}
        for tune in (0.0, 0.05, 0.5)
    ]
    assert tests[0]
    assert tests[0] == tests[1] == tests[2]


def test_without_held_out_shares_everything_is_train():
    config = CorpusConfig(tune_fraction=0, test_fraction=0)
    assert {split_of(content_id(str(number)), 0, config) for number in range(100)} == {"train"}


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ConfigError, match="nothing to train on"):
        split_of(content_id("a"), 0, CorpusConfig(tune_fraction=0.5, test_fraction=0.5))
