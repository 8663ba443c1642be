"""Arguments of tool calls, in the form that the chat template expects.

Files have the arguments of a call as an object, or as JSON text of an object, as OpenAI's API writes them. A chat
template expects one of the two forms. Most templates write an object as JSON, and so would encode text twice. A few
concatenate text, which fails for an object or writes Python's repr of it. `settled` chooses the form of each call by
rendering the row in trial forms, before the row is rendered for its tokens.
"""

from __future__ import annotations

import copy
import functools
import html
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jdpo.data.schemas.describing import shown
from jdpo.data.schemas.ranked import Dropped
from jdpo.data.schemas.tool_calls import call_arguments, children, with_arguments
from jdpo.data.templates.chat_template import RenderingTooSlow
from jdpo.types import Message

if TYPE_CHECKING:
    from jdpo.data.tokens.tokenizer import Tokenizer

UNWRITTEN = "tool-call arguments that the chat template writes neither as an object nor as JSON text"

MOST_VALUES = 200
"""At most this many distinct values of a call are looked for, since each look reads the whole rendering."""

_HTML_SAFE = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "'": r"\u0027"})
"""Escapes that Jinja's own `tojson` writes for these characters."""

Render = Callable[[Sequence[list[Message]]], list[str] | Dropped]
"""Renders a prompt followed by each of its completions; takes the prompt and the completions."""


class Call(NamedTuple):
    """The arguments of one call of a row.

    Attributes:
      place: (part of the row, message of the part, call of the message); part 0 is the prompt.
      name: the function's name, for error messages.
      value: the arguments as an object.
      is_text: whether the file has the arguments as JSON text.
    """

    place: tuple[int, int, int]
    name: str
    value: dict[str, Any]
    is_text: bool

    @property
    def text(self) -> str:
        """Returns the arguments as compact JSON text."""
        return json.dumps(self.value, ensure_ascii=False, separators=(",", ":"))


@functools.lru_cache(maxsize=16)
def takes_objects(tokenizer: Tokenizer) -> bool:
    """Returns whether a chat template renders a call whose arguments are an object without failing."""
    function = {"name": "look", "arguments": {"at": "sky"}}
    call = {"id": "looking01", "type": "function", "function": function}  # Mistral's templates need nine characters
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}
    try:
        tokenizer.render([{"role": "user", "content": "Hi"}, answer], tools=[tool])
    except RenderingTooSlow as error:
        raise ValueError(str(error)) from None
    except Exception:  # whatever an expression of the template raises; rendering the rows will show it
        return False
    return True


def settled(
    parts: Sequence[list[Message]], origin: str, render: Render, *, objects_work: Callable[[], bool]
) -> Sequence[list[Message]] | Dropped:
    """Gives the arguments of every call of a row the form that the template expects.

    JSON text of an object becomes the object if the template then writes its values, and not Python's repr of it.
    Otherwise it becomes compact JSON text, under the same check. Arguments that are objects in the file stay objects
    unless the template fails on them.

    Args:
      parts: the prompt, and the completions that may follow it.
      origin: where the row came from, for messages.
      render: renders the prompt followed by each completion, or returns why the template refuses them.
      objects_work: see `takes_objects`; called only if no arguments of the row are text.

    Returns:
      The parts, with the same form of each call in every rendering; Dropped if the template writes neither form.
    """
    calls = tuple(_calls(parts))
    # The common cases need no trial rendering: no calls, or objects and a template that takes objects.
    if not calls or (not any(call.is_text for call in calls) and objects_work()):
        return parts
    row = _Row(parts, calls, render)
    as_text: frozenset[int] = frozenset()
    texts = row.rendered(as_text)
    if isinstance(texts, Dropped):
        # The template fails on an object, but its error does not name the call.
        refused, as_text = texts, frozenset(range(len(calls)))
        texts = row.rendered(as_text)
        if isinstance(texts, Dropped):
            return refused
    # Calls that stay objects as in the file are not checked: no other form would be any better.
    checked = as_text.union(index for index, call in enumerate(calls) if call.is_text)
    failed = row.unwritten(checked, as_text, texts)
    if failed:
        # At most one more try: each call has only two forms.
        as_text ^= failed  # each of these calls gets its other form
        texts = row.rendered(as_text)
        failed = failed if isinstance(texts, Dropped) else row.unwritten(checked, as_text, texts)
    if failed:
        call = calls[min(failed)]
        return Dropped(UNWRITTEN, origin, f"{call.name}: {shown(call.text)}")
    return row.in_forms(as_text)


