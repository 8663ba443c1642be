"""The files of a run that its mirror holds, and which process uploads or downloads which of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jdpo.checkpoint.output_folders import MARKER
from jdpo.checkpoint.steps import MANIFEST

CHECKPOINTS = "checkpoints"
EXPORT = "model"
EXPORT_MANIFEST = "model.manifest.json"
IDENTITY = ("resolved_config.yaml", "run.json")
"""The files that say which run it is, in the order in which a run writes them."""
OF_STEPS = ("metrics.jsonl", "samples.jsonl")
"""The records that grow with the steps."""
_RECORDS = (
    *OF_STEPS,
    "data.json",
    "report.html",
    "train_dataset.*",  # rows that Python code gave
    "eval_dataset.*",
    "trackers/*.json",
    "tensorboard/**/*",
    "plots/*.png",
)

_OF_PROCESS = re.compile(r"(?:^|/)(?:ocdbt\.process_|process_)(\d+)(?:/|$)")
"""The part of a path by which orbax says whose file it is."""


def record_files(run: Path) -> list[str]:
    """Returns the names of the files of a run in its folder, without checkpoints and the exported model."""
    found = [path for pattern in (*IDENTITY, *_RECORDS) for path in sorted(run.glob(pattern)) if path.is_file()]
    return [path.relative_to(run).as_posix() for path in found if not path.name.endswith(".tmp")]


def is_record(name: str) -> bool:
    """Returns True for the name of an object that is a record of a run.

    >>> [is_record(name) for name in ("run.json", "trackers/wandb.json", "model/config.json", "plots/../../x.png")]
    [True, True, False, False]
    """
    patterns = (*IDENTITY, *(pattern.replace("**/*", "*") for pattern in _RECORDS))
    return ".." not in name.split("/") and any(fnmatchcase(name, pattern) for pattern in patterns)


def export_files(run: Path) -> dict[str, int]:
    """Returns {name: bytes} of the files of an exported model, relative to its folder; empty if there is none."""
    folder = run / EXPORT
    if not (folder / MARKER).is_file():
        return {}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def step_folder(step: int) -> str:
    """Returns the name of the folder of a step."""
    return f"{CHECKPOINTS}/{step}"


def manifest_of(folder: str) -> str:
    """Returns the name of the manifest of a folder, without which nothing in the folder counts."""
    return EXPORT_MANIFEST if folder == EXPORT else f"{folder}/{MANIFEST}"


def steps_in(names: Iterable[str], *, with_manifest: bool) -> list[int]:
    """Returns the steps that some names of objects belong to, oldest first.

    Args:
      with_manifest: True: only those that have their manifest.
    """
    pattern = re.compile(rf"{CHECKPOINTS}/(0|[1-9]\d*)/{re.escape(MANIFEST) + '$' if with_manifest else ''}")
    return sorted({int(found[1]) for name in names if (found := pattern.match(name))})


def manifest_in(content: bytes | None) -> dict[str, Any] | None:
    """Returns the manifest that an object holds, or None if it holds none."""
    try:
        manifest = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    good = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if good else None


def share_of(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """Returns the files that one of several processes copies; each file is in the share of exactly one.

    A file that a process has written itself, as far as its name tells, is its own: it is in the memory of its host. The
    others go, the largest first, to the process that has the least.

    Args:
      sizes: name of each file -> its bytes.
      index, count: of the process, and how many there are.

    >>> sizes = {"state/ocdbt.process_1/d/a": 50, "state/d/b": 30, "position/metadata": 10, "c": 5}
    >>> [share_of(sizes, index, 2) for index in (0, 1)]
    [['state/d/b', 'position/metadata', 'c'], ['state/ocdbt.process_1/d/a']]
    """
    loads, shares = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[str]]]
    owners = {name: int(found[1]) % count for name in sizes if (found := _OF_PROCESS.search(name))}
    # Own files first, since the others even out the loads. Names break ties, so that all processes agree.
    for name in sorted(sizes, key=lambda name: (name not in owners, -sizes[name], name)):
        owner = owners[name] if name in owners else loads.index(min(loads))
        loads[owner] += sizes[name]
        shares[owner].append(name)
    return shares[index]
