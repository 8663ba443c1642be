"""Finds, verifies, sets aside and deletes the checkpoints in a run's folder of checkpoints.

    checkpoints/<step>/manifest.json       sizes and digests of every file of the step, written last
    checkpoints/damaged-<step>-<time>/     a checkpoint whose files disagree with its manifest: kept, never used

Only the manifest counts. Files that it does not list, such as those of file managers, editors and NFS, are ignored.
A step without a manifest is an interrupted save. Nothing else in the folder is touched.
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
    """Returns the steps that have a folder of their name, oldest first, whether or not it is a checkpoint."""
    return sorted(int(entry.name) for entry in _named_like_steps(folder) if entry.is_dir())


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps whose folder has their manifest, oldest first. The files are not compared with the manifest."""
    return [step for step in step_folders(folder) if step_of(folder / str(step)) == step]


def damaged_folders(folder: Path) -> list[Path]:
    """Returns the checkpoints that were set aside, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _DAMAGED.fullmatch(entry.name) and entry.is_dir())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of the folder of a step, or None if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    # `type` and not isinstance, because in Python True is an int.
    good = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and type(manifest.get("step")) is int
    return manifest if good else None


def step_of(folder: Path) -> int | None:
    """Returns the step in a folder's manifest, whatever the folder's name, or None if no manifest can be read."""
    manifest = read_manifest(folder)
    return None if manifest is None else int(manifest["step"])


def fault_of(folder: Path) -> str | None:
    """Compares the folder of a step with its manifest, reading every listed file. Returns the fault, or None.

    Args:
      folder: a folder whose name is the step.
    """
    if not (folder / MANIFEST).exists():
        return "its save was interrupted"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    if str(manifest["step"]) != folder.name:
        return f"its manifest is that of step {manifest['step']}"
    for name, expected in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            return f"{terminal(name)} is missing"
        try:
            # The size first: it costs nothing, while a digest reads the whole file.
            if [path.stat().st_size] != expected[:1] or digest_of(path) != expected:
                return f"{terminal(name)} has changed since it was written"
        except (OSError, TypeError, LookupError) as error:
            return f"{terminal(name)} cannot be compared ({error})"
    return None


def digest_of(path: Path) -> list[Any]:
    """Returns [bytes, sha256] of a file, as in manifests."""
    digest = file_digest(path)
    return [path.stat().st_size, digest]


def digests_of(folder: Path) -> dict[str, list[Any]]:
    """Returns {relative path: [bytes, sha256]} of the files of a step that has just been written, for its manifest.

    Hidden files are omitted: orbax writes none, and those of file managers and NFS come and go.
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
    if folder.is_symlink():  # its target is kept elsewhere on purpose
        folder.unlink()
        return
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:  # on NFS, a file in use cannot be deleted; not a reason to end a run
        log.warning("%s could not be deleted completely (%s); the next start tries again", folder, error)


def set_aside(entry: Path) -> Path:
    """Renames an entry with the name of a step to `damaged-<step>-<time>` and returns its new path."""
    return rename_to_free(entry, f"damaged-{entry.name}-{utc_stamp()}")


def clear_way(entry: Path) -> None:
    """Sets aside an entry with the name of a step that is about to be saved."""
    if os.path.lexists(entry):
        log.warning(
            "%s is in the way of the checkpoint of that step and was renamed to %s", entry, set_aside(entry).name
        )


def settle_steps(folder: Path, last_step: int | None = None) -> int | None:
    """Finds the newest complete step and cleans up after it. One process must call this.

    Later steps that are damaged are set aside, and interrupted saves are deleted. Both are logged, and so are
    checkpoints that earlier starts have set aside.

    Args:
      folder: the folder of checkpoints.
      last_step: the run's last step; None accepts any step.

    Returns:
      the step, or None if no step is complete.

    Raises:
      ValueError: a folder's name is not the step in its manifest, or the run does not have that step. Nothing was
        changed in that case.
    """
    # Before anything is renamed or deleted, since the folder may be that of another run.
    refuse_foreign(folder, last_step)
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
        saves = "save" if len(cut_off) == 1 else "saves"
        log.warning("deleted %d interrupted %s from %s", len(cut_off), saves, folder)
    # Only as far back as the first complete step: older ones are not read.
    for step in reversed(step_folders(folder)):
        if not os.path.lexists(folder / str(step) / MANIFEST):
            continue  # not a save of jdpo, or one that could not be deleted
        fault = fault_of(folder / str(step))
        if fault is None:
            return step
        place = set_aside(folder / str(step))
        log.warning(
            "checkpoint %s is damaged (%s): it is not used and was renamed to %s (%s)",
            folder / str(step),
            fault,
            place.name,
            _size_of(place),
        )
    return None


def _named_like_steps(folder: Path) -> list[Path]:
    """Returns the entries of any kind whose name is a step as jdpo writes it: 12, but neither 012 nor 12.bak."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    return [folder / name for name in sorted(names) if name.isascii() and name.isdigit() and str(int(name)) == name]


def refuse_foreign(folder: Path, last_step: int | None) -> None:
    """Refuses a folder with the name of a step that is a checkpoint of another step, or of a longer run.

    Raises:
      ValueError: naming the folder, and where it belongs.
    """
    for step in step_folders(folder):
        place = folder / str(step)
        found = step_of(place)
        if found is None:
            continue
        if found != step:
            raise ValueError(
                f"{place} has the manifest of step {found}, not of step {step}: rename it to {found} or, if it is a "
                f"copy, move it out of {folder}"
            )
        if last_step is not None and step > last_step:
            raise ValueError(
                f"{place} is a checkpoint of step {step}, but this run ends at step {last_step}: it belongs to another "
                f"run; move it out of {folder}"
            )


def _is_cut_off(entry: Path) -> bool:
    """Returns True if a folder without a manifest is an interrupted save: empty, or with files that orbax writes."""
    if entry.is_symlink() or not entry.is_dir() or os.path.lexists(entry / MANIFEST):
        return False
    # Anything else in the folder was put there by somebody, and is not ours to delete.
    names = {inner.name for inner in entry.iterdir() if not inner.name.startswith(".")}
    return not names or bool(names & {"state", "position", "_CHECKPOINT_METADATA", MANIFEST + TEMPORARY})


def _size_of(folder: Path) -> str:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size if path.is_file() else 0
    return memory(size)


def best_of(manifests: Mapping[int, Mapping[str, Any]], metric_name: str, *, greater_is_better: bool) -> int | None:
    """Returns the step with the best finite metric of that name, the earliest among equals, or None if none has it."""
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
