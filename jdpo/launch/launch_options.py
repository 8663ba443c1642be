"""The options of a launcher: a dataclass, whose fields are the options of its command line."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar, get_type_hints

T = TypeVar("T")


class LaunchOption(NamedTuple):
    """An option of a launcher's command line.

    Attributes:
      name: of the field, which is the option without its dashes.
      kind: str, int or bool; tuple for an option that may be given several times.
      default: without the option; None if it is required and has no default.
      metavar: the word for its value in the help.
      help: what it does.
      required: the message if it is missing, such as where to get it; empty if it is not required.
    """

    name: str
    kind: type
    default: Any
    metavar: str
    help: str
    required: str


def option(metavar: str, help: str, *, default: Any = "", required: str = "") -> Any:
    """Returns a field of a launcher's options.

    Args:
      metavar: the word for the value in the help; empty for a switch.
      required: the message if it is missing; the option then has no default.
    """
    metadata = {"metavar": metavar, "help": help, "required": required}
    return dataclasses.field(metadata=metadata) if required else dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> list[LaunchOption]:
    """Returns the options of a launcher, in the order of its fields."""
    kinds = get_type_hints(cls)
    return [
        LaunchOption(
            name=field.name,
            kind=tuple if getattr(kinds[field.name], "__origin__", None) is tuple else kinds[field.name],
            default=None if field.default is dataclasses.MISSING else field.default,
            **field.metadata,
        )
        for field in dataclasses.fields(cls)
    ]


def read_options(cls: type[T], given: dict[str, Any], launcher: str) -> T:
    """Returns the options of a launcher from the values of a command line.

    Args:
      given: name -> value; None where the option was not given.

    Raises:
      ValueError: a required option is missing.
    """
    for each in options_of(cls):
        if each.required and not given.get(each.name):
            raise ValueError(f"`jdpo launch {launcher}` needs --{each.name} {each.metavar}: {each.required}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return cls(**{name: value for name, value in values.items() if value is not None})


def pairs_of(words: tuple[str, ...], name: str) -> dict[str, str]:
    """Returns the NAME=VALUE words of an option that may be given several times.

    Raises:
      ValueError: a word without `=`.

    >>> pairs_of(("A=1", "B=x=y"), "env")
    {'A': '1', 'B': 'x=y'}
    """
    for word in words:
        if not word.partition("=")[0].strip() or "=" not in word:
            raise ValueError(f"--{name} {word}: expected NAME=VALUE")
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}
