"""The folder of checkpoints: which of its entries are checkpoints, which of those are whole, what becomes of others.

    checkpoints/<step>/manifest.json       sizes and digests of every file of the step, written last
    checkpoints/damaged-<step>-<time>/     a checkpoint whose files disagree with its manifest: kept, never used

Only the manifest decides. A file that it does not list, as file managers, editors and NFS leave them, changes nothing.
A step without a manifest is a save that was cut off. Nothing else in the folder is touched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdpo.durable import TEMPORARY, rename_to_free, utc_stamp
from jdpo.file_digests import file_digest
from jdpo.safe_text import terminal
from jdpo.words import memory

MANIFEST = "manifest.json"
_DAMAGED = re.compile(r"damaged-\d+-.+")
log = logging.getLogger(__name__)


def step_folders(folder: Path) -> list[int]:
    """Steps that have a folder of their name, oldest first, whether or not it is a checkpoint."""
    return sorted(int(entry.name) for entry in _named_like_steps(folder) if entry.is_dir())


def complete_steps(folder: Path) -> list[int]:
    """Steps whose manifest says that it is theirs, oldest first; whether the files agree with it is not checked."""
    return [step for step in step_folders(folder) if step_of(folder / str(step)) == step]


def damaged_folders(folder: Path) -> list[Path]:
    """The checkpoints that were set aside, by name."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _DAMAGED.fullmatch(entry.name) and entry.is_dir())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the folder of a step; None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    good = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and type(manifest.get("step")) is int
    return manifest if good else None


def step_of(folder: Path) -> int | None:
    """The step that a folder holds by its manifest, whatever its name is; None: no manifest can be read."""
    manifest = read_manifest(folder)
    return None if manifest is None else int(manifest["step"])


def fault_of(folder: Path) -> str | None:
    """What is wrong with the folder of a step, by its manifest; None: nothing. Every file that is listed is read.

    Args:
      folder: named after its step.
    """
    if not (folder / MANIFEST).exists():
        return "its save was cut off"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    if str(manifest["step"]) != folder.name:
        return f"it holds step {manifest['step']}, as its manifest says"
    for name, expected in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            return f"{terminal(name)} is missing"
        try:
            if [path.stat().st_size] != expected[:1] or digest_of(path) != expected:
                return f"{terminal(name)} is not what was written"
        except (OSError, TypeError, LookupError) as error:
            return f"{terminal(name)} cannot be compared ({error})"
    return None


def digest_of(path: Path) -> list[Any]:
    """[bytes, sha256] of a file, as manifests have them."""
    digest = file_digest(path)
    return [path.stat().st_size, digest]


def digests_of(folder: Path) -> dict[str, list[Any]]:
    """{relative path: [bytes, sha256]} of the files of a step that has just been written, for its manifest.

    Hidden files are left out: orbax writes none, and those of file managers and NFS come and go.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.name not in (MANIFEST, MANIFEST + TEMPORARY):
            digests[str(name)] = digest_of(path)
    return digests


def delete_step(folder: Path) -> None:
    """Deletes the folder of a step; its manifest first, so that a half-deleted step never counts as a checkpoint."""
    if folder.is_symlink():  # what it points to is kept elsewhere on purpose
        folder.unlink()
        return
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:  # on NFS, a file that somebody reads cannot go yet: no reason to end a run
        log.warning("%s could not be deleted whole (%s); the next start tries again", folder, error)


def set_aside(entry: Path) -> Path:
    """Renames what has the name of a step to `damaged-<step>-<time>`, and returns its new place."""
    return rename_to_free(entry, f"damaged-{entry.name}-{utc_stamp()}")


def clear_way(entry: Path) -> None:
    """Sets aside whatever has the name of a step that is about to be saved."""
    if os.path.lexists(entry):
        log.warning("%s is in the way of the checkpoint of that step: it is kept as %s", entry, set_aside(entry).name)


def settle_steps(folder: Path, last_step: int | None = None) -> int | None:
    """Finds the newest step that is whole, and clears the way to it. To be called by one process.

    Later steps that are damaged are set aside, saves without a manifest are removed, and both are logged, as is what
    earlier starts have set aside.

    Args:
      folder: the folder of checkpoints.
      last_step: of the run; None: any step may be its.

    Returns:
      the step, or None where none is whole.

    Raises:
      ValueError: a folder holds another step than its name says, or a step that the run does not have; nothing was
        changed then.
    """
    _refuse_foreign(folder, last_step)
    for place in damaged_folders(folder):
        log.warning(
            "%s (%s) was set aside as damaged and is not used; delete it once you do not need it",
            place,
            _size_of(place),
        )
    cut_off = [entry for entry in _named_like_steps(folder) if _is_cut_off(entry)]
    for entry in cut_off:
        delete_step(entry)
    if cut_off:
        saves = "save that was" if len(cut_off) == 1 else "saves that were"
        log.warning("removed %d %s cut off before completion from %s", len(cut_off), saves, folder)
    for step in reversed(step_folders(folder)):
        if not os.path.lexists(folder / str(step) / MANIFEST):
            continue  # not a save of jdpo, or one that could not be removed
        fault = fault_of(folder / str(step))
        if fault is None:
            return step
        place = set_aside(folder / str(step))
        log.warning(
            "checkpoint %s is damaged (%s): it is not used, and kept as %s (%s)",
            folder / str(step),
            fault,
            place.name,
            _size_of(place),
        )
    return None


def _named_like_steps(folder: Path) -> list[Path]:
    """Entries of any kind whose name is a step as jdpo writes it: 12, but neither 012 nor 12.bak."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    return [folder / name for name in sorted(names) if name.isascii() and name.isdigit() and str(int(name)) == name]


def _refuse_foreign(folder: Path, last_step: int | None) -> None:
    for step in step_folders(folder):
        place = folder / str(step)
        found = step_of(place)
        if found is None:
            continue
        if found != step:
            raise ValueError(
                f"{place} holds the checkpoint of step {found}, as its manifest says, not of step {step}: rename it to "
                f"{found}, or, if it is a copy, move it out of {folder}"
            )
        if last_step is not None and step > last_step:
            raise ValueError(
                f"{place} is a checkpoint of step {step}, but this run ends at step {last_step}: it belongs to another "
                f"run; move it out of {folder}"
            )


def _is_cut_off(entry: Path) -> bool:
    """True if a folder without a manifest is the beginning of a save: empty, or with what orbax writes first."""
    if entry.is_symlink() or not entry.is_dir() or os.path.lexists(entry / MANIFEST):
        return False
    names = {inner.name for inner in entry.iterdir() if not inner.name.startswith(".")}
    return not names or bool(names & {"state", "position", "_CHECKPOINT_METADATA", MANIFEST + TEMPORARY})


def _size_of(folder: Path) -> str:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size if path.is_file() else 0
    return memory(size)


def best_of(manifests: Mapping[int, Mapping[str, Any]], metric_name: str, *, greater_is_better: bool) -> int | None:
    """The step with the best finite metric of that name, the earliest among equals; None: no manifest has one."""
    ranked = {
        step: manifest["metric"]
        for step, manifest in manifests.items()
        if manifest.get("metric_name") == metric_name
        and isinstance(manifest.get("metric"), int | float)
        and math.isfinite(manifest["metric"])
    }
    if not ranked:
        return None
    return min(ranked, key=lambda step: (-ranked[step] if greater_is_better else ranked[step], step))
