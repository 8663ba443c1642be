"""config.json -> `ModelConfig`.

A setting that changes the arithmetic and that the decoder lacks is refused by name: see `jdpo.models.families.settings`
for what families share, `jdpo.models.families.table` for each. Settings that do not change a forward pass are ignored:
initializer_range, use_cache, pretraining_tp, output_*, summary_*, and dropout, without which preference training runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jdpo.models.config import ModelConfig
from jdpo.models.families.table import FAMILIES


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`) in style.

    Raises:
      ValueError: no folder, no config.json, broken JSON, an unsupported family, or a setting the decoder lacks.
    """
    raw = _read_json(folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder}/config.json: model_type {family!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    # transformers fills the defaults that save_pretrained leaves out, and brings old rope keys to the new form.
    from transformers import AutoConfig

    try:
        # Left unset, trust_remote_code is asked for on the terminal, and "y" runs Python files of the folder.
        hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise their own types, KeyError and bare TypeError among them
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}/config.json: this model needs Python code of its own (auto_map), which jdpo never runs; "
                f"supported are {', '.join(sorted(FAMILIES))} as transformers has them"
            ) from None
        raise ValueError(f"{folder}/config.json: transformers cannot read it: {error}") from error
    try:
        return FAMILIES[family].read(hf_config)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist (or is not a folder)")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw
