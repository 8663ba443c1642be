"""A model folder on a store that fsspec knows -> the same folder here, downloaded once."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import public_text
from jdpo.durable import replacing, write_durably
from jdpo.file_locks import lock_file
from jdpo.safe_text import terminal

_MANIFEST = "jdpo_download.json"
_AT_ONCE = 8
_CHUNK_BYTES = 2**23


class _Remote(NamedTuple):
    """What a store says of a file: `mark` changes with its content, as far as the store knows."""

    path: str
    size: int
    mark: str
    digest: tuple[str, str] | None  # algorithm, hex


def fetch_folder(url: str, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """The files directly in a remote folder, in a folder under `cache`.

    There is a folder for each version of what the store lists, which stays as it is while others read it. Files that
    the store still says are the same are not downloaded again.

    Args:
      wanted: which files, by name.

    Raises:
      ValueError: the store cannot be read, holds no such folder, or gave something else than it said.
    """
    place = public_text(url)
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
        system.invalidate_cache()
        listed = system.ls(root, detail=True)
    except FileNotFoundError as error:
        raise ValueError(f"model {place}: no such folder on the store") from error
    except ImportError as error:
        raise ValueError(f"model {place}: the store needs a package that is not installed: {error}") from error
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            public_text(f"model {place}: cannot read the store: {type(error).__name__}: {error}")
        ) from error
    remote, listing = {}, {}
    for entry in listed:
        name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
        if entry["type"] == "file" and name not in ("", ".", ".."):
            listing[name] = _mark(entry)
            if wanted(name):
                if entry["size"] is None:
                    raise ValueError(
                        f"model {place}: this store lists files without their sizes, as web servers do, so that one "
                        "that comes in part would not be noticed; download the folder, and give it as it lies here"
                    )
                remote[name] = _Remote(str(entry["name"]), int(entry["size"]), listing[name], _digest(entry))
    if not remote:
        raise ValueError(f"model {place}: no model files in that folder of the store")
    address = hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]
    folder = cache / f"{root.rstrip('/').rsplit('/', 1)[-1]}-{address}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / ".lock", wait=True)  # another run on this machine may want the same model
    assert lock is not None
    with lock:
        return _bring(system, place, remote, folder, _version_of(listing))


def _version_of(listing: Mapping[str, str]) -> str:
    """Of everything in the folder, wanted or not: who wants the tokenizer alone gets the folder of the weights."""
    return hashlib.sha256(json.dumps(sorted(listing.items())).encode()).hexdigest()[:16]


def matches(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name fits one of some patterns."""
    return lambda name: any(fnmatch(name, pattern) for pattern in patterns)


def _bring(system: Any, place: str, remote: Mapping[str, _Remote], folder: Path, version: str) -> Path:
    """The files in a folder of their version; one that others may be reading is never changed.

    Files that an older version has alike are linked. Each is written down as it lands, so that a download that breaks
    goes on with those that are missing.
    """
    here = folder / version
    here.mkdir(exist_ok=True)
    known, lock = _read_marks(here), threading.Lock()
    older = sorted(path for path in folder.iterdir() if path.is_dir() and path != here)
    marks = {path: _read_marks(path) for path in older}

    def is_whole(path: Path, file: _Remote, mark: str | None) -> bool:
        return mark == file.mark and path.is_file() and path.stat().st_size == file.size

    def bring(name: str) -> None:
        file = remote[name]
        sources = [path / name for path in older if is_whole(path / name, file, marks[path].get(name))]
        if not (sources and _linked(sources[0], here / name)):
            _download(system, place, file, here / name)
        with lock:
            known[name] = file.mark
            write_durably(here / _MANIFEST, json.dumps(known, indent=1))

    missing = [name for name, file in remote.items() if not is_whole(here / name, file, known.get(name))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(bring, name) for name in missing]:
            done.result()
    return here


def _linked(source: Path, target: Path) -> bool:
    """Gives a file a second name; False where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _read_marks(folder: Path) -> dict[str, str]:
    """Name -> mark of the files that were brought to a folder."""
    manifest = folder / _MANIFEST
    marks: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    return marks


def _download(system: Any, place: str, file: _Remote, path: Path) -> None:
    check = hashlib.new(file.digest[0], usedforsecurity=False) if file.digest else None
    try:
        with replacing(path) as target:
            with system.open(file.path, "rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    if check is not None:
                        check.update(chunk)
            _check_download(file, target.tell(), check.hexdigest() if check is not None else None)
    except Exception as error:
        reason = str(error) if isinstance(error, _IncompleteDownload) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model {place}: downloading {terminal(path.name)} failed: {public_text(reason)}; start again"
        ) from error


class _IncompleteDownload(Exception):
    """A file arrived that is not the one that the store lists."""


def _check_download(file: _Remote, size: int, digest: str | None) -> None:
    """
    Raises:
      _IncompleteDownload: size or digest differ from those that the store lists.
    """
    if size != file.size:
        raise _IncompleteDownload(f"expected {file.size} bytes, found {size}")
    if file.digest is not None and digest != file.digest[1]:
        raise _IncompleteDownload(f"its {file.digest[0]} differs from the store's")


def _digest(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    """The store's hash of a file's bytes where it surely is one: that of Google Cloud Storage.

    An ETag of S3 is the MD5 of some objects, and of others, encrypted ones, only looks like one.
    """
    found = entry.get("md5Hash")
    return ("md5", base64.b64decode(found).hex()) if found else None


def _mark(entry: Mapping[str, Any]) -> str:
    keys = ("size", "md5Hash", "CRC", "ETag", "generation", "mtime", "LastModified", "updated", "created")
    return json.dumps({key: str(entry[key]) for key in keys if entry.get(key) is not None}, sort_keys=True)
