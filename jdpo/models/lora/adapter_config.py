"""The config of a PEFT adapter folder: whether there is one, and which base it names; read without jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jdpo.json_files import read_json
from jdpo.models.weights.safetensors_folder import INDEX_NAME, SINGLE_NAME

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def is_adapter_folder(folder: Path) -> bool:
    """Whether that is a PEFT adapter and no model of its own, with the config of an adapter left beside it."""
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
    """The model that an adapter was trained on, as its config names it, and its hub revision.

    Raises:
      ValueError: the config names none.
    """
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / CONFIG_NAME} does not say which model it adapts (base_model_name_or_path); give the model as "
            "model_name_or_path and the adapter as lora.adapter"
        )
    return str(name), config.get("revision")
