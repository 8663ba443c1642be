"""Downloads a model folder from a store that fsspec supports, once per version."""

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
    """A file as a store lists it. `mark` changes with its content, as far as the store can tell."""

    path: str
    size: int
    mark: str
    digest: tuple[str, str] | None  # algorithm, hex


def fetch_folder(url: str, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """Downloads the files directly in a remote folder and returns the local folder, which is under `cache`.

    Every version of the store's listing has a folder of its own, which does not change while other processes read it.
    Files that have not changed according to the store are not downloaded again.

    Args:
      url: address of the folder on the store.
      cache: local folder for downloads.
      wanted: returns True for the names of the files to download.

    Raises:
      ValueError: the store cannot be read, has no such folder, or sent other content than it listed.
    """
    place = public_text(url)
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
        # fsspec remembers listings, which would hide a new version of the model.
        system.invalidate_cache()
        listed = system.ls(root, detail=True)
    except FileNotFoundError as error:
        raise ValueError(f"model {place}: no such folder on the store") from error
    except ImportError as error:
        raise ValueError(f"model {place}: the store needs a package that is not installed: {error}") from error
    except Exception as error:  # every store has its own errors
        raise ValueError(
            public_text(f"model {place}: cannot read the store: {type(error).__name__}: {error}")
        ) from error
    remote, listing = {}, {}
    for entry in listed:
        name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
        # A folder that was itself downloaded and uploaded again holds a manifest, which is not a file of the model.
        if entry["type"] == "file" and name not in ("", ".", "..", _MANIFEST):
            listing[name] = _mark(entry)
            if wanted(name):
                if entry["size"] is None:
                    raise ValueError(
                        f"model {place}: this store lists files without their sizes, as web servers do, so a partial "
                        "download would not be noticed; download the folder yourself and give its local path"
                    )
                remote[name] = _Remote(str(entry["name"]), int(entry["size"]), listing[name], _digest(entry))
    if not remote:
        raise ValueError(f"model {place}: no model files in that folder of the store")
    # Folders of one name on different stores must not share a cache.
    address = hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]
    folder = cache / f"{root.rstrip('/').rsplit('/', 1)[-1]}-{address}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / ".lock", wait=True)  # another run on this machine may want the same model
    assert lock is not None
    with lock:
        return _bring(system, place, remote, folder, _version_of(listing))


def _version_of(listing: Mapping[str, str]) -> str:
    """Returns a digest of the whole listing, so that a tokenizer and the weights next to it share a folder."""
    return hashlib.sha256(json.dumps(sorted(listing.items())).encode()).hexdigest()[:16]


def matches(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Returns a function that is True for names that match one of the patterns."""
    return lambda name: any(fnmatch(name, pattern) for pattern in patterns)


def _bring(system: Any, place: str, remote: Mapping[str, _Remote], folder: Path, version: str) -> Path:
    """Brings the files to the folder of their version and returns it; existing files are never changed.

    Files that an older version shares are hard-linked. Each file is recorded as soon as it is complete, so that a
    download that was interrupted continues with the missing ones.
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
            # Only after the file itself is on the disk: the manifest lists nothing that is not there.
            write_durably(here / _MANIFEST, json.dumps(known, indent=1))

    missing = [name for name, file in remote.items() if not is_whole(here / name, file, known.get(name))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(bring, name) for name in missing]:
            done.result()
    return here


def _linked(source: Path, target: Path) -> bool:
    """Gives a file a second name. Returns False if the file system does not support hard links."""
    # os.link does not replace an existing file.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _read_marks(folder: Path) -> dict[str, str]:
    """Returns the marks, by name, of the files that are complete in a folder."""
    manifest = folder / _MANIFEST
    marks: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    return marks


def _download(system: Any, place: str, file: _Remote, path: Path) -> None:
    # MD5 finds damage here, not attacks; without the flag, Python builds with FIPS refuse it.
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
    """The download differs from the file that the store lists."""


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
    """Returns the store's hash of a file's bytes if it is certain to be one, which holds for Google Cloud Storage.

    An ETag of S3 is the MD5 of some objects, and only looks like one for others, such as encrypted ones.
    """
    found = entry.get("md5Hash")
    return ("md5", base64.b64decode(found).hex()) if found else None


def _mark(entry: Mapping[str, Any]) -> str:
    keys = ("size", "md5Hash", "CRC", "ETag", "generation", "mtime", "LastModified", "updated", "created")
    return json.dumps({key: str(entry[key]) for key in keys if entry.get(key) is not None}, sort_keys=True)
