"""The expert cache: packed experts by content hash, within a number of bytes, the least recently used leaving first."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from localmoe.runtime.execution.packed import PackedExpert


class ExpertCache:
    """Packed experts in one tier of memory, for several threads: one that is being made is waited for, others are not.

    What was handed out stays alive for as long as it is used, whatever leaves the cache meanwhile.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[str, PackedExpert] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._making: dict[str, threading.Event] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the experts held."""
        return self._bytes

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def get(self, key: str, make: Callable[[], PackedExpert]) -> PackedExpert:
        """The expert with this content hash; made if it is not here, and kept if it fits at all."""
        while True:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key]
                others = self._making.get(key)
                if others is None:
                    done = self._making[key] = threading.Event()
                    break
            others.wait()  # it may have failed, or be too large to be kept: then it is made here
        try:
            made = make()
            self._keep(key, made)
        finally:
            with self._lock:
                del self._making[key]
            done.set()
        return made

    def _keep(self, key: str, made: PackedExpert) -> None:
        with self._lock:
            if made.bytes <= self.limit:
                self._held[key] = made
                self._bytes += made.bytes
            while self._bytes > self.limit:
                _, gone = self._held.popitem(last=False)
                self._bytes -= gone.bytes

    def clear(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._held.clear()
            self._bytes = 0


def quarter_of_memory() -> int:
    """A quarter of this machine's memory in bytes; 4 GiB where the system does not say how much there is."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30
