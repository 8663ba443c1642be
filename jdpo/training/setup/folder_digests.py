"""Digests of the folders that a run starts from."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME


def adapter_digest(folder: Path) -> str:
    """Digest of an adapter's config and weights."""
    files = (folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    return _files_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def folder_digest(folder: Path) -> str:
    """Digest of a model folder's config and weights: names and contents of its JSON and safetensors files."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return _files_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=8)
def _files_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The digest of files as they were at a size and a time: a run asks more than once, and reading takes long."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
