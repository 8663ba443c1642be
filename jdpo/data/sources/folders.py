"""Folders of data files, and folders written by `datasets.save_to_disk`."""

from __future__ import annotations

import json
import os
from typing import Any

from jdpo.data.sources.files import MAX_ROW_BYTES, File, errors_at
from jdpo.data.sources.readers import READERS, ending_of
from jdpo.data.sources.splits import choose_files
from jdpo.data.sources.stores import Disk, Store
from jdpo.safe_text import terminal

LEVELS = 2
"""Levels of subfolders that are searched if a folder has no data files itself, as for `data/train/rows.parquet`."""

_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_NO_ROWS = {_SPLITS_FILE, _STATE_FILE, "dataset_info.json", "dataset_infos.json"}
"""JSON files that describe a dataset and hold no rows."""


def files_of_folder(store: Store, folder: str, split: str) -> tuple[list[File], list[str]]:
    """Returns the files of a split in their order, and the names of the data files that belong to no split.

    Files whose names start with a dot, and the files of `_NO_ROWS`, belong to no split. The files of subfolders are
    taken only if the folder itself has no data files.

    Raises:
      ValueError: there are no data files, or one is a broken symlink.
    """
    label = _name_of(store, folder)
    names = {entry.name for entry in store.entries(folder)}
    # `datasets.save_to_disk` writes a DatasetDict with one folder per split, and a Dataset alone with state.json.
    if _SPLITS_FILE in names:
        return _saved_split(store, folder, label, split), []
    if _STATE_FILE in names and any(name.endswith(".arrow") for name in names):
        return _saved_alone(store, folder, label, split), []
    found: dict[str, str] = {}
    passed_over: list[str] = []
    _look_into(store, folder, "", LEVELS, found, passed_over)
    if not found:
        raise ValueError(f"{store.place(folder)}: no data files in this folder; expected {', '.join(READERS)}")
    chosen, left_out = choose_files(list(found), split, store.place(folder))
    files = [File(store, found[name], terminal(f"{label}/{name}")) for name in chosen]
    return files, sorted(map(terminal, left_out + passed_over))


def _name_of(store: Store, folder: str) -> str:
    path = os.path.abspath(folder) if isinstance(store, Disk) else store.place(folder)
    return path.rstrip("/").rsplit("/", 1)[-1]


def _look_into(
    store: Store, folder: str, prefix: str, levels: int, found: dict[str, str], passed_over: list[str]
) -> None:
    entries = store.entries(folder)
    before = len(found)
    for name, path, kind in entries:
        if kind == "folder" or ending_of(name) is None:
            continue
        if name.startswith(".") or name in _NO_ROWS:
            passed_over.append(prefix + name)
            continue
        # A pipe would block, and could not be read a second time for its digest.
        refuse_no_file(store, path)
        found[prefix + name] = path
    if not levels:
        return
    deeper: dict[str, str] = {}
    for name, path, kind in entries:
        if kind == "folder" and not name.startswith("."):
            _look_into(store, path, f"{prefix}{name}/", levels - 1, deeper, passed_over)
    if len(found) > before:  # the folder has data files itself; those below are not read, only reported
        passed_over.extend(deeper)
    else:
        found.update(deeper)


def refuse_no_file(store: Store, path: str) -> None:
    """Refuses paths that are neither a file nor a folder.

    Raises:
      ValueError: the path is a pipe, a device, or a broken symlink.
    """
    if isinstance(store, Disk) and store.kind(path) == "other":
        raise ValueError(f"{path}: neither a file nor a folder, but a pipe or device, which cannot be read twice")


def _saved_split(store: Store, folder: str, label: str, split: str) -> list[File]:
    splits = _about(store, folder, _SPLITS_FILE, "splits")
    if split not in splits:
        raise ValueError(
            f"{store.place(folder)}: no split {split!r} in this folder; it has {', '.join(map(terminal, splits))}"
        )
    return _saved_files(store, store.join(folder, split), f"{label}/{split}")


def _saved_alone(store: Store, folder: str, label: str, split: str) -> list[File]:
    # A dataset that was saved alone is also accepted as `train`, the default of the config.
    own = _about(store, folder, _STATE_FILE).get("_split")
    if split not in ("train", own):
        raise ValueError(f"{store.place(folder)}: no split {split!r} in this folder; it has {terminal(own or 'train')}")
    return _saved_files(store, folder, label)


def _saved_files(store: Store, folder: str, label: str) -> list[File]:
    place = store.place(store.join(folder, _STATE_FILE))
    if _about(store, folder, _STATE_FILE).get("_indices_data_files"):
        raise ValueError(
            f"{place}: an old version of `datasets` saved a selection of rows; load and save it with a current version"
        )
    files = []
    for entry in _about(store, folder, _STATE_FILE, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        # The names come from a file of the folder; anything but an Arrow file there is not from `datasets`.
        if not isinstance(name, str) or ending_of(name) != ".arrow":
            raise ValueError(f"{place}: the file is damaged: it should name Arrow files; save the dataset again")
        file = File(store, store.join(folder, name), f"{label}/{name}")
        # Without the check, rows of a partly copied dataset would be missing without notice.
        if store.kind(file.path) is None:
            raise ValueError(f"{file.place}: no such file, but {_STATE_FILE} names it; restore it")
        files.append(file)
    return files


def _about(store: Store, folder: str, name: str, key: str | None = None) -> Any:
    """Returns a JSON object that `datasets.save_to_disk` wrote, or the list under one of its keys."""
    file = File(store, store.join(folder, name), name)
    with errors_at(lambda: file.place), file.open() as stream:
        data = stream.read(MAX_ROW_BYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and (key is None or isinstance(value.get(key), list)):
        return value if key is None else value[key]
    raise ValueError(f"{file.place}: the file is damaged: `datasets` does not write it so; save the dataset again")
