"""`jdpo dpo --help KEY`: everything about one key."""

from __future__ import annotations

import shutil
import textwrap

from jdpo.config import Settings, command_of
from jdpo.config.key_specs import REQUIRED, KeySpec, as_yaml, key_specs
from jdpo.loss_specs import LOSSES
from jdpo.words import nearest

_KINDS = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "dict": "map of keys to values",
    "list": "list; a single value is a list of one",
    "text or list": "text, or list of texts",
    "group": "group of keys",
}


def key_help(command: str, cls: type[Settings], key: str) -> str:
    """Returns a page about one key: description, type, range, choices, default, and how to write it.

    Args:
      command: the command, for the first line.
      cls: its settings.
      key: its name, with the group that it is in.

    Raises:
      ValueError: there is no such key; it names the nearest one.
    """
    specs = {spec.name: spec for spec in key_specs(cls)}
    if key not in specs:
        raise ValueError(f"--help: unknown key {key!r}; {_hint(command, key, list(specs))}")
    spec = specs[key]
    # Long lines are hard to read, however wide the terminal is.
    width = min(shutil.get_terminal_size().columns, 100) - 2
    rows = [("type", _type(spec))]
    if spec.bounds:
        rows.append(("range", spec.bounds + (" (each entry)" if spec.kind == "list" else "")))
    if spec.choices:
        rows.append(("choices", ", ".join(spec.choices)))
    rows.append(("default", "none; the key is required" if spec.default is REQUIRED else as_yaml(spec.default)))
    if losses := [name for name, loss in LOSSES.items() if key in loss.options]:
        rows.append(("losses", ", ".join(losses)))
    if inner := [name.removeprefix(f"{key}.") for name in specs if name.startswith(f"{key}.")]:
        rows.append(("keys", ", ".join(inner)))
    rows += _examples(spec)
    lines = [f"{key} ({spec.heading}; `jdpo {command}`)" if "." not in key else f"{key} (`jdpo {command}`)", ""]
    lines += textwrap.wrap(spec.description, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines.append("")
    for name, text in rows:
        lines += textwrap.wrap(
            text, width, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16, break_on_hyphens=False
        )
    return "\n".join(lines)


def _hint(command: str, key: str, known: list[str]) -> str:
    if elsewhere := command_of(key):
        return elsewhere
    short = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = nearest(key, [*known, *short])
    return f"`jdpo {command} --help` lists the keys" if near is None else f"did you mean {short.get(near, near)!r}?"


def _type(spec: KeySpec) -> str:
    words = _KINDS[spec.kind]
    if spec.group is not None and spec.kind == "list":
        return "one or more groups of keys, or paths"
    if spec.kind == "group" and spec.switch:
        words += ", or true or false"
    return words + (", or null" if spec.nullable else "")


def _examples(spec: KeySpec) -> list[tuple[str, str]]:
    """Returns how the key is written on the command line and in YAML."""
    value = spec.example
    if not value and spec.default is not REQUIRED and spec.default not in (None, []):
        other = [choice for choice in spec.choices if choice != spec.default]
        # An example that differs from the default says more.
        value = other[-1] if other else as_yaml(spec.default)
    if spec.kind == "bool":
        value = "false" if spec.default is True else "true"
    group, _, inner = spec.name.rpartition(".")
    value = value or "VALUE"
    if group.endswith("datasets"):
        path = "" if inner == "path" else "path: pairs.jsonl, "
        return [("in YAML", f"{group}: [{{{path}{inner}: {value}}}]")]
    # The shell would split or expand these characters.
    quoted = f"'{value}'" if set(value) & set(" {}[]") else value
    in_yaml = f"{group}: {{{inner}: {value}}}" if group else f"{spec.name}: {value}"
    return [("command line", f"--{spec.name} {quoted}"), ("in YAML", in_yaml)]
