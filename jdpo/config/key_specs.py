"""The keys of a class of settings as plain data: name, type, range, choices, default and description of each."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from jdpo.config.value_types import Settings, fields_of, heading_of

REQUIRED = object()
"""The default of a key that has none."""

_TYPES = {
    "int": "INT",
    "float": "FLOAT",
    "str": "TEXT",
    "bool": "BOOL",
    "dict": "MAP",
    "list": "LIST",
    "text or list": "LIST",
}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "dict": "a map of keys to values",
    "list": "a list",
    "text or list": "a text or a list",
    "group": "a group of keys",
}
_LONGEST_METAVAR = 60
"""Choices that take more characters are listed in the text of the help."""
_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeySpec:
    """A key of a run's config.

    Attributes:
      name: with the group that it is in, such as `mesh.fsdp`.
      heading: of the group of settings that declares it.
      description: whole sentences.
      kind: int, float, str, bool, dict, list, text or list (a text means something else than a list of one), or group
        for a key with keys of its own.
      default: as plain data, or REQUIRED.
      nullable: whether it may be null.
      bounds: its range in words, such as `greater than 0`; empty for any value.
      choices: its values, if they are few.
      example: a value as YAML; empty if the default or the first choice serves.
      group: the class of the keys that it holds.
      switch: whether it may be given without a value, which then is true.
    """

    name: str
    heading: str
    description: str
    kind: str
    default: Any
    nullable: bool
    bounds: str
    choices: tuple[str, ...]
    example: str
    group: type[Settings] | None
    switch: bool

    @property
    def expected(self) -> str:
        """The values that it takes, in words: `a number greater than 0`."""
        if self.choices:
            words = ", ".join(self.choices[:-1]) + f" or {self.choices[-1]}"
            return f"one or more of {words}" if self.kind == "list" else words
        kind = _EXPECTED[self.kind] + (f" such as {self.example}" if self.group is not None and self.example else "")
        if self.kind == "list" and self.bounds:
            return f"{kind} whose entries are {self.bounds}"
        return " ".join(filter(None, (kind, "of" if self.bounds.startswith("at") else "", self.bounds)))

    @property
    def metavar(self) -> str:
        """The placeholder of its value in `--help`."""
        listed = "{" + ",".join(self.choices) + "}"
        if self.choices and len(listed) <= _LONGEST_METAVAR:
            return listed
        return _TYPES.get(self.kind, "GROUP")


def key_specs(cls: Any) -> tuple[KeySpec, ...]:
    """Returns the keys of a class of settings in order, each group followed by the keys that it holds."""
    return _key_specs(cls, "")


@functools.cache
def _key_specs(cls: Any, prefix: str) -> tuple[KeySpec, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    specs = []
    for name, info in fields_of(cls).items():
        spec = _spec_of(cls, name, info, hints[name], prefix)
        specs.append(spec)
        if spec.group is not None:
            group: Any = spec.group  # mypy does not take a class for the hashable that it is
            specs += _key_specs(group, f"{spec.name}.")
    return tuple(specs)


def _spec_of(cls: type[Settings], name: str, info: FieldInfo, hint: Any, prefix: str) -> KeySpec:
    members = list(_members(hint))
    # None is an answer of its own (`nullable`), so it is not among the types.
    plain = [member for member, _ in members if member is not type(None)]
    group = next((one for one in plain if isinstance(one, type) and issubclass(one, Settings)), None)
    return KeySpec(
        name=prefix + name,
        heading=heading_of(cls, name),
        description=info.description or "",
        kind="group" if group is not None and not _is_list(hint) else _kind_of(hint, plain),
        default=REQUIRED if _is_required(info) else TypeAdapter(Any).dump_python(info.default, mode="json"),
        nullable=type(None) in [member for member, _ in members],
        bounds=" and ".join(_bounds(info, members)),
        choices=_choices(info, plain),
        example=(info.examples or [""])[0],
        group=group,
        # `Literal[False]` marks a group that can be turned off; true then turns it on.
        switch=bool in plain or False in [value for one in plain for value in _literals(one)],
    )


def _is_required(info: FieldInfo) -> bool:
    extra: Any = info.json_schema_extra or {}
    return info.is_required() or bool(extra.get("required"))


def _members(hint: Any, metadata: Sequence[Any] = ()) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yields the types that a value may have, each with its metadata: those of unions and of the entries of tuples."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *more = typing.get_args(hint)
        yield from _members(inner, more)
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member, metadata)
    elif origin is tuple:
        yield from _members(typing.get_args(hint)[0], metadata)
    else:
        yield hint, metadata


def _kind_of(hint: Any, plain: Sequence[Any]) -> str:
    if _is_list(hint):
        return "text or list" if _is_text(hint) else "list"
    kind = plain[0]
    if typing.get_origin(kind) is Literal:
        return "str"
    # Mapping[str, str] -> Mapping
    kind = typing.get_origin(kind) or kind
    return kind.__name__ if kind.__name__ in _TYPES else "dict"


def _is_list(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated or origin in (typing.Union, types.UnionType):
        return any(_is_list(member) for member in typing.get_args(hint))
    return origin is tuple


def _is_text(hint: Any) -> bool:
    """Returns whether a value may be a text, as opposed to a list of texts."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _is_text(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_is_text(member) for member in typing.get_args(hint))
    return hint is str


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _choices(info: FieldInfo, plain: Sequence[Any]) -> tuple[str, ...]:
    extra: Any = info.json_schema_extra or {}
    return tuple(extra.get("choices", ())) or tuple(
        value for one in plain for value in _literals(one) if isinstance(value, str)
    )


def _bounds(info: FieldInfo, members: Sequence[tuple[Any, Sequence[Any]]]) -> dict[str, None]:
    """Returns the bounds of a key, or of its entries, in words, in order."""
    nested = [item for _, metadata in members for item in metadata if isinstance(item, FieldInfo)]
    return {
        f"{words} {_figure(limit)}": None
        for bound in (*info.metadata, *(bound for item in nested for bound in item.metadata))
        for name, words in _BOUNDS.items()
        if (limit := getattr(bound, name, None)) is not None
    }


def _figure(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def as_yaml(value: Any) -> str:
    """Returns a value in the spelling of YAML, on one line.

    >>> as_yaml(None), as_yaml(True), as_yaml(1e-06), as_yaml(["sigmoid"]), as_yaml({"fsdp": -1})
    ('null', 'true', '1e-6', '[sigmoid]', '{fsdp: -1}')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        # Python writes 1e-06.
        return repr(value).replace("e-0", "e-")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return str(value)
