"""Exported folders: written beside their place, and renamed once they are whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdpo.processes import is_first, together

MARKERS = ("config.json", "adapter_config.json")
"""One of these stands in every folder of a model or an adapter."""


def write_folder(out: Path, *, by_all: Callable[[Path], None], by_first: Callable[[Path], None]) -> None:
    """Writes `out`, which appears whole or not at all; an older model or adapter there is replaced.

    Every process must call this. Where one fails all raise, and `out` is as it was.

    Args:
      by_all: what every process writes, given the folder to write into; on a file system that all share.
      by_first: what the first process writes behind that.

    Raises:
      ValueError: `out` is something other than a folder of a model or an adapter.
    """
    staging = out.parent / f".{out.name}.writing"

    def end() -> None:
        by_first(staging)
        _publish(staging, out)

    together(lambda: _stage(out, staging), on_first=True)
    try:
        together(lambda: by_all(staging))
        together(end, on_first=True)
    except BaseException:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise


def check_out(out: Path) -> None:
    """Refuses a place that holds something that is not ours to replace.

    Raises:
      ValueError: it is neither free nor a folder of a model or an adapter.
    """
    is_ours = any((out / marker).is_file() for marker in MARKERS)
    if out.exists() and not is_ours and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a model folder: it will not be replaced; choose another place")


def _stage(out: Path, staging: Path) -> None:
    check_out(out)
    shutil.rmtree(staging, ignore_errors=True)  # of an export that was killed
    staging.mkdir(parents=True)


def _publish(staging: Path, out: Path) -> None:
    """Makes `staging` durable and renames it to `out`; an older `out` stays beside it until the new one stands."""
    for path in [path for path in staging.rglob("*") if path.is_file()]:
        _sync(path)
    _sync(staging)
    replaced = out.parent / f".{out.name}.replaced"
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    staging.rename(out)
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The files of a transformers PreTrainedTokenizerBase."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    # transformers writes down how this process loaded the tokenizer, which is nobody else's business.
    kept = {key: value for key, value in read_json(path).items() if key not in ("is_local", "local_files_only")}
    write_json(path, kept)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON object, as Hugging Face lays them out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
