"""Reads the config of a PEFT adapter folder. This module does not import jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jdpo.json_files import read_json
from jdpo.models.weights.safetensors_folder import INDEX_NAME, SINGLE_NAME

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def is_adapter_folder(folder: Path) -> bool:
    """Returns True for a PEFT adapter, False for a full model even if an adapter's config was left next to it."""
    own_weights = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return (folder / CONFIG_NAME).is_file() and not own_weights


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
      ValueError: it is not there, or is no JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is not a PEFT adapter folder") from None


def base_of(folder: Path) -> tuple[str, str | None]:
    """Returns the base model that an adapter's config names, and its hub revision.

    Raises:
      ValueError: the config does not name a base model.
    """
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / CONFIG_NAME} does not name its base model (base_model_name_or_path); set model_name_or_path to "
            "the base model and lora.adapter to the adapter"
        )
    return str(name), config.get("revision")
