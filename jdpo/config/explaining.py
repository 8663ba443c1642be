"""Messages about faults of a config: the key, where it is from, and what to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from jdpo.config.foreign_keys import FOREIGN, OTHER_COMMANDS, RENAMED, VALUES
from jdpo.config.key_specs import REQUIRED, key_specs
from jdpo.config.keys import CONFIGS
from jdpo.config.value_types import Settings
from jdpo.config.yaml_text import load_yaml
from jdpo.safe_text import terminal
from jdpo.words import nearest

COMMAND_LINE = "on the command line"
"""The origin of a key of the command line, as messages name it."""

IN_PYTHON = "in the call"
"""The origin of a key that Python code gives a class of settings."""

_LONGEST_VALUE = 60


def keys_of(cls: type[Settings]) -> dict[str, str]:
    """Returns every key of a class of settings, groups opened, with its description."""
    return {spec.name: spec.description for spec in key_specs(cls)}


def required_keys(cls: type[Settings]) -> list[str]:
    """Returns the top-level keys that have no default."""
    return [spec.name for spec in key_specs(cls) if spec.default is REQUIRED and "." not in spec.name]


def explain(cls: type[Settings], problems: Sequence[Any], origins: Mapping[str, str]) -> str:
    """Describes every fault of a config, each on a line of its own.

    Foreign keys that belong to one group, such as `lora_r` and `lora_alpha`, share a line, and a key that a foreign key
    supplies is not called missing.

    Args:
      cls: the config's class.
      problems: what pydantic found, see `pydantic.ValidationError.errors`.
      origins: top-level key -> where its value is from.
    """
    faults = [_Fault.of(cls, problem, origins) for problem in problems]
    faults.sort(key=lambda fault: fault.is_missing)  # a missing key may be one that is misspelt
    supplied = {fault.instead.key for fault in faults if fault.instead is not None}
    by_group: dict[tuple[str, str], list[_Fault]] = {}
    for fault in faults:
        if fault.group:
            by_group.setdefault((fault.group, fault.where), []).append(fault)
    # Faults of one group share a line: four lines of `lora_...` keys would hide the one setting to write.
    lines = []
    for fault in faults:
        same = by_group.get((fault.group, fault.where), [])
        if fault.is_missing and _dotted(fault.path) in supplied:
            continue
        if len(same) < 2:
            lines.append(fault.line(cls))
        elif fault is same[0]:
            lines.append(_line_of_group(fault.group, same))
    return "\n".join(dict.fromkeys(lines))  # a union reports a fault once per member


def explain_call(cls: type[Settings], problems: Sequence[Any]) -> str:
    """Describes every fault of the call of a constructor; see `explain`."""
    named = (str(problem["loc"][0]) for problem in problems if problem["loc"])
    return explain(cls, problems, dict.fromkeys(named, IN_PYTHON))


class _Instead(NamedTuple):
    """A key of jdpo to write instead of a foreign one, its value in YAML ("" if unknown), and a note."""

    key: str
    value: str
    note: str
    renamed: bool


class _Fault(NamedTuple):
    """One fault that pydantic found: the path of the key, where it is from, and what to write instead."""

    problem: Any
    path: list[Any]
    where: str
    instead: _Instead | None

    @classmethod
    def of(cls, config: type[Settings], problem: Any, origins: Mapping[str, str]) -> _Fault:
        # pydantic puts the names of validators into the path; they are not keys.
        path = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        where = origins.get(str(path[0]), "in the config") if path else "in the config"
        fault = cls(problem, path, where, None)
        if fault.is_unknown:
            return fault._replace(instead=_instead_of(config, path, problem["input"]))
        while len(path) > 1 and _dotted(path) not in keys_of(config):
            del path[-1]  # the member of a union that pydantic tried
        return fault

    @property
    def is_unknown(self) -> bool:
        return self.problem["type"] in ("unexpected_keyword_argument", "extra_forbidden")

    @property
    def is_missing(self) -> bool:
        return self.problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument")

    @property
    def group(self) -> str:
        """The group of what to write instead, if it is a setting of one; else empty."""
        if self.instead is None or not self.instead.value or len(self.path) > 1:
            return ""
        group, dot, _ = self.instead.key.partition(".")
        return group if dot or (group, self.instead.value) == ("lora", "true") else ""

    def line(self, cls: type[Settings]) -> str:
        if not self.path:  # a check of the whole config, whose message names the keys
            return str(self.problem["msg"]).removeprefix("Value error, ")
        key = ".".join(map(str, self.path))
        if self.is_unknown:
            return f"unknown key {key!r} {self.where}; {self._advice(cls)}"
        spec = next((spec for spec in key_specs(cls) if spec.name == _dotted(self.path)), None)
        # The first sentence.
        about = f" ({spec.description.partition('. ')[0].rstrip('.')})" if spec is not None else ""
        if self.is_missing:
            return f"missing key {key!r}{about}"
        if self.problem["type"] == "blank_text":
            return f"missing value of key {key!r} {self.where}: it is empty{about}"
        if self.problem["type"] == "unknown_loss":
            return str(self.problem["msg"])
        value = self.problem["input"]
        in_python = self.where == IN_PYTHON
        shown = str(value).lower() if isinstance(value, bool) and not in_python else terminal(repr(value))
        found = "has no value" if value is None and not in_python else f"is {shown}"
        if spec is None or self.problem["type"] == "value_error":  # a check of jdpo's own has a message of its own
            return f"{key!r} {self.where} {found}: {self.problem['msg'].removeprefix('Value error, ')}"
        expected = "a finite number" if self.problem["type"] == "finite_number" else spec.expected
        if spec.kind == "dict" and self.problem["type"] != "dict_type":  # of one of the map's values
            key += f".{terminal(str(self.problem['loc'][len(self.path)]))}"
            expected = "a single value" if isinstance(value, dict | list) else "a text"
        meant = VALUES.get(spec.name, {}).get(str(value).lower())
        if meant is None and spec.nullable and str(value).lower() == "none":
            meant = "null"  # Python's spelling
        hint = f"; here it is {_setting(spec.name, meant, self.where)}" if meant is not None else ""
        return f"{key!r} {self.where} {found}: expected {expected}{about}{hint}"

    def _advice(self, cls: type[Settings]) -> str:
        if self.instead is None:
            return _advice_without_key(cls, self.path, self.where)
        key, value, note, renamed = self.instead
        called = f"here it is called {key!r}" if renamed else ""
        setting = _setting(key, value, self.where) if value else ""
        if called:
            return f"{called}: {setting}" if setting else called
        return f"here it is {setting}{note}" if setting else f"the nearest key is {key!r}{note}"


def _line_of_group(group: str, faults: Sequence[_Fault]) -> str:
    """Describes foreign keys that belong to one group, with one setting for all of them."""
    names = [repr(".".join(map(str, fault.path))) for fault in faults]
    where = faults[0].where
    settings = {fault.instead.key: fault.instead.value for fault in faults if fault.instead is not None}
    inner = {key.partition(".")[2]: value for key, value in settings.items() if "." in key}
    if not inner:
        setting = _setting(group, "true", where)
    elif where == IN_PYTHON:
        setting = f"`{group}={{{', '.join(_entry(key, value) for key, value in inner.items())}}}`"
    elif where == COMMAND_LINE:
        setting = "`" + " ".join(f"--{group}.{key} {value}" for key, value in inner.items()) + "`"
    else:
        setting = f"`{group}: {{{', '.join(f'{key}: {value}' for key, value in inner.items())}}}`"
    notes = "".join(dict.fromkeys(fault.instead.note for fault in faults if fault.instead is not None))
    return f"unknown keys {', '.join(names[:-1])} and {names[-1]} {where}; here they are {setting}{notes}"


def no_value(key: str, cls: type[Settings]) -> str:
    """Describes a key that the command line names without a value."""
    return f"--{key} needs a value: {keys_of(cls).get(key, 'see --help')}"


def command_of(key: str) -> str:
    """Returns which commands have a key or an option, as a clause; empty if none has."""
    commands = [command for command, cls in CONFIGS.items() if key in keys_of(cls)]
    if commands:
        return f"it is a key of {' and '.join(f'`jdpo {command}`' for command in commands)}"
    return f"it is an option of `jdpo {OTHER_COMMANDS[key]}`" if key in OTHER_COMMANDS else ""


def _instead_of(cls: type[Settings], path: Sequence[Any], value: Any) -> _Instead | None:
    """Returns the key of `cls` that means the same as another trainer's key, or None."""
    known = keys_of(cls)
    for name in dict.fromkeys((_dotted(path), str(path[-1]))):
        if name not in RENAMED and command_of(name):
            return None
        if RENAMED.get(name) in known:
            return _Instead(RENAMED[name], _renamed_value(RENAMED[name], value), "", renamed=True)
        foreign = FOREIGN.get(name)
        if foreign is not None and foreign.key in known:
            given = _as_yaml(value)
            translated = given if "*" in foreign.values else foreign.values.get(given.lower(), "")
            if translated is None:
                return None
            return _Instead(foreign.key, translated, f" ({foreign.note})" if foreign.note else "", renamed=False)
        if name in RENAMED or foreign is not None:
            return None
    return None


