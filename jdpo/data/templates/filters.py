"""Jinja's filters for chat templates, each with a check of its result's size before the result is created."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2.filters import FILTERS, make_attrgetter

from jdpo.data.templates.budget import BoundExceeded, Budget, current

_CHEAP = frozenset(
    ["length", "count", "first", "last", "default", "d", "attr", "abs", "int", "float", "safe", "filesizeformat"]
)
_OF_TEXT = frozenset(
    [
        "capitalize",
        "center",
        "e",
        "escape",
        "forceescape",
        "format",
        "indent",
        "lower",
        "replace",
        "string",
        "striptags",
        "title",
        "trim",
        "truncate",
        "upper",
        "urlize",
        "wordcount",
        "wordwrap",
    ]
)
_SLOW = frozenset(["pprint", "striptags", "urlize", "wordwrap", "xmlattr"])
# urlencode: a character has up to four bytes, each of which is written as %XX.
_GROWTH = {"e": 6, "escape": 6, "forceescape": 6, "urlencode": 12}

_LONGEST_PART = 1000


def bounded_filters() -> dict[str, Callable[..., Any]]:
    """Returns {name: filter} for all filters of Jinja, with the `tojson` of transformers."""
    filters = {name: _bounded(name, function) for name, function in FILTERS.items()}
    return filters | {"tojson": _to_json, "sum": _sum, "random": _random}


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Some filters get the environment or context as their first argument.
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        first, value, rest = args[:place], args[place], args[place + 1 :]
        if name not in _CHEAP:
            # Filters of text convert their value with str(), whose result counts.
            value = budget.scanned(budget.text_of(value) if name in _OF_TEXT else value)
        if name in _SLOW:
            budget.slow(budget.size(value) + sum(map(budget.size, (*rest, *kwargs.values()))))
        if name in _GROWTH:
            budget.text(_GROWTH[name] * budget.size(value))
        if name == "join":
            value, rest, kwargs = _join_arguments(budget, first[0].environment, value, *rest, **kwargs)
        elif name in _BEFORE:
            _BEFORE[name](budget, value, *rest, **kwargs)
        return budget.held(function(*first, value, *rest, **kwargs))

    return bounded


def _join_arguments(
    budget: Budget, environment: jinja2.Environment, value: Any, d: Any = "", attribute: Any = None
) -> tuple[list[str], tuple[Any, ...], dict[str, Any]]:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    # The attribute is looked up here, because the counted list has texts and no objects.
    separator = budget.text_of(d)
    return budget.joined(separator, value), (separator,), {}


def _before_center(budget: Budget, value: str, width: Any = 80) -> None:
    budget.wide(width)


def _before_indent(budget: Budget, value: str, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    budget.wide(width)
    # indent also takes the text to indent with.
    each = width if isinstance(width, int) else len(width)
    budget.text(len(value) + max(each, 0) * (len(value.splitlines()) + 1))


def _before_replace(budget: Budget, value: str, old: Any, new: Any, count: Any = None) -> None:
    budget.replaced(value, budget.text_of(old), budget.text_of(new), count)


def _before_format(budget: Budget, value: str, *args: Any, **kwargs: Any) -> None:
    budget.percent(value, kwargs or args)


def _before_list(budget: Budget, value: Any) -> None:
    if isinstance(value, str | bytes):
        budget.items(len(value))


def _before_batch(budget: Budget, value: Any, linecount: Any, fill_with: Any = None) -> None:
    if fill_with is not None and isinstance(linecount, int):
        budget.items(max(linecount, 0))
        budget.text((1 + budget.size(fill_with)) * max(linecount, 0))


def _before_round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> None:
    # round computes 10 ** precision.
    if isinstance(precision, int) and abs(precision) > _LONGEST_PART:
        raise BoundExceeded(f"round gets a precision of more than {_LONGEST_PART:,} digits")


def _before_wordwrap(
    budget: Budget,
    value: str,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> None:
    budget.text(len(value) * (2 + len(budget.text_of(wrapstring or ""))))


def _before_markup(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    budget.text((1 + budget.size(value)) * (40 + sum(map(budget.size, (*args, *kwargs.values())))))


_BEFORE: Mapping[str, Callable[..., None]] = {
    "batch": _before_batch,
    "center": _before_center,
    "format": _before_format,
    "indent": _before_indent,
    "list": _before_list,
    "replace": _before_replace,
    "round": _before_round,
    "trim": Budget.stripped,
    "urlize": _before_markup,
    "wordwrap": _before_wordwrap,
}


@functools.wraps(FILTERS["sum"])
def _sum(environment: jinja2.Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Adds values like the operator `+`, so that sums of lists are counted."""
    budget = current.get()
    values = budget.scanned(iterable)
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    if isinstance(start, str | bytes):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    total = start
    for value in values:
        # Python's sum adds lists without any check of the result.
        total = budget.binary("+", total, value)
    return total


def _random(value: Any) -> Any:
    current.get()
    raise jinja2.TemplateError("it uses the filter random, so the same row would have other tokens every time")


def _to_json(
    x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    """Writes JSON as transformers does: characters of HTML and of other scripts are not escaped."""
    budget = current.get()
    budget.held(x)
    for part in (indent, *(separators or ())):
        if (part if isinstance(part, int) else len(part or "")) > _LONGEST_PART:
            raise BoundExceeded(f"tojson gets an indent or a separator of more than {_LONGEST_PART:,} characters")
    options: dict[str, Any] = {
        "ensure_ascii": ensure_ascii,
        "indent": indent,
        "separators": separators,
        "sort_keys": sort_keys,
    }
    # The usual case in one call; with an indent, the text may be many times longer than the value.
    if indent is None and separators is None:
        text = json.dumps(x, **options)
        budget.text(len(text))
        return text
    pieces = []
    for piece in json.JSONEncoder(**options).iterencode(x):
        budget.text(len(piece))
        pieces.append(piece)
    return budget.concat(pieces)
