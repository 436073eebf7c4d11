"""Registries: name → function of one signature, open to other packages through entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from localmoe.errors import LocalMoEError, UnknownNameError

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions by name; entry points of the group `localmoe.<kind>s` are added when first asked for.

    Another package adds a router, say, by
    `[project.entry-points."localmoe.routers"] mine = "package.module:function"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, F] = {}
        self._entry_points_read = False

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that registers a function under `name`; raises ValueError if the name is taken."""

        def add(function: F) -> F:
            if name in self._functions:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._functions[name] = function
            return function

        return add

    def __getitem__(self, name: str) -> F:
        """The function called `name`; raises UnknownNameError, which lists the names there are."""
        self._read_entry_points()
        if name not in self._functions:
            raise UnknownNameError(self.kind, name, self._functions)
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        self._read_entry_points()
        return iter(sorted(self._functions))

    def __contains__(self, name: object) -> bool:
        self._read_entry_points()
        return name in self._functions

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        for point in entry_points(group=f"localmoe.{self.kind}s"):
            try:
                function = point.load()
            except Exception as error:
                raise LocalMoEError(
                    f"the {self.kind} {point.name!r} of another package cannot be loaded: {error}",
                    f"mend or uninstall the package that holds {point.value}",
                ) from error
            if self._functions.get(point.name) is not function:
                self.register(point.name)(function)
        self._entry_points_read = True
