"""Questions: the text of a harness request that chooses its mix; never the continuation, never the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localmoe.errors import UnknownNameError, UsageError
from localmoe.runtime.router import query_of

ROUTE_ON = ("question", "context", "last_block")
"""question: the document's own text as its task asks it, without description and examples; needs to know the tasks.
context: all of the context. last_block: what follows the last blank line of the context."""

_BLANK_LINE = "\n\n"


class Questions:
    """What to route each request on, for one way to do it.

    A context that a chat template rendered is known again, and stands for its user turns: the last one first, then the
    earlier ones (of `last_block` the last one alone).
    """

    def __init__(self, route_on: str) -> None:
        if route_on not in ROUTE_ON:
            raise UnknownNameError("way to route", route_on, ROUTE_ON)
        self.route_on = route_on
        self._tasks: dict[str, Any] = {}
        self._conversations: dict[str, list[dict[str, str]]] = {}

    def know(self, tasks: Mapping[str, Any]) -> None:
        """The harness's tasks by name, which `question` asks for a document's text."""
        self._tasks |= tasks

    def remember(self, rendered: str, conversation: Sequence[dict[str, str]]) -> None:
        """What a context was before the chat template rendered it."""
        self._conversations[rendered] = [dict(turn) for turn in conversation]

    def of(self, request: Any) -> str:
        """The text to route a request on; it may be empty, as a context may be."""
        context: str = request.args[0]
        if self.route_on == "question":
            return self._question(request)
        turns = self._conversations.get(context)
        if self.route_on == "context":
            return context if turns is None else query_of(turns)
        last = context if turns is None else query_of([turn for turn in turns if turn["role"] == "user"][-1:])
        return last.rstrip().rpartition(_BLANK_LINE)[2]

    def _question(self, request: Any) -> str:
        task = self._tasks.get(request.task_name)
        if task is None:
            raise UsageError(
                f"route_on='question' asks the task for a document's text, and {request.task_name!r} is not known",
                "use `localmoe lm-eval`, which makes the tasks known; or route_on='last_block'",
            )
        asked = task.doc_to_text(request.doc)
        if isinstance(asked, str):
            return asked
        contexts = [str(choice) for choice in task.doc_to_choice(request.doc)]
        return _shared_start(contexts)  # the choices stand in the contexts, e.g. winogrande


def _shared_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    places = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(places, min(len(first), len(last)))]
