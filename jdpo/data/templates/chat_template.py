"""Chat templates, rendered like transformers' `apply_chat_template`, but bounded and the same on every day and host.

The environment has transformers' settings (trimmed blocks, loop controls, the `generation` tag, its `tojson`,
`raise_exception` and `strftime_now`). It differs in three ways: a rendering has a `Budget`, today's date is always
`TEMPLATE_DAY`, and filters and functions with random results are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import jinja2.nodes
import numpy as np

from jdpo.data.templates.budget import BoundExceeded, Budget, RenderingTooSlow, current
from jdpo.data.templates.environment import TEMPLATE_DAY, environment
from jdpo.types import Message

__all__ = ["RESERVED", "TEMPLATE_DAY", "BoundExceeded", "ChatTemplate", "RenderingTooSlow"]

LONGEST_TEMPLATE = 2**20
"""Maximum number of characters of a template; the longest in use have about 30,000."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, compiled once per process."""

    text: str

    @property
    def variables(self) -> frozenset[str]:
        """The names that the template reads; empty if it cannot be parsed."""
        return _names(self.text).variables

    @property
    def asks_for_today(self) -> bool:
        """True if the template reads today's date."""
        return _names(self.text).asks_for_today

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Renders a conversation.

        Args:
          messages: the turns, at least one.
          tools: JSON schemas of the tools that may be called.
          add_generation_prompt: append the header of the answer to come.
          variables: further variables of the template: special tokens, `enable_thinking`, ...

        Raises:
          jinja2.TemplateError: the template is not valid, refuses the conversation, or (`BoundExceeded`) exceeds its
            bounds.
          RenderingTooSlow: rendering takes more than a minute.
          Exception: any other exception of an expression in the template.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        template = _compiled(self.text)
        if isinstance(template, Exception):
            raise template
        given = _Given()
        turns = [given.plain(turn) for turn in map(_with_reasoning, map(_without_nulls, messages))]
        values = {
            "messages": given.seen(turns),
            "tools": given.plain(None if tools is None else list(tools)),
            # transformers always passes this name, and templates test it.
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **given.plain(dict(variables)),
        }
        budget = Budget(given.characters, given.sizes)
        # A context variable, because compiled templates are shared by threads.
        token = current.set(budget)
        try:
            return _written(template, values, budget)
        finally:
            current.reset(token)


def _written(template: jinja2.Template, values: dict[str, Any], budget: Budget) -> str:
    pieces, size = [], 0
    # Piece by piece, so that a template that writes without end is stopped at the bound.
    for piece in template.root_render_func(template.new_context(values)):
        size += len(piece)
        budget.output(size)
        pieces.append(piece)
    return "".join(pieces)


class _Given:
    """Copies of the values given to a template, reduced to JSON types.

    Other objects could have methods that the sandbox allows a template to call.

    Attributes:
      characters: number of characters of all texts, keys included.
      sizes: {id of a container: its cells}; see `Budget.size`.
    """

    def __init__(self) -> None:
        self.characters = 0
        self.sizes: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is unique only while its container exists

    def plain(self, value: Any) -> Any:
        """Returns a copy of a value."""
        return self._copied(value)[0]

    def seen(self, values: list[Any]) -> Any:
        """Returns a list of values that were copied before, after recording its size."""
        return self._noted(values, sum(self.sizes[id(value)] for value in values))[0]

    def _copied(self, value: Any) -> tuple[Any, int]:
        """Returns the copy of a value, and its cells."""
        if value is None or isinstance(value, bool):
            return value, 1
        if isinstance(value, str):
            self.characters += len(value)
            # A plain str: a subclass such as Markup would change how the template escapes it.
            return str.__str__(value), 1 + len(value)
        if isinstance(value, int):
            return int(value), 1
        if isinstance(value, float):
            return float(value), 1
        if isinstance(value, Mapping):
            pairs = [(self._copied(key), self._copied(item)) for key, item in value.items()]
            return self._noted(
                {key: item for (key, _), (item, _) in pairs}, sum(cells + more for (_, cells), (_, more) in pairs)
            )
        if isinstance(value, list | tuple):
            items = [self._copied(item) for item in value]
            copies = [item for item, _ in items]
            return self._noted(copies if isinstance(value, list) else tuple(copies), sum(cells for _, cells in items))
        # Rows of Parquet files may contain numpy scalars.
        if isinstance(value, np.generic):
            return self._copied(value.item())
        return f"<{type(value).__name__}>", 1 + len(type(value).__name__)

    def _noted(self, container: Any, cells: int) -> tuple[Any, int]:
        self._kept.append(container)
        self.sizes[id(container)] = 1 + cells
        return container, 1 + cells


def _without_nulls(message: Message) -> Message:
    """Removes keys that are null, as transformers does."""
    return {key: value for key, value in message.items() if value is not None}


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which files have the reasoning of a turn. Templates read the first one, or the second."""


def _with_reasoning(message: Message) -> Message:
    thought = next((message[key] for key in _REASONING if key in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables of a template that jdpo sets itself."""


@functools.lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template | Exception:
    # Jinja's compiler has no bound of its own.
    if len(text) > LONGEST_TEMPLATE:
        return jinja2.TemplateError(f"the template has more than {LONGEST_TEMPLATE:,} characters")
    try:
        return environment().from_string(text)
    except Exception as error:  # Python's compiler has limits too: SyntaxError, RecursionError, MemoryError
        return error


class _Names(NamedTuple):
    variables: frozenset[str]
    asks_for_today: bool


@functools.lru_cache(maxsize=32)
def _names(text: str) -> _Names:
    if isinstance(_compiled(text), Exception):
        return _Names(frozenset(), False)
    tree = environment().parse(text)
    asked = any(node.name == "strftime_now" for node in tree.find_all(jinja2.nodes.Name))
    return _Names(frozenset(jinja2.meta.find_undeclared_variables(tree)), asked)
