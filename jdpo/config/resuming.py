"""Comparison of settings with those of an earlier start of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jdpo.config.addresses import without_queries
from jdpo.config.key_specs import as_yaml
from jdpo.config.nested import LORA_DEFAULTS, RULE_DEFAULTS, DatasetConfig, LoraConfig
from jdpo.config.reading import defaults_of, to_public_dict
from jdpo.config.value_types import Settings

GIVEN_ROWS = {".jsonl": "a list", ".arrow": "a datasets.Dataset"}
"""Ending of a file that keeps rows which Python code gave -> how it gave them."""

EXPORT_KEYS = (
    "export_dtype",
    "max_shard_size",
    "push_to_hub",
    "load_best_model_at_end",
    "metric_for_best_model",
    "lora.merge",
)
"""Keys that determine the export: a finished run exports again if one of them changes."""

FREE_KEYS = frozenset(
    {
        "output_dir",
        "cache_dir",
        "dataset_num_proc",
        "logging_steps",
        "report_to",
        "run_group",
        "run_name",
        "run_project",
        "run_tags",
        "eval_datasets",
        "eval_on_start",
        "eval_steps",
        "heartbeat_timeout_seconds",
        "maintenance_notice",
        "watchdog",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "metric_for_best_model",
        "load_best_model_at_end",
        "sample_prompts",
        "sample_steps",
        "sample_max_new_tokens",
        "sample_temperature",
        "export_at_end",
        "export_dtype",
        "max_shard_size",
        "mesh",
        "mirror",
        "attention",
        "attention_block_kv",
        "attention_block_q",
        "max_tokens_per_device",
        "micro_batch_size",
        "offload_optimizer",
        "push_public",
        "push_to_hub",
        "packing",
        "profile_steps",
        "compilation_cache",
        "compiler_options",
        "reference",
        "remat",
        "resume",
    }
)
"""Keys that may change when a run is resumed, since they do not change what is trained."""


def differences(saved: Mapping[str, Any], current: Settings) -> list[str]:
    """Returns a line for each key that makes `current` another run than `saved`, which `to_dict` returned earlier."""
    now = to_public_dict(current)
    # Keys of both, in a fixed order: a key may be new, or be missing in this version.
    keys = [key for key in {**saved, **now} if key not in FREE_KEYS]
    before = {**defaults_of(type(current)), **saved}
    return [
        f"{key}: {_shown(key, before.get(key))} before, {_shown(key, now.get(key))} now"
        f"{_advice_on_kind(before.get(key), now.get(key))}"
        for key in changed_keys(saved, current, keys)
    ]


def _shown(key: str, value: Any) -> str:
    """Returns a value in the spelling of YAML; datasets and groups without the keys that are at their defaults.

    >>> _shown("datasets", [{"path": "pairs.jsonl", "split": "train"}]), _shown("lora", {"r": 8, "dropout": 0.0})
    ('[{path: pairs.jsonl}]', '{r: 8}')
    """
    if key == "datasets" and isinstance(value, list | tuple):
        value = [_meaning_of_dataset(dataset) for dataset in value]
    elif isinstance(value, Mapping):
        # Adapters with every key at its default are what `lora: true` asks for.
        defaults = vars(LoraConfig()) if key == "lora" else {}
        value = {name: one for name, one in value.items() if one != defaults.get(name)} or True
    return as_yaml(value)


def _advice_on_kind(before: Any, now: Any) -> str:
    """Returns what to do if Python code gave rows in another form before, after a semicolon; else nothing."""
    paths = [
        Path(str(value[0].get("path")))
        for value in (before, now)
        if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping)
    ]
    kinds = [GIVEN_ROWS.get(path.suffix) for path in paths if path.stem in ("train_dataset", "eval_dataset")]
    if len(kinds) < 2 or None in kinds or kinds[0] == kinds[1]:
        return ""
    return f"; the rows were given as {kinds[0]} before, and now as {kinds[1]}: give the same kind"


def changed_keys(saved: Mapping[str, Any], current: Settings, keys: Iterable[str]) -> list[str]:
    """Returns which of `keys` differ. A key that an older jdpo did not write has its present default."""
    # Queries of web addresses can be signatures, which change from day to day.
    saved, now, defaults = without_queries(saved), to_public_dict(current), defaults_of(type(current))

    def differ(key: str) -> bool:
        before, after = (_meaning(key, _at(values, key, defaults), values) for values in (saved, now))
        return bool(before != after and [before] != after)  # older versions wrote one value where there is a list now

    return [key for key in keys if differ(key)]


def _at(values: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    """Returns the value of a key, which may be in a group; None if the group is left out."""
    group, _, inner = key.partition(".")
    value = values.get(group, defaults.get(group))
    # A group that is off is null or false.
    return (value or {}).get(inner) if inner else value


def _meaning(key: str, value: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a value in the form in which it is compared.

    The keys of an optimizer and of adapters that are null get their defaults, which older versions wrote out. Of a
    dataset only the keys count that are not at their defaults, since older versions did not write all of them; and not
    its label, which changes no row. Rows in the run's own folder may move with it.
    """
    if key == "datasets" and isinstance(value, list | tuple):
        return [_relative(_meaning_of_dataset(dataset), str(settings.get("output_dir"))) for dataset in value]
    if key == "lora":
        return _meaning_of_lora(value)
    if key == "lora.merge":
        return bool(value)
    if key != "optimizer" or not isinstance(value, Mapping):
        return value
    given = {name: setting for name, setting in value.items() if setting is not None}
    filled = {**RULE_DEFAULTS.get(given.get("name", ""), {}), **given}
    return {name: setting for name, setting in filled.items() if setting is not None}


def _meaning_of_lora(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value or None
    compared = {name: setting for name, setting in value.items() if f"lora.{name}" not in EXPORT_KEYS}
    if compared.get("adapter") is not None:  # its shape is that of the adapter; other values would have been refused
        return {name: setting for name, setting in compared.items() if name not in LORA_DEFAULTS}
    return {name: LORA_DEFAULTS.get(name) if setting is None else setting for name, setting in compared.items()}


def _relative(dataset: Any, folder: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    path = str(dataset.get("path"))
    inner = path.removeprefix(folder.rstrip("/") + "/")
    return dataset if inner == path else {**dataset, "path": ("in output_dir", inner)}


def _meaning_of_dataset(dataset: Any) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    defaults = DatasetConfig(path="any")
    return {key: value for key, value in dataset.items() if key != "label" and value != getattr(defaults, key, None)}
