"""Errors: exit codes, what they print, and suggestions."""

from __future__ import annotations

import pytest

from localmoe import errors
from localmoe.errors import LocalMoEError, UnknownNameError, UsageError, did_you_mean

EXIT_CODES = {
    "LocalMoEError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "CorpusError": 2,
    "UnknownNameError": 2,
    "PromptError": 2,
    "PartialError": 3,
    "BankError": 4,
    "LockedError": 5,
    "TemporaryError": 75,
}


def all_errors() -> dict[str, type[LocalMoEError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, LocalMoEError)
    }


def test_every_error_has_the_exit_code_that_is_documented() -> None:
    assert {name: error.exit_code for name, error in all_errors().items()} == EXIT_CODES


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert [name for name in all_errors() if name not in errors.__doc__] == []


def test_usage_errors_are_the_ones_of_exit_code_two() -> None:
    assert {name for name, error in all_errors().items() if issubclass(error, UsageError)} == {
        name for name, code in EXIT_CODES.items() if code == 2
    }


@pytest.mark.parametrize("error", [one for one in all_errors().values() if one is not UnknownNameError])
def test_every_error_prints_what_was_wrong_and_then_the_remedy(error: type[LocalMoEError]) -> None:
    raised = error("the disk is full", "free some space")
    assert str(raised) == "the disk is full\nfree some space"
    assert (raised.what, raised.remedy) == ("the disk is full", "free some space")
    assert str(error("the disk is full")) == "the disk is full"


def test_an_unknown_name_prints_as_a_sentence_and_not_as_a_key_error() -> None:
    error = UnknownNameError("router", "nearst", ["uniform", "nearest"])
    assert str(error) == "unknown router 'nearst', did you mean 'nearest'?\nknown: nearest, uniform"
    assert isinstance(error, KeyError)


def test_an_unknown_name_far_from_all_others_is_given_no_suggestion() -> None:
    assert str(UnknownNameError("router", "qqq", ["nearest"])) == "unknown router 'qqq'\nknown: nearest"


def test_an_unknown_name_may_bring_its_own_remedy() -> None:
    assert str(UnknownNameError("expert", "e9", [], "localmoe status")) == "unknown expert 'e9'\nlocalmoe status"


@pytest.mark.parametrize(("name", "suggestion"), [("rnak", ", did you mean 'rank'?"), ("zzz", ""), ("", "")])
def test_the_nearest_known_name_is_suggested(name: str, suggestion: str) -> None:
    assert did_you_mean(name, ["rank", "alpha"]) == suggestion