class _Row(NamedTuple):
    """A row and its calls. Sets of calls hold indices into `calls`."""

    parts: Sequence[list[Message]]
    calls: Sequence[Call]
    render: Render

    def rendered(self, as_text: Collection[int]) -> list[str] | Dropped:
        """Renders the row with the arguments of some calls as text, and of all others as objects."""
        return self.render(self.in_forms(as_text))

    def in_forms(self, as_text: Collection[int], emptied: Collection[int] = ()) -> list[list[Message]]:
        """Returns the parts with the arguments of `as_text` as text, of others as objects, and of `emptied` empty."""
        forms: dict[tuple[int, int, int], Any] = {}
        for index, call in enumerate(self.calls):
            shape = call._replace(value={}) if index in emptied else call
            forms[call.place] = shape.text if index in as_text else shape.value
        return [
            [_in_forms(message, (number, index), forms) for index, message in enumerate(part)]
            for number, part in enumerate(self.parts)
        ]

    def unwritten(self, checked: Collection[int], as_text: Collection[int], texts: Sequence[str]) -> frozenset[int]:
        """Returns those of the checked calls whose arguments are not in the rendering as JSON would write them."""
        failed = self._failed_keys(checked, as_text, texts)
        # Values that several calls share cannot be attributed to one of them by counting.
        owners = Counter(key for index in checked for key in _keys(self.calls[index].value))
        # Calls may share a value that is missing or wrong, although some of them are written well: check each alone.
        doubtful = [index for index, keys in failed.items() if any(owners[key] > 1 for key in keys)]
        cleared = {index for index in doubtful if not self._failed_keys([index], as_text, texts)}
        return frozenset(failed.keys() - cleared)

    def _failed_keys(
        self, checked: Collection[int], as_text: Collection[int], texts: Sequence[str]
    ) -> dict[int, set[_Key]]:
        """Returns {call: its values that are missing, and its repr if that was written}, for calls with any of these.

        A value counts as written if the rendering has it more often than a rendering with empty arguments, because a
        question often contains the values of the call that answers it.
        """
        empty = self.render(self.in_forms(as_text, emptied=checked))
        if isinstance(empty, Dropped):  # the template fails for empty arguments: compare with the messages' text
            empty = ["\n".join(map(_words, [*self.parts[0], *part])) for part in self.parts[1:]]
        failed: dict[int, set[_Key]] = {}
        for number, (text, base) in enumerate(zip(texts, empty, strict=True), start=1):
            # Rendering `number` has the calls of the prompt (part 0) and of its own completion.
            keys = {i: _keys(self.calls[i].value) for i in checked if self.calls[i].place[0] in (0, number)}
            needed = Counter(key for own in keys.values() for key in own)
            # Only one notation is expected, so the most frequent one counts.
            added = {key: max(text.count(spelled) - base.count(spelled) for spelled in key.spellings) for key in needed}
            for index, own in keys.items():
                wrong = {key for key in own if (added[key] > 0 if key.is_repr else added[key] < needed[key])}
                if wrong:
                    failed.setdefault(index, set()).update(wrong)
        return failed


def _calls(parts: Sequence[list[Message]]) -> Iterator[Call]:
    """Yields every call whose arguments are an object or JSON text of one."""
    for number, part in enumerate(parts):
        for index, message in enumerate(part):
            for order, call in enumerate(message.get("tool_calls") or ()):
                found = call_arguments(call)
                if found is not None:
                    yield Call((number, index, order), found[0], found[1], found[2])


def _in_forms(message: Message, place: tuple[int, int], forms: Mapping[tuple[int, int, int], Any]) -> Message:
    calls = message.get("tool_calls") or ()
    # Messages without such calls are shared, not copied.
    if not any((*place, order) in forms for order in range(len(calls))):
        return message
    changed = [
        with_arguments(call, forms[*place, order]) if (*place, order) in forms else call
        for order, call in enumerate(calls)
    ]
    copied = copy.copy(message)  # keeps the type: a `ShownMessage` stays one
    copied["tool_calls"] = changed
    return copied


def _words(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


class _Key(NamedTuple):
    """Something to look for in a rendering: a value of a call, or Python's repr of all its arguments."""

    spellings: tuple[str, ...]
    is_repr: bool = False


def _keys(value: dict[str, Any]) -> set[_Key]:
    """Returns every value inside an object, and the object's repr.

    Nulls and empty texts are left out, since a template may write nothing for them, and so is the repr of an empty
    object, which is also JSON.

    >>> sorted(key.spellings for key in _keys({"n": 5, "deep": [True, None, ""]}) if not key.is_repr)
    [('5',), ('true', 'True')]
    """
    # A dictionary as an ordered set: the first MOST_VALUES must be the same in every run.
    leaves: dict[_Key, None] = {}
    level: list[Any] = [value]
    while level and len(leaves) < MOST_VALUES:
        found = (spellings(item) for item in level if not isinstance(item, dict | list | None))
        leaves.update((_Key(spellings), None) for spellings in found if spellings)
        level = [child for item in level if isinstance(item, dict | list) for child in children(item)]
    keys = set(itertools.islice(leaves, MOST_VALUES))
    return keys | {_Key(_in_strings(repr(value)), is_repr=True)} if value else keys


def spellings(leaf: Any) -> tuple[str, ...]:
    """Returns the ways of writing a value that is not an object, a list or null."""
    if isinstance(leaf, str):
        return _in_strings(leaf.strip()) if leaf.strip() != "{}" else ()  # "{}" is how empty arguments are written
    return tuple(dict.fromkeys([json.dumps(leaf), str(leaf)]))


def _in_strings(text: str) -> tuple[str, ...]:
    """Returns a text itself, and its forms inside strings of JSON (by Python's and Jinja's rules), Python and HTML."""
    quoted = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    found = [text, *quoted, *(one.translate(_HTML_SAFE) for one in quoted), html.escape(text), repr(text)[1:-1]]
    return tuple(dict.fromkeys(filter(None, found)))