def _renamed_value(key: str, value: Any) -> str:
    shown = _as_yaml(value)
    if key == "lora.target_modules" and isinstance(value, str) and "," in value:
        shown = f"[{shown}]"  # names in one text, as on the command lines of others
    return VALUES.get(key, {}).get(shown.lower(), shown) or ""


def _advice_without_key(cls: type[Settings], path: Sequence[Any], where: str) -> str:
    """Returns what to do about an unknown key that means the same as no key of `cls`."""
    # From the most to the least certain: a key of another command, a known foreign key, a similar name.
    known, dotted, name = keys_of(cls), _dotted(path), str(path[-1])
    if dotted not in RENAMED and (elsewhere := command_of(dotted)):
        return elsewhere
    for candidate in dict.fromkeys((dotted, name)):
        if candidate in RENAMED:
            return f"`jdpo dpo` has it as {RENAMED[candidate]!r}"
        if candidate in FOREIGN:
            return _advice_of_foreign(candidate, known)
    similar = nearest(dotted, known) or nearest(name, dict.fromkeys(key.split(".")[-1] for key in known))
    if similar is not None:
        full = next(key for key in known if similar in (key, key.split(".")[-1]))
        return f"did you mean {full!r}?"
    if (option := nearest(name, OTHER_COMMANDS, cutoff=0.75)) is not None:
        return f"did you mean `--{option}`, an option of `jdpo {OTHER_COMMANDS[option]}`?"
    return f"help({cls.__name__}) lists the keys" if where == IN_PYTHON else "`--help` lists the keys"


