"""Writes exported folders next to their final path and renames them once they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from jdpo._version import __version__
from jdpo.durable import naming, sync_path
from jdpo.json_files import write_json
from jdpo.processes import is_first, run_jointly

MARKER = ".jdpo_export"
"""A file in every folder that jdpo exports. A folder without it was made by somebody else."""


def write_folder(
    out: Path, *, by_all: Callable[[Path], None], by_first: Callable[[Path], None], kept: Sequence[Path] = ()
) -> None:
    """Writes `out`, which appears as a whole or not at all; an older export of jdpo there is replaced.

    Every process must call this. If one fails, all raise and `out` is unchanged.

    Args:
      out: the final path; a symlink is followed.
      by_all: called by every process with the folder to write to, which is on a shared file system.
      by_first: called by the first process with that folder, after `by_all`.
      kept: folders that the export is made from, see `check_out`.

    Raises:
      ValueError: see `check_out`.
    """
    out = out.expanduser().resolve()
    # In the same folder as `out`, because a rename works only within one file system.
    staging = out.parent / f".{out.name}.writing"

    def write() -> None:
        with naming(out):
            by_all(staging)

    def end() -> None:
        with naming(out):
            by_first(staging)
            # The last file, so that an unfinished folder never passes for an export.
            write_json(staging / MARKER, {"jdpo": __version__})
            _publish(staging, out)

    run_jointly(lambda: _stage(out, staging, kept), on_first=True)
    try:
        # All processes finish writing before the first one renames.
        run_jointly(write)
        run_jointly(end, on_first=True)
    except BaseException:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise


def check_out(out: Path, kept: Sequence[Path] = ()) -> None:
    """Refuses a path where an export would replace something that jdpo did not export.

    Args:
      out: the path of the export.
      kept: folders that must not be touched: `out` must not be one of them, inside one or around one.

    Raises:
      ValueError: the path is neither free nor an export of jdpo, or overlaps a folder in `kept`.
    """
    place = out.expanduser().resolve()
    for folder in (path.expanduser().resolve() for path in kept):
        if place == folder or place in folder.parents or folder in place.parents:
            how = "is" if place == folder else "contains" if place in folder.parents else "is inside"
            raise ValueError(
                f"{out} {how} {folder}, which is an input of this export or belongs to its run; choose another place"
            )
    if around := next((path for path in place.parents if path.exists() and not path.is_dir()), None):
        raise ValueError(f"{out} is inside {around}, which is a file; choose another place")
    is_ours = (place / MARKER).is_file()
    if place.exists() and not is_ours and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(
            f"{out} exists and is not an export of jdpo (it has no {MARKER}), so it is not replaced; "
            "choose another place"
        )


def _stage(out: Path, staging: Path, kept: Sequence[Path]) -> None:
    replaced = _replaced(out)
    if replaced.exists() and not out.exists():  # an export was killed between its two renames
        replaced.rename(out)
    check_out(out, kept)
    shutil.rmtree(staging, ignore_errors=True)  # left by an export that was killed
    staging.mkdir(parents=True)


def _publish(staging: Path, out: Path) -> None:
    """Makes `staging` durable and renames it to `out`; an older `out` is kept next to it until then."""
    # Contents before names: after a power failure a renamed folder could otherwise have empty files.
    for path in [path for path in staging.rglob("*") if path.is_file()]:
        sync_path(path)
    sync_path(staging)
    replaced = _replaced(out)
    shutil.rmtree(replaced, ignore_errors=True)  # left by an export that was killed after its renames
    if out.exists():
        # Folders cannot be exchanged in one step, so the older one keeps a name from which `_stage` can bring it back.
        out.rename(replaced)
    try:
        staging.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    sync_path(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Returns the path of an older export while the new one replaces it."""
    return out.parent / f".{out.name}.replaced"
