"""Copies of the target weights, one a mix: which of them is read or written now, and which mixes are kept beside it."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

Copy = dict[str, nn.Parameter]
"""Name of a target → the weight that stands for its own."""


class Copies:
    """One copy, and as many more as are allowed; the mix that was used least recently is written over.

    `now` is the copy in use, `held` names the mix that it holds whole, None if it holds none.
    """

    def __init__(self, more: int) -> None:
        self.now: Copy = {}
        self.held: object = None
        self._more = more
        self._others: OrderedDict[object, Copy] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(weight.nbytes for copy in (self.now, *self._others.values()) for weight in copy.values())

    def __contains__(self, key: object) -> bool:
        return key is not None and (key == self.held or key in self._others)

    def turn_to(self, key: object) -> bool:
        """Takes the copy of this mix in use; if there is none, False, and `now` is to be written: `held` is None."""
        if key is not None and key == self.held:
            return True
        kept = None if key is None else self._others.pop(key, None)
        if self.held is not None and self._more > 0:
            self._others[self.held] = self.now
            self.now = {}
        if kept is None and len(self._others) > self._more:
            _, self.now = self._others.popitem(last=False)  # its memory is written anew
        self.now, self.held = (self.now, None) if kept is None else (kept, key)
        return kept is not None

    def forget(self) -> None:
        """Lets go of all mixes, and of the memory of all but one."""
        self._others.clear()
        self.held = None
