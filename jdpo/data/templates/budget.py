"""Bounds on the work and the text of one rendering of a chat template.

A chat template comes with a model, often from a stranger, and is a program: it can loop, and it can write without end.
`Budget` counts the work of a rendering. What it refuses depends on the template and the conversation alone, never on
the clock, so every host drops the same rows. The clock may only end the run (`RenderingTooSlow`).
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from markupsafe import Markup

from jdpo.data.templates.text_methods import format_fields, num_pieces

MOST_STEPS = 1_000_000
"""Maximum number of steps: iterations of loops, items taken from iterators, and `MACRO_STEPS` per call of a macro."""

MACRO_STEPS = 10
"""Steps of one call of a macro, which takes about as long as this many iterations of a loop."""

LEAST_TEXT = 4 * 2**20
TEXT_PER_INPUT = 64
"""The output, and every value, may have `max(LEAST_TEXT, TEXT_PER_INPUT * input)` characters, the bound on text."""

COPIES = 64
"""Maximum number of characters of intermediate text, as a multiple of the bound on text."""

ITEM_COST = 32
"""Cost of visiting one item of a list, in characters."""

MOST_SECONDS = 60.0
"""Seconds after which a rendering ends the run."""

MOST_BITS = 2**14
"""Maximum size of an integer. Python itself refuses to write integers of more than 4,300 digits."""

MOST_HTML = 2**16
"""Maximum number of characters for filters whose time grows with the square of the text."""

MOST_DEPTH = 500
"""Maximum nesting depth of lists and objects."""

_STEPS_BETWEEN_LOOKS = 1024
_COPIED_BEFORE_LOOK = 2**16
_CONTAINERS: tuple[Any, ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)
_SIZED: tuple[Any, ...] = (range, *_CONTAINERS)
_COUNTABLE: tuple[Any, ...] = (str, bytes, *_SIZED)

_WORK = f"its work is more than {MOST_STEPS:,} loop iterations"
_TEXT = f"its text is more than {LEAST_TEXT // 2**20} MiB and more than {TEXT_PER_INPUT} times the conversation"
_NUMBER = f"an integer has more than {MOST_BITS:,} bits"
_NESTED = f"its values nest more than {MOST_DEPTH} deep"

current: ContextVar[Budget] = ContextVar("budget")
"""The budget of the rendering that runs in this thread; unset while a template is compiled."""


class BoundExceeded(jinja2.TemplateError):
    """A rendering exceeds its bounds."""


class RenderingTooSlow(Exception):
    """A rendering takes more than `MOST_SECONDS`. Hosts differ in speed, so this ends the run and never drops a row."""


class Budget:
    """The work that one rendering has done so far.

    Args:
      input_size: number of characters of the conversation and its tools.
      sizes: {id of a container of the input: its cells}, so that these containers are not walked again.
    """

    __slots__ = ("_copied", "_deadline", "_last_look", "_sizes", "_steps", "_unlooked", "limit")

    def __init__(self, input_size: int, sizes: Mapping[int, int]) -> None:
        self.limit = max(LEAST_TEXT, TEXT_PER_INPUT * input_size)
        self._sizes = sizes
        self._steps = self._copied = self._last_look = self._unlooked = 0
        self._deadline = time.monotonic() + MOST_SECONDS

    def step(self, count: int = 1) -> bool:
        """Counts steps. Returns True, so that the conditions of loops can call it too."""
        self._steps += count
        if self._steps > MOST_STEPS:
            raise BoundExceeded(_WORK)
        # Reading the clock takes longer than a step, so it is read once in many.
        if self._steps - self._last_look >= _STEPS_BETWEEN_LOOKS:
            self._last_look = self._steps
            self._look()
        return True

    def scan(self, size: int) -> None:
        """Counts characters that are read or copied."""
        self._copied += size
        if self._copied > COPIES * self.limit:
            raise BoundExceeded(_TEXT)
        self._unlooked += size
        if self._unlooked > _COPIED_BEFORE_LOOK:
            self._unlooked = 0
            self._look()

    def text(self, size: int) -> None:
        """Counts a value of `size` characters before it is created."""
        if size > self.limit:
            raise BoundExceeded(_TEXT)
        self.scan(size)

    def output(self, size: int) -> None:
        """Checks the number of characters written so far."""
        if size > self.limit:
            raise BoundExceeded(_TEXT)

    def items(self, count: int) -> None:
        """Counts a list of `count` items before it is created."""
        if count > MOST_STEPS:
            raise BoundExceeded(_WORK)
        self.scan(ITEM_COST * count)

    def _look(self) -> None:
        if time.monotonic() > self._deadline:
            raise RenderingTooSlow

    def size(self, value: Any) -> int:
        """Returns the cells of a value: the characters of its texts, plus one for every item at any depth.

        Raises:
          BoundExceeded: they exceed the bound on text, or the value is nested too deeply.
        """
        if isinstance(value, str | bytes):
            return len(value)
        total, seen, depth = 0, 0, 0
        level = [value]
        while level:
            below: list[Any] = []
            for item in level:
                # The messages are walked once, when they are copied; templates pass them to filters many times.
                known = self._sizes.get(id(item))
                total += 1 if known is None else known
                if isinstance(item, str | bytes):
                    total += len(item)
                elif known is None and isinstance(item, _CONTAINERS):
                    # Checked before the items are collected, since a container may have millions.
                    if len(item) + len(below) + total > self.limit:
                        raise BoundExceeded(_TEXT)
                    # Level by level instead of recursion: values may be nested as deeply as the template likes.
                    below.extend(item)
                    if isinstance(item, dict):
                        below.extend(item.values())
            seen += len(level)
            depth += 1
            if total > self.limit:
                raise BoundExceeded(_TEXT)
            if depth > MOST_DEPTH:
                raise BoundExceeded(_NESTED)
            level = below
        self.scan(ITEM_COST * seen)
        return total

    def held(self, value: Any) -> Any:
        """Returns the value after checking the bounds of a container or an integer."""
        # Arithmetic and str() of huge integers take quadratic time.
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise BoundExceeded(_NUMBER)
        if isinstance(value, _CONTAINERS):
            self.size(value)
        return value

    def scanned(self, value: Any) -> Any:
        """Returns the value after counting its length; an iterator counts its items as they are taken."""
        if isinstance(value, str | bytes):
            self.scan(len(value))
        elif isinstance(value, _SIZED):
            self.scan(ITEM_COST * len(value))
        elif isinstance(value, Iterator):
            return self._counted(value)
        return value

    def _counted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for item in iterator:
            self.step()
            yield item

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """Returns all values of an iterable, counted."""
        counted: Any = self.scanned(values)
        if isinstance(counted, _COUNTABLE):
            self.items(len(counted))
        return list(counted)

    def text_of(self, value: Any) -> str:
        """Returns the text that a template writes for a value."""
        return value if isinstance(value, str) else str(self.held(value))

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins pieces of text."""
        # The sum of lengths is known before the text is joined, so too long a result is never created.
        texts = list(pieces)
        self.text(sum(map(len, texts)))
        return "".join(texts)

    def str_join(self, values: Iterable[Any]) -> str:
        """Joins the operands of `~`."""
        return self.concat(map(self.text_of, values))

    def markup_join(self, values: Iterable[Any]) -> str:
        """Joins the operands of `~` if HTML is escaped."""
        from jinja2.runtime import markup_join

        texts = [self.text_of(value) for value in values]
        self.text(5 * sum(map(len, texts)))
        return markup_join(texts)

    def joined(self, separator: str, values: Iterable[Any]) -> list[str]:
        """Returns the texts of values to be joined by a separator, after counting the result as if it were escaped."""
        texts = [self.text_of(value) for value in self.listed(values)]
        # Escaping turns a character into up to five, as in &#39;.
        growth = 5 if isinstance(separator, Markup) else 1
        self.text(growth * (sum(map(len, texts)) + len(separator) * max(0, len(texts) - 1)))
        return texts

    def replaced(self, text: Any, old: Any, new: Any, count: Any = None) -> None:
        """Counts the result of replacing `old` by `new`."""
        places = text.count(old)
        if isinstance(count, int) and count >= 0:
            places = min(places, count)
        self.text(len(text) + places * max(0, len(new) - len(old)))

    def stripped(self, text: Any, characters: Any = None) -> None:
        """Counts the search for characters to strip from the ends of a text."""
        if isinstance(characters, str | bytes):
            self.scan(len(text) * len(characters))

    def slow(self, size: int) -> None:
        """Refuses long text for filters whose time grows with the square of the text."""
        if size > MOST_HTML:
            raise BoundExceeded(f"a filter of HTML gets more than {MOST_HTML:,} characters")

    def wide(self, *widths: Any) -> None:
        """Counts text that is padded to a width."""
        for width in widths:
            if isinstance(width, int):
                self.text(abs(width))

    def binary(self, symbol: str, left: Any, right: Any) -> Any:
        """Computes `+`, `*`, `**` and `%`, after checking the size of the result."""
        if symbol == "+":
            return self._added(left, right)
        if symbol == "*":
            return self._multiplied(left, right)
        if symbol == "**":
            # An upper bound on the bits of the power, which is not computed if it is too large.
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MOST_BITS:
                raise BoundExceeded(_NUMBER)
            return operator.pow(left, right)
        if isinstance(left, str | bytes):
            self.percent(left, right)
        return operator.mod(left, right)

    def _added(self, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, str):
            self.text(len(left) + len(right))
            return operator.add(left, right)
        if isinstance(left, list | tuple | bytes) and isinstance(right, list | tuple | bytes):
            self.items(len(left) + len(right))
        return self.held(operator.add(left, right))

    def _multiplied(self, left: Any, right: Any) -> Any:
        is_number = isinstance(left, int) and isinstance(right, int)
        if is_number and left.bit_length() + right.bit_length() > MOST_BITS:
            raise BoundExceeded(_NUMBER)
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                # `"a" * 10**9` is one step, but a gigabyte.
                self.text(self.size(value) * max(times, 0))
                self.items(0 if isinstance(value, str | bytes) else len(value) * max(times, 0))
        return operator.mul(left, right)

    def percent(self, text: Any, values: Any) -> None:
        """Counts the result of `text % values`."""
        letters = text.decode("latin-1") if isinstance(text, bytes) else text
        total, fields = len(letters), 0
        numbers = [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, int)]
        for widths in format_fields(letters):
            fields += 1
            for width in widths:
                # `%*d` takes its width from the values; which one is not worth finding out, so the largest counts.
                total += max(map(abs, numbers), default=0) if width == "*" else self.number(width or "0")
        # repr() writes a character as at most ten characters; a mapping may give the same value to every field.
        total += 10 * self.size(values) * (max(fields, 1) if isinstance(values, dict) else 1)
        self.text(total)

    def number(self, digits: str) -> int:
        """Returns a width that is written in digits."""
        # int() of a long string of digits is slow, and such a width exceeds every bound.
        if len(digits) > 12:
            raise BoundExceeded(_TEXT)
        return int(digits)

    def method(self, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Counts a call of a method of a built-in value.

        Returns:
          The arguments to call the method with.
        """
        if isinstance(owner, str | bytes):
            # The values may be an iterator, which can be read only once: join gets the list that was counted.
            if name == "join" and len(args) == 1:
                values = self.listed(args[0])
                self.text(sum(map(self.size, values)) + len(owner) * len(values))
                return [values]
            self._text_method(owner, name, args, kwargs)
        elif isinstance(owner, int) and name == "to_bytes":
            self.wide(*args, *kwargs.values())
        elif isinstance(owner, _SIZED):
            self.scan(ITEM_COST * len(owner))
        return args

    def _text_method(self, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name in ("startswith", "endswith"):
            return
        if name in ("center", "ljust", "rjust", "zfill"):
            self.wide(*args[:1])
        elif name == "replace" and len(args) >= 2:
            self.replaced(owner, *args[:2], *args[2:3] or [kwargs.get("count")])
        elif name == "expandtabs":
            (tab,) = args[:1] or [kwargs.get("tabsize", 8)]
            if isinstance(tab, int):
                self.text(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * max(tab, 0))
        elif name == "translate" and args and isinstance(args[0], dict):
            # translate may replace every character by a long text.
            longest = max((len(text) for text in args[0].values() if isinstance(text, str)), default=1)
            self.text(len(owner) * max(longest, 1))
        elif name in ("strip", "lstrip", "rstrip"):
            self.stripped(owner, *args[:1])
        elif name in ("rfind", "rindex", "rsplit", "rpartition") and args and isinstance(args[0], str | bytes):
            self.scan(len(owner) * len(args[0]))  # Python's search from the right does not take linear time
        elif name == "striptags":
            self.slow(len(owner))
        if name in ("split", "rsplit", "splitlines"):
            self.items(num_pieces(owner, name, *args[:1] or [kwargs.get("sep")]))
        self.text(2 * len(owner) if name == "encode" else len(owner))
