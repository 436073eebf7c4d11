"""The cache of experts between threads: who waits for whom, and what an error leaves."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from localmoe.runtime.execution.cache import ExpertCache


def _expert(size: int) -> Any:
    return SimpleNamespace(bytes=size)


def test_an_expert_that_is_being_made_keeps_nobody_from_another() -> None:
    cache, begun, go_on = ExpertCache(100), threading.Event(), threading.Event()

    def slowly() -> Any:
        begun.set()
        assert go_on.wait(60)
        return _expert(10)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(cache.get, "slow", slowly)
        assert begun.wait(60)
        same = pool.submit(cache.get, "slow", lambda: pytest.fail("made twice"))
        quick = cache.get("quick", lambda: _expert(20))
        assert not slow.done() and not same.done() and "quick" in cache
        go_on.set()
        assert slow.result(60) is same.result(60)
    assert cache.get("quick", lambda: pytest.fail("made twice")) is quick
    assert cache.bytes == 30


def test_an_expert_that_could_not_be_made_is_made_by_the_next() -> None:
    cache = ExpertCache(100)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert cache.get("a", lambda: _expert(1)).bytes == 1


def test_the_least_recently_used_leave_and_what_is_too_large_is_not_kept() -> None:
    cache = ExpertCache(30)
    for name in ("a", "b", "c", "a", "d"):
        cache.get(name, lambda: _expert(10))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    assert cache.get("large", lambda: _expert(31)).bytes == 31
    assert "large" not in cache and cache.bytes == 30
    cache.clear()
    assert cache.bytes == 0 and "a" not in cache
