"""Settings from YAML and the command line, and back to YAML.

A YAML states only what differs from the defaults, and the command line has the last word:

    defaults  <  CONFIG.yaml  <  --key value | --key=value | key=value | --group.key value
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from jdpo.config.addresses import refuse_passwords, without_queries
from jdpo.config.explaining import COMMAND_LINE, explain, keys_of, no_value, required_keys
from jdpo.config.groups import LOSS_SYNONYMS
from jdpo.config.key_specs import key_specs
from jdpo.config.value_types import Settings, fields_of
from jdpo.config.yaml_text import dump_yaml, load_yaml

C = TypeVar("C", bound=Settings)

NAMED_GROUPS = {"optimizer": "name"}
"""Groups that may be given as one word -> the key within the group that the word is the value of."""

SWITCHED_GROUPS = ("lora",)
"""Groups that are turned on, with their defaults, by `true` or by any of their keys."""

SYNONYMS = {"loss_type": LOSS_SYNONYMS}
"""Keys with other names for some of their values; every other foreign value is an error."""


def load_config(
    cls: type[C],
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = lambda text: None,
    *,
    complete: bool = False,
) -> C:
    """Reads a run's settings: defaults, then the YAML file, then `key=value` overrides.

    Args:
      cls: a class of settings, such as those of a command.
      path: a YAML file holding a mapping, or None.
      overrides: words of the command line, as `--key value`, `--key=value` or `key=value`; values are YAML. A switch
        without a value is true.
      log: takes a line for each value that is replaced by its usual name.
      complete: True: `datasets` must be there, as for a command; False: `jdpo.train` may be given the rows.

    Returns:
      A validated, frozen config.

    Raises:
      ValueError: naming every unknown key (with the nearest one), wrong value and missing key, or the key of an
        address that holds a password.
    """
    if isinstance(overrides, str | Mapping):
        raise ValueError('overrides: expected a list of words, such as ["beta=0.2"]')
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_yaml(Path(path))
        origins = dict.fromkeys(values, f"in {path}")
    for group, key in NAMED_GROUPS.items():
        if isinstance(values.get(group), str):
            values[group] = {key: values[group]}
    specs = key_specs(cls)
    texts = {spec.name for spec in specs if spec.kind == "str" and not spec.choices}
    switches = {spec.name for spec in specs if spec.switch}
    # In order: a later word overrides an earlier one.
    for key, text in parse_overrides(overrides):
        # An empty value is what an unset shell variable leaves.
        if not text and (text == "" or (key in keys_of(cls) and key not in switches)):
            raise ValueError(no_value(key, cls))
        # A switch without a value turns its key on.
        value = True if text is None else _parse_value(key, text, is_text=key in texts)
        group = key.split(".")[0]
        if group in SWITCHED_GROUPS:
            before = values.get(group)
            if key == group and value is True and isinstance(before, Mapping):
                continue  # it is on already, with keys of its own
            if key != group and (before is None or isinstance(before, bool)):
                values[group] = {}
        # `--optimizer lion` changes only the name: other keys that the file has in this group remain.
        named = key in NAMED_GROUPS and isinstance(value, str)
        _set_nested(values, f"{key}.{NAMED_GROUPS[key]}" if named else key, value)
        origins[group] = COMMAND_LINE
    # Before validation, whose messages would show the value.
    refuse_passwords(values)
    for key, synonyms in SYNONYMS.items():
        if key in values:
            values[key] = _without_synonyms(key, values[key], synonyms, log)
    # pydantic reports the other missing keys.
    missing = [key for key in required_keys(cls) if key not in values and not fields_of(cls)[key].is_required()]
    problems: list[Any] = [{"type": "missing", "loc": (key,), "input": None} for key in missing if complete]
    try:
        config = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problems = [*error.errors(), *problems]
    if problems:
        raise ValueError(explain(cls, problems, origins))
    return config


def _without_synonyms(key: str, value: Any, synonyms: Mapping[str, str], log: Callable[[str], None]) -> Any:
    """Replaces other names of a value, or of the values in a list, by the usual ones, and logs it."""
    if isinstance(value, list):
        return [_without_synonyms(key, one, synonyms, log) for one in value]
    if not isinstance(value, str) or value not in synonyms:
        return value
    log(f"{key}: {value} means {synonyms[value]}")
    return synonyms[value]


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (dotted key, text of the value) from words of the command line; None where a key comes without a value.

    >>> list(parse_overrides(["--beta", "0.2", "mesh.fsdp=4", "--shuffle=false", "--load_best_model_at_end"]))
    [('beta', '0.2'), ('mesh.fsdp', '4'), ('shuffle', 'false'), ('load_best_model_at_end', None)]
    """
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, text = word.removeprefix("--").partition("=")
        value: str | None = text
        if not equals:
            if not word.startswith("--"):
                raise unreadable(word)
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = None
        yield key.replace("-", "_"), value


def unreadable(word: str) -> ValueError:
    """Returns the error about a word of the command line that is in none of the forms of a key."""
    return ValueError(
        f"cannot read {word!r}: expected --key value, --key=value or key=value, and the config file first or after "
        "--config"
    )


def _parse_value(key: str, text: str, *, is_text: bool) -> Any:
    """Reads a command-line value as YAML, but keeps texts as they are: 0123 and 2024-01-01 may be folders."""
    if is_text:
        return None if text == "null" else text
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error  # without the place, as the value is shown whole
        raise ValueError(
            f"cannot read the value of {key!r}, {text!r}, as YAML ({reason}); if it is a text, put quotes within the "
            f"quotes of your shell: --{key} '\"...\"'"
        ) from None
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".arrow"):
        raise ValueError(f"expected a YAML file with settings, found {path}; rows are given as `--datasets {path}`")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no config file at {path}: give the path of a YAML file") from None
    except IsADirectoryError:
        raise ValueError(f"expected a YAML file with settings, found the folder {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the config file {path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the config file {path}: {error}") from None
    try:
        values = load_yaml(text, name=str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def _set_nested(values: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ValueError(f"cannot set {dotted!r}: {group!r} is not a group of keys but {inner!r}")
        values = inner
    values[last] = value


def to_dict(settings: Settings) -> dict[str, Any]:
    """Returns the settings as plain dicts, lists and scalars, with every default written out."""
    values: dict[str, Any] = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return values


def to_yaml(settings: Settings) -> str:
    """Returns the settings as YAML, which `load_config` reads back to equal settings."""
    return dump_yaml(to_dict(settings))


def to_public_dict(settings: Settings) -> dict[str, Any]:
    """Returns the settings as `to_dict` does, but without the queries of web addresses, which may hold keys: for files.

    Raises:
      ValueError: an address holds a password.
    """
    values = to_dict(settings)
    refuse_passwords(values)
    public: dict[str, Any] = without_queries(values)
    return public


def to_public_yaml(settings: Settings, *, escaped: str = "") -> str:
    """Returns `to_public_dict` as YAML.

    Args:
      escaped: characters to write as escapes, in addition to invisible ones.
    """
    return dump_yaml(to_public_dict(settings), escaped)


def defaults_of(cls: type[Settings]) -> dict[str, Any]:
    """Returns the top-level keys that have a default, with their defaults as plain values."""
    # Validated with a placeholder for each required key, so that defaults are in the form that validation gives them.
    required = required_keys(cls)
    values = to_dict(load_config(cls, None, [f"{key}=x" for key in required]))
    return {key: value for key, value in values.items() if key not in required}