def _advice_of_foreign(name: str, known: Mapping[str, str]) -> str:
    key, _, note = FOREIGN[name]
    if key is None:
        return f"jdpo has no such key: {note}"
    note = f" ({note})" if note else ""
    if key not in known:
        command = "dpo" if key in keys_of(CONFIGS["dpo"]) else "sft"
        return f"the nearest key is {key!r} of `jdpo {command}`{note}"
    return f"leave it out{note}"


def _setting(key: str, value: str, where: str) -> str:
    """Returns a key with its value, written as it is where the fault was found."""
    group, _, inner = key.partition(".")
    if group == "datasets" and inner:
        return f"`{_entry(inner, value)}`" if where == IN_PYTHON else f"`{inner}: {value}`"
    if where == IN_PYTHON:
        return f"`{group}={{{_entry(inner, value)}}}`" if inner else f"`{key}={_in_python(value)}`"
    if where == COMMAND_LINE:
        return f"`--{key} {value}`"
    return f"`{group}: {{{inner}: {value}}}`" if inner else f"`{key}: {value}`"


def _entry(key: str, value: str) -> str:
    """Returns a key with its value, given as YAML, as an entry of a dict of Python."""
    return f'"{key}": {_in_python(value)}'


def _in_python(value: str) -> str:
    """Returns a value that is given as YAML as Python code."""
    try:
        found = load_yaml(value)
    except yaml.YAMLError:
        found = value  # a text without quotes
    return json.dumps(found, ensure_ascii=False) if isinstance(found, str) else repr(found)


def _as_yaml(value: Any) -> str:
    """Returns a value as one line of YAML, text without quotes; empty if it is long, or no plain data."""
    try:
        text = (
            value
            if isinstance(value, str)
            else yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        )
    except yaml.YAMLError:  # an object that Python code gave
        return ""
    text = terminal(text.removesuffix("\n").removesuffix("\n..."))
    return text if len(text) <= _LONGEST_VALUE else ""


def _dotted(path: Sequence[Any]) -> str:
    """Returns a key without positions in lists: `datasets.0.path` becomes `datasets.path`."""
    return ".".join(str(part) for part in path if not isinstance(part, int))
