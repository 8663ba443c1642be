"""What is wrong with settings, in words: the key, where it is, and what to write instead."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import ValidationError

from jdpo.config.foreign_keys import FOREIGN, OTHER_COMMANDS, RENAMED, VALUES
from jdpo.config.keys import CONFIGS
from jdpo.config.value_types import Settings, fields_of
from jdpo.safe_text import terminal
from jdpo.words import nearest

COMMAND_LINE = "on the command line"
"""Origin of a key that the command line gives."""

_LONGEST_VALUE = 60


def keys_of(cls: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a config class with its description, groups opened."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, str] = {}
    for name, info in fields_of(cls).items():
        keys[prefix + name] = info.description or ""
        group = group_class(hints[name])
        if group is not None:
            keys |= keys_of(group, f"{prefix}{name}.")
    return keys


def required_keys(cls: type[Settings]) -> list[str]:
    """Returns the top-level keys that have no default."""
    return [name for name, info in fields_of(cls).items() if info.is_required()]


def group_class(hint: Any) -> type | None:
    """The dataclass in `MeshConfig` or `tuple[DatasetConfig, ...]`, or None for a plain value."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if typing.get_origin(hint) in (tuple, Annotated, typing.Union, types.UnionType):
        return next(filter(None, map(group_class, typing.get_args(hint))), None)
    return None


def explain(cls: type, error: ValidationError, origins: Mapping[str, str]) -> str:
    """Every fault of a config in a line of its own.

    Args:
      cls: the config's class.
      error: what pydantic found.
      origins: top-level key -> where its value is from.
    """
    return "\n".join(_explain(cls, problem, origins) for problem in error.errors())


def _explain(cls: type, problem: Any, origins: Mapping[str, str]) -> str:
    path = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(map(str, path))
    where = origins.get(str(path[0]), "in the config") if path else "in the config"
    value = problem["input"]
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key!r} {where}; {_instead_of(cls, path, value, where)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"missing key {key!r}: {_description(cls, path)}"
    if problem["type"] == "blank_text":
        return f"missing value of key {key!r} {where}: it is empty ({_description(cls, path).rstrip('.')})"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    found = "has no value" if value is None else f"is {value!r}"
    meant = VALUES.get(_dotted(path), {}).get(str(value).lower())
    hint = f"; here it is {_setting(_dotted(path), meant, where)}" if meant is not None else ""
    return f"{key!r} {where} {found}: {message} ({_description(cls, path).rstrip('.')}){hint}"


def no_value(key: str, cls: type) -> str:
    """Says that the command line names a key and gives no value for it."""
    return f"--{key} needs a value: {keys_of(cls).get(key, 'see --help')}"


def command_of(key: str) -> str:
    """Says which commands have a key or an option; empty if none has."""
    commands = [command for command, cls in CONFIGS.items() if key in keys_of(cls)]
    if commands:
        return f"it is a key of {' and '.join(f'`jdpo {command}`' for command in commands)}"
    return f"it is an option of `jdpo {OTHER_COMMANDS[key]}`" if key in OTHER_COMMANDS else ""


def _instead_of(cls: type, path: Sequence[Any], value: Any, where: str) -> str:
    """What to write instead of an unknown key."""
    known, dotted, name = keys_of(cls), _dotted(path), str(path[-1])
    if dotted not in RENAMED and (elsewhere := command_of(dotted)):
        return elsewhere
    for candidate in dict.fromkeys((dotted, name)):
        if said := _translated(candidate, known, value, where):
            return said
    similar = nearest(dotted, known) or nearest(name, dict.fromkeys(key.split(".")[-1] for key in known))
    if similar is not None:
        full = next(key for key in known if similar in (key, key.split(".")[-1]))
        return f"did you mean {full!r}?"
    return "`--help` lists the keys"


def _translated(name: str, known: Mapping[str, str], value: Any, where: str) -> str:
    """What another trainer's key is here, with its value; empty where it is not one."""
    if name in RENAMED:
        key = RENAMED[name]
        if key not in known:
            return f"`jdpo dpo` has it as {key!r}"
        shown = _as_yaml(value)
        if key == "lora.target_modules" and isinstance(value, str) and "," in value:
            shown = f"[{shown}]"  # names in one text, as on the command lines of others
        meant = VALUES.get(key, {}).get(shown.lower(), shown)
        return f"here it is called {key!r}" + (f": {_setting(key, meant, where)}" if meant else "")
    if name not in FOREIGN:
        return ""
    nearest, values, note = FOREIGN[name]
    if nearest is None:
        return f"jdpo has no such key: {note}"
    note = f" ({note})" if note else ""
    if nearest not in known:
        command = "dpo" if nearest in keys_of(CONFIGS["dpo"]) else "sft"
        return f"the nearest key is {nearest!r} of `jdpo {command}`{note}"
    given = _as_yaml(value)
    translated = given if "*" in values else values.get(given.lower(), "")
    if translated is None:
        return f"leave it out{note}"
    if not translated:
        return f"the nearest key is {nearest!r}{note}"
    return f"here it is {_setting(nearest, translated, where)}{note}"


def _setting(key: str, value: str, where: str) -> str:
    """A key with its value as it is written where it comes from."""
    group, _, inner = key.partition(".")
    if group == "datasets" and inner:
        return f"`{inner}: {value}`"
    if where == COMMAND_LINE:
        return f"`--{key} {value}`"
    return f"`{group}: {{{inner}: {value}}}`" if inner else f"`{key}: {value}`"


def _as_yaml(value: Any) -> str:
    """Returns a value as one line of YAML, text without quotes; empty if it is long."""
    text = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    )
    text = terminal(text.removesuffix("\n").removesuffix("\n..."))
    return text if len(text) <= _LONGEST_VALUE else ""


def _dotted(path: Sequence[Any]) -> str:
    """A key without the places of lists: `datasets.0.path` is `datasets.path`."""
    return ".".join(str(part) for part in path if not isinstance(part, int))


def _description(cls: type, path: Sequence[Any]) -> str:
    return keys_of(cls).get(_dotted(path), "see --help")
