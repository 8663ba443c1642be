"""Tools and tool calls in all forms that files use, read into the form that chat templates take."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from jdpo.data.schemas.describing import kind, shown
from jdpo.data.schemas.objects_of_lists import as_list


def read_tools(value: Any, origin: str) -> list[dict[str, Any]] | None:
    """Reads the tools that a conversation may call: a list of objects, or JSON text of one; None if there are none.

    Raises:
      ValueError: the value is neither.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    # None and not an empty list: templates may treat an empty list as tools.
    return [_with_keys(tool) for tool in _objects(value, "tools", origin) if not _is_void(tool)] or None


def are_calls(value: Any) -> bool:
    """Returns whether a value is a function call, or a list of calls, without a message around it.

    >>> are_calls([{"name": "look", "arguments": {}}]), are_calls([{"role": "user", "content": "Hi"}]), are_calls([])
    (True, False, False)
    """
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, dict)
        and item.keys().isdisjoint(("role", "from"))
        and (isinstance(item.get("function"), dict) or ("name" in item and "arguments" in item))
        for item in items
    )


def read_calls(calls: Any, called: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """Reads the calls of a turn; returns an empty list if there are none.

    Args:
      calls: the message's `tool_calls`: a list of calls, or JSON text of one.
      called: the message's `function_call`: a single call.
      place, origin: the place of the calls, for error messages.

    Raises:
      ValueError: a call is not an object.
    """
    calls = calls or ([called] if called and not _is_void(called) else None)
    return [_call(call) for call in _objects(calls, place, origin) if not _is_void(call)] if calls else []


def read_call_text(text: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """Reads the calls of a ShareGPT `function_call` turn: JSON text of {name, arguments}, or of a list of them."""
    calls = _parsed(text, place, origin)
    calls = _objects([calls] if isinstance(calls, dict) else calls, place, origin)
    for call in calls:
        # Checked only here: other places are known to hold calls, but this text could be any JSON.
        if "name" not in call and "function" not in call:
            raise ValueError(f"{origin}: {place} is {shown(call)}; expected a call {{name, arguments}}")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a call in the form that templates take, {type, function: {name, arguments}}.

    >>> _call({"name": "look", "arguments": {}})
    {'type': 'function', 'function': {'name': 'look', 'arguments': {}}}
    """
    call = _with_keys(call)
    # Calls without a wrapper are put into OpenAI's form, which templates expect.
    return call if "function" in call or "name" not in call else {"type": "function", "function": call}


def _with_keys(item: dict[str, Any]) -> dict[str, Any]:
    """Returns a call or a tool without null keys of its own and of its function.

    Nulls at deeper levels are data: `arguments` and `parameters` are free JSON, in which null has a meaning.

    >>> _with_keys({"id": None, "function": {"name": "look", "strict": None, "arguments": {"at": None}}})
    {'function': {'name': 'look', 'arguments': {'at': None}}}
    """
    present = {key: value for key, value in item.items() if value is not None}
    function = present.get("function")
    if isinstance(function, dict):
        present["function"] = {key: value for key, value in function.items() if value is not None}
    return present


def _is_void(value: Any) -> bool:
    """Returns whether a value is null or an object of nulls alone, which files write for a call that does not exist.

    >>> _is_void({"name": None, "arguments": {"at": None}}), _is_void({"name": "look", "arguments": {}})
    (True, False)
    """
    return all(map(_is_void, value.values())) if isinstance(value, dict) else value is None


def _objects(value: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """Returns a list of objects, of which each, or the whole list, may be JSON text."""
    values = as_list(_parsed(value, place, origin), place, origin)
    if not isinstance(values, list):
        raise ValueError(f"{origin}: {place} is {kind(values)}; expected a list of objects, or JSON text of one")
    objects = [
        _parsed(item, f"{place}[{index}]", origin) if isinstance(item, str) else item
        for index, item in enumerate(values)
    ]
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"{origin}: {place}[{index}] is {kind(item)}; expected an object")
    return objects


def _parsed(value: Any, place: str, origin: str) -> Any:
    """Parses JSON text; returns other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{origin}: {place} is a string that is not JSON ({error}): {shown(value)}") from None


# --- arguments

MAX_DEPTH = 100
"""JSON text nested deeper than this stays text, because the code that works with objects is recursive."""


def as_objects(calls: Any) -> Any:
    """Returns the calls of a message for comparing, with JSON text of arguments read as objects.

    >>> as_objects([{"function": {"name": "look", "arguments": '{"at": "sky"}'}}])
    [{'function': {'name': 'look', 'arguments': {'at': 'sky'}}}]
    """
    if not isinstance(calls, list):
        return calls
    return [with_arguments(call, found[1]) if (found := call_arguments(call)) else call for call in calls]


def call_arguments(call: Any) -> tuple[str, dict[str, Any], bool] | None:
    """Returns the function's name, its arguments as an object, and whether the file has them as JSON text.

    Args:
      call: {type, function: {name, arguments}}.

    Returns:
      None if the value is not such a call, or its arguments are no object.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return None
    arguments = function.get("arguments")
    value = parse_object(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        return None
    return str(function.get("name")), value, isinstance(arguments, str)


def with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Returns a copy of a call with other arguments."""
    return {**call, "function": {**call["function"], "arguments": arguments}}


def parse_object(text: str) -> dict[str, Any] | None:
    """Returns the object that JSON text holds, or None if it holds another value or is not JSON.

    >>> parse_object('{"city": "Cork"}'), parse_object("Cork"), parse_object('["Cork"]'), parse_object('{"n": NaN}')
    ({'city': 'Cork'}, None, None, None)
    """
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """Returns whether a value can be written as JSON again, and is not nested too deeply."""
    level = [value]
    for _ in range(MAX_DEPTH):
        # Python's parser accepts NaN and Infinity, which are not JSON.
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            return False
        level = [child for item in level if isinstance(item, dict | list) for child in children(item)]
        if not level:
            return True
    return False


def children(item: dict[str, Any] | list[Any]) -> Sequence[Any]:
    """Returns the values directly inside an object or list."""
    return list(item.values()) if isinstance(item, dict) else item
