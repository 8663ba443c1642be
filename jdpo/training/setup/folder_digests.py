"""Digests of the folders that a run starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jdpo.file_digests import cached_file_digest
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME


def adapter_digest(folder: Path) -> str:
    """Returns a digest of an adapter's config and weights."""
    files = (folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    return _digest_of(files)


def folder_digest(folder: Path) -> str:
    """Returns a digest of a model folder's config and weights: names and contents of config.json and *.safetensors."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return _digest_of(files)


def _digest_of(files: Iterable[Path]) -> str:
    """Returns a digest of the names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + bytes.fromhex(cached_file_digest(path)))
    return digest.hexdigest()
