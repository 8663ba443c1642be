"""The parts of keys: the types of their values, their descriptions, and the decorator of settings classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar, dataclass_transform, overload

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

T = TypeVar("T")

# A folder may be called 2024: YAML reads a number, the path stays text.
_STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def key(
    default: Any,
    description: str,
    *,
    example: str | None = None,
    choices: Sequence[str] = (),
    required_by_commands: bool = False,
) -> Any:
    """A key with its default.

    Args:
      description: whole sentences, for `--help`, messages and the class's docstring.
      example: a value as YAML, for `--help KEY`; None: the default, or the last choice, is example enough.
      choices: the values that it may have, if its type does not tell; they are checked elsewhere.
      required_by_commands: True for a key that a command needs, but that Python code may give in another way.
    """
    examples = None if example is None else [example]
    extra: Any = {"choices": list(choices), "required": required_by_commands}
    return Field(default=default, description=description, examples=examples, json_schema_extra=extra)


def required(description: str, *, example: str) -> Any:
    """A key without a default; see `key`."""
    return Field(description=description, examples=[example])


class Settings:
    """The base of all classes of settings."""

    heading: ClassVar[str] = "Keys"
    """The line above the keys of the class in `--help` and docstrings."""


# Type checkers see no frozen dataclass: mypy would take what a converted key accepts for what it reads as.
@dataclass_transform(kw_only_default=True, field_specifiers=(required,))
def settings(cls: type[T]) -> type[T]:
    """Makes a class of keys a frozen, validated dataclass, and describes each key in its docstring."""
    # Frozen: many functions share one config, and none may change it for the others.
    made: Any = dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)(cls)
    made.__doc__ = f"{cls.__doc__}\n\n{_attributes(made)}"
    checked: type[T] = made
    return checked


def _attributes(cls: Any) -> str:
    lines, heading = [], ""
    for name, info in fields_of(cls).items():
        if (above := heading_of(cls, name)) != heading:
            lines += [f"{above}:"]
            heading = above
        lines += [f"  {name}: {info.description}"]
    return "\n".join(lines)


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """Returns what pydantic knows of each key of a class of settings, in order."""
    fields: dict[str, FieldInfo] = vars(cls)["__pydantic_fields__"]
    return fields


def heading_of(cls: type, name: str) -> str:
    """Returns the heading of the group of settings that declares a key."""
    groups = [base for base in reversed(cls.__mro__) if issubclass(base, Settings) and base is not Settings]
    return next(group.heading for group in groups if name in fields_of(group))


if TYPE_CHECKING:
    Given = TypeVar("Given", contravariant=True)
    Read = TypeVar("Read", covariant=True)

    class Converted(Generic[Given, Read]):
        """For type checkers: a key that may be given in more forms than it is read in."""

        @overload
        def __get__(self, instance: None, owner: Any) -> Any: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> Read: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: Given) -> None: ...


def no_bool(value: Any) -> Any:
    """Keeps `beta: true` from becoming 1.0."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_bool", "expected a number, found true or false")
    return value


def _not_blank(value: str) -> str:
    """Refuses what an unset shell variable leaves: an empty path would be the current folder."""
    if not value.strip():
        raise PydanticCustomError("blank_text", "expected a text, but it is empty")
    return value


def as_list(value: Any) -> Any:
    """Reads one entry as a list of one."""
    # A text is a sequence too, so the types of single entries are named.
    return [value] if isinstance(value, str | Mapping | int | float) else value


def path_as_text(value: Any) -> Any:
    """Reads a `Path`, as Python code has it, as the text of a config."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Text = Annotated[str, AfterValidator(_not_blank)]
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
NonNegativeFloat = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
