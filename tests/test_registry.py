"""Registries: names, entry points of other packages, and the errors about both."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from localmoe import registry
from localmoe.errors import UnknownNameError
from localmoe.registry import Registry

Sum = Callable[[int], int]


def plus_one(number: int) -> int:
    return number + 1


def filled() -> Registry[Sum]:
    sums: Registry[Sum] = Registry("sum")
    sums.register("plus_one")(plus_one)
    return sums


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Entry points hold one plug-in called `theirs`; the list says which groups were asked for."""
    groups: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        groups.append(group)
        return [EntryPoint("theirs", "operator:neg", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return groups


def test_a_registered_function_is_found_unchanged() -> None:
    sums = filled()
    assert sums["plus_one"] is plus_one
    assert "plus_one" in sums and "minus_one" not in sums


def test_registering_returns_the_function_itself() -> None:
    assert filled().register("again")(plus_one) is plus_one


def test_a_name_can_be_taken_once_only() -> None:
    with pytest.raises(ValueError, match="sum 'plus_one' is registered already"):
        filled().register("plus_one")(plus_one)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names() -> None:
    sums = filled()
    sums.register("double")(plus_one)
    with pytest.raises(UnknownNameError) as error:
        sums["plus_on"]
    assert str(error.value) == "unknown sum 'plus_on', did you mean 'plus_one'?\nknown: double, plus_one"


def test_names_come_sorted() -> None:
    sums = filled()
    sums.register("double")(plus_one)
    assert list(sums) == ["double", "plus_one"]


def test_a_registry_is_asked_for_entry_points_of_its_kind_once(asked: list[str]) -> None:
    sums = filled()
    assert asked == []
    assert list(sums) == ["plus_one", "theirs"]
    assert sums["theirs"](3) == -3 and "theirs" in sums
    assert asked == ["localmoe.sums"]


@pytest.mark.parametrize("use", [lambda sums: sums["theirs"], lambda sums: "theirs" in sums, list])
def test_every_question_finds_the_entry_points(asked: list[str], use: Callable[[Registry[Sum]], object]) -> None:
    assert use(filled())


def test_an_entry_point_cannot_replace_a_built_in(asked: list[str]) -> None:
    sums = filled()
    sums.register("theirs")(plus_one)
    with pytest.raises(ValueError, match="sum 'theirs' is registered already"):
        list(sums)
