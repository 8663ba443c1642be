"""Digests of the folders that a run starts from."""

from __future__ import annotations

from pathlib import Path

from jdpo.file_digests import files_digest
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME


def adapter_digest(folder: Path) -> str:
    """Returns a digest of an adapter's config and weights."""
    files = (folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    return files_digest(files)


def folder_digest(folder: Path) -> str:
    """Returns a digest of a model folder's config and weights: names and contents of config.json and *.safetensors."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return files_digest(files)
