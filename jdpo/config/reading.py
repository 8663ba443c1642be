"""Settings from YAML and the command line, and back to YAML.

A YAML states only what differs from the defaults, and the command line has the last word:

    defaults  <  CONFIG.yaml  <  --key value | --key=value | key=value | --group.key value
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from jdpo.config.addresses import refuse_passwords, without_queries
from jdpo.config.keys import TrainConfig
from jdpo.config.yaml_text import load_yaml
from jdpo.safe_text import escaped as escape
from jdpo.safe_text import is_unseen

C = TypeVar("C", bound=TrainConfig)

ALIASES = {
    "model": "model_name_or_path",
    "dataset": "datasets",
    "dataset_name": "datasets",
    "train_file": "datasets",
    "dataset_test_split": "eval_datasets",
    "pref_beta": "beta",
    "dpo_beta": "beta",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_checkpointing": "remat",
    "ref_model": "reference_model",
    "precompute_ref_log_probs": "reference",
    "reference_free": "loss_type",
    "nll_coef": "rpo_alpha",
    "gamma": "simpo_gamma",
    "mixup_alpha": "ref_model_mixup_alpha",
    "use_peft": "lora",
    "peft_config": "lora",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "load_in_8bit": "lora.base_dtype",
    "adapter_name_or_path": "lora.adapter",
    "optim": "optimizer.name",
    "optimizer_name": "optimizer.name",
    "optimizer_type": "optimizer.name",
    "adafactor": "optimizer.name",
    "momentum": "optimizer.momentum",
    "sgd_momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "cpu_offload": "offload_optimizer",
    "offload_optimizer_state": "offload_optimizer",
    "optimizer_memory_host_offload": "offload_optimizer",
    "bf16": "compute_dtype",
    "dtype": "compute_dtype",
    "torch_dtype": "compute_dtype",
    "max_seq_length": "max_length",
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "logging_dir": "output_dir",
}
"""What other trainers call a key: suggested in the error, never accepted silently."""

NAMED_GROUPS = {"optimizer": "name"}
"""Groups that one word may stand for: the key within it that the word is."""

SWITCHED_GROUPS = ("lora",)
"""Groups that `true` turns on with their defaults, and any key of them too."""


def load_config(cls: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Reads a run's settings: defaults, then the YAML file, then `key=value` overrides.

    Args:
      cls: SFTConfig or DPOConfig.
      path: a YAML file holding a mapping, or None.
      overrides: words of the command line, as `--key value`, `--key=value` or `key=value`; values are YAML.

    Returns:
      A validated, frozen config.

    Raises:
      ValueError: naming every unknown key (with the nearest one), wrong type and missing key, or the key of an address
        that holds a password.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_yaml(path)
        origins = dict.fromkeys(values, f"in {path}")
    for group, key in NAMED_GROUPS.items():
        if isinstance(values.get(group), str):
            values[group] = {key: values[group]}
    texts = _text_keys(cls)
    for key, text in parse_overrides(overrides):
        value = _parse_value(key, text, is_text=key in texts)
        group = key.split(".")[0]
        if group in SWITCHED_GROUPS:
            before = values.get(group)
            if key == group and value is True and isinstance(before, Mapping):
                continue  # on it is already, with what is said of it
            if key != group and (before is None or isinstance(before, bool)):
                values[group] = {}
        # `--optimizer lion` changes the rule alone: what the file says of the group beside it stays.
        named = key in NAMED_GROUPS and isinstance(value, str)
        _set_nested(values, f"{key}.{NAMED_GROUPS[key]}" if named else key, value)
        origins[group] = "on the command line"
    refuse_passwords(values)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(_explain(cls, error, origins)) from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, text of the value) from words of the command line.

    >>> list(parse_overrides(["--beta", "0.2", "mesh.fsdp=4", "--shuffle=false", "--load_best_model_at_end"]))
    [('beta', '0.2'), ('mesh.fsdp', '4'), ('shuffle', 'false'), ('load_best_model_at_end', 'true')]
    """
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ValueError(
                    f"cannot read {word!r}: expected --key value, --key=value or key=value, and the config file first"
                )
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = "true"
        yield key.replace("-", "_"), value


def _parse_value(key: str, text: str, *, is_text: bool) -> Any:
    """Reads a command-line value as YAML, but keeps text as it is: 0123 and 2024-01-01 are fine names of folders."""
    if is_text:
        return None if text == "null" else text
    try:
        value = load_yaml(text) if text else ""
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of {key!r}, {text!r}, as YAML: quote it ({error})") from None
    return value


def _text_keys(cls: type, prefix: str = "") -> set[str]:
    """Dotted keys whose value is text."""
    hints = typing.get_type_hints(cls)
    keys: set[str] = set()
    for name, hint in hints.items():
        group = _group_class(hint)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if hint is str or (is_union and str in typing.get_args(hint)):
            keys.add(prefix + name)
        elif group is not None and dataclasses.is_dataclass(hint):
            keys |= _text_keys(group, f"{prefix}{name}.")
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no config file at {path}: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config file {path}: {error}") from None
    try:
        values = load_yaml(text)
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


def _explain(cls: type, error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        path = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        key = ".".join(map(str, path))
        where = origins.get(str(path[0]), "in the config") if path else "in the config"
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"unknown key {key!r} {where}{_nearest(cls, path)}")
        elif problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"missing key {key!r}: {_description(cls, path)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            lines.append(f"{key!r} {where} is {problem['input']!r}: {message} ({_description(cls, path)})")
    return "\n".join(lines)


def _nearest(cls: type, path: Sequence[Any]) -> str:
    known = keys_of(cls)
    dotted = ".".join(str(part) for part in path if not isinstance(part, int))
    name = str(path[-1])
    alias = ALIASES.get(name)
    if alias in known:
        return f"; here it is called {alias!r}"
    candidates = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6) or difflib.get_close_matches(
        name, {key.split(".")[-1]: key for key in known}, n=1, cutoff=0.6
    )
    if candidates:
        full = next(key for key in known if candidates[0] in (key, key.split(".")[-1]))
        return f"; did you mean {full!r}?"
    return "; `--help` lists the keys"


def _description(cls: type, path: Sequence[Any]) -> str:
    return keys_of(cls).get(".".join(str(part) for part in path if not isinstance(part, int)), "see --help")


def keys_of(cls: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a config class with its description, groups opened."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        info: Any = field.default  # pydantic keeps the FieldInfo of `Field(...)` here
        keys[prefix + field.name] = getattr(info, "description", None) or ""
        group = _group_class(hints[field.name])
        if group is not None:
            keys |= keys_of(group, f"{prefix}{field.name}.")
    return keys


def _group_class(hint: Any) -> type | None:
    """The dataclass behind `MeshConfig` or `tuple[DatasetConfig, ...]`, or None for a plain value."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if typing.get_origin(hint) in (tuple, Annotated, typing.Union, types.UnionType):
        return next(filter(None, map(_group_class, typing.get_args(hint))), None)
    return None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, with every default written out."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def to_yaml(config: TrainConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return _dump(to_dict(config))


def to_public_dict(config: TrainConfig) -> dict[str, Any]:
    """As `to_dict`, for files: web addresses lack their query, which may be a key.

    Raises:
      ValueError: an address holds a password.
    """
    values = to_dict(config)
    refuse_passwords(values)
    public: dict[str, Any] = without_queries(values)
    return public


def to_public_yaml(config: TrainConfig, *, escaped: str = "") -> str:
    """`to_public_dict` as YAML.

    Args:
      escaped: characters that are written as escapes, beside those that would not show.
    """
    return _dump(to_public_dict(config), escaped)


def _dump(values: Mapping[str, Any], escaped: str = "") -> str:
    """Values as YAML that shows in a terminal as it is: what would not show is escaped within quotes."""

    def hides(character: str) -> bool:
        return character in escaped or is_unseen(character)

    class Dumper(yaml.SafeDumper):
        def represent_str(self, text: str) -> yaml.ScalarNode:
            style = '"' if any(map(hides, text)) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    # Only line feeds of YAML itself are left among control characters, and all others are within double quotes.
    return "".join(escape(one) if one != "\n" and hides(one) else one for one in text)


def defaults_of(cls: type[TrainConfig]) -> dict[str, Any]:
    """Top-level keys that have a default, with it, as plain values."""
    required = ("model_name_or_path", "output_dir", "datasets")
    values = to_dict(load_config(cls, None, [f"{key}=x" for key in required]))
    return {key: value for key, value in values.items() if key not in required}
