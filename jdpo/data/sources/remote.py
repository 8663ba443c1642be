"""Remote stores, read through fsspec: `gs://`, `s3://`, `hf://`, `https://` and its other protocols."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from jdpo.config import public_text
from jdpo.data.sources.stores import BUFFER_BYTES, Disk, FolderEntry, Kind, Store, error_line
from jdpo.safe_text import terminal

_URL = re.compile(r"(?P<protocol>[A-Za-z][\w+.-]*)(://|::)")
_PACKAGES = {
    "abfs": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "oci": "ocifs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""Package that a protocol needs. For other protocols the error of fsspec names the package."""


class RemoteStore:
    """A remote store that fsspec opens.

    Args:
      system: the file system of fsspec.
      url: the address that the user gave.
      root: the path of that address in the file system.
    """

    def __init__(self, system: Any, url: str, root: str) -> None:
        self._system = system
        self._url = url.rstrip("/")
        self._root = root.rstrip("/")

    def place(self, path: str) -> str:
        return terminal(public_text(self._url + path.removeprefix(self._root).rstrip("/")))

    def kind(self, path: str) -> Kind | None:
        with self._errors_of(path):
            try:
                found = self._system.info(path)["type"]
            except FileNotFoundError as error:
                if _is_missing(error):
                    return None
                raise
        # A web server has no folders; fsspec lists the links of a page, whose address ends in a slash.
        is_page = "http" in _protocols(self._system) and path.endswith("/")
        return "folder" if found == "directory" or is_page else "file"

    def entries(self, folder: str) -> list[FolderEntry]:
        with self._errors_of(folder):
            found = self._system.ls(folder, detail=True)
        kinds: dict[str, Kind] = {
            entry["name"]: "folder" if entry["type"] == "directory" else "file" for entry in found
        }
        own = folder.rstrip("/")
        # Object stores may list an empty object that represents the folder itself.
        paths = [path for path in kinds if path.rstrip("/") != own]
        return sorted(
            FolderEntry(public_text(path).rstrip("/").rsplit("/", 1)[-1], path, kinds[path]) for path in paths
        )

    def join(self, folder: str, name: str) -> str:
        return f"{folder.rstrip('/')}/{name}"

    def open(self, path: str) -> io.BufferedReader:
        with self._errors_of(path):
            stream = self._system.open(path, "rb")
        # The buffer turns many small reads into few requests.
        return io.BufferedReader(_RemoteStream(stream, self.place(path)), BUFFER_BYTES)

    def checksum(self, path: str) -> str | None:
        with self._errors_of(path):
            return content_hash(self._system.info(path))

    def _errors_of(self, path: str) -> contextlib.AbstractContextManager[None]:
        return _store_errors(self.place(path))


def is_url(path: str) -> bool:
    """Returns whether a path has the form of an address that fsspec opens.

    >>> [is_url(path) for path in ("gs://bucket/a.jsonl", "zip://a.csv::s3://bucket/a.zip", "data/a.jsonl", "org/name")]
    [True, True, False, False]
    """
    return _URL.match(path) is not None


def open_store(url: str) -> tuple[Store, str]:
    """Returns the store of a URL, and the path in the store.

    Raises:
      ValueError: the protocol is unknown, its package is not installed, or the store cannot be opened.
    """
    import fsspec

    match = _URL.match(url)
    assert match is not None
    protocol, place = match["protocol"].lower(), public_text(url)
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"install it: pip install {package}" if package else str(error)
        raise ValueError(f"{place}: reading {protocol}:// needs a package that is not installed; {advice}") from error
    except Exception as error:  # unknown protocols, and any error of a store about credentials and settings
        raise ValueError(f"{place}: cannot open the store: {error_line(error)}") from error
    if "file" in _protocols(system):
        return Disk(), path
    system.invalidate_cache()  # listings from earlier in this process may be out of date
    return RemoteStore(system, url, path), path


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def content_hash(info: dict[str, Any]) -> str | None:
    """Returns the hash of a file's content that its store keeps, as `kind:hex`, or a SHA-256 without `kind:`.

    The Hugging Face hub has the SHA-256 of large files and git's id of small ones. Google Cloud Storage has the MD5 of
    objects that were not composed. The ETag of an S3 object is its MD5 unless the object was uploaded in parts or
    encrypted with its own key; even then it changes with the content.

    Args:
      info: the entry of the file in a listing of fsspec.
    """
    if (lfs := info.get("lfs")) is not None:
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        if sha256:
            return str(sha256)
    if blob_id := info.get("blob_id"):
        # Not a SHA-256 of the content alone (git adds a header), but it changes exactly when the content does.
        return f"git:{blob_id}"
    if md5 := info.get("md5Hash"):
        return f"md5:{base64.b64decode(md5).hex()}"
    etag = str(info.get("ETag", "")).strip('"')
    return f"md5:{etag}" if re.fullmatch(r"[0-9a-f]{32}", etag) else None


@contextlib.contextmanager
def _store_errors(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each store raises its own kinds of errors
        if _is_missing(error):
            raise ValueError(f"{place}: no such file or folder") from error
        # fsspec wraps network errors in FileNotFoundError; the cause has the useful message.
        reason = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        words = re.sub(r"\?[^\s'\")]*", "?...", error_line(reason))  # the query of an address may contain a key
        raise ValueError(
            f"{place}: cannot read from the store ({words}); "
            "check the address, the access rights and the network, then start again"
        ) from error


def _is_missing(error: Exception) -> bool:
    """Returns whether an error means that the path does not exist.

    fsspec also raises FileNotFoundError if a server cannot be reached; that error has another cause.
    """
    cause = error.__cause__
    nothing_there = cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404
    return isinstance(error, FileNotFoundError) and nothing_there


class _RemoteStream(io.RawIOBase):
    """A remote file whose reading errors are ValueErrors that name it."""

    def __init__(self, stream: Any, place: str) -> None:
        self._stream = stream
        self._place = place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def readinto(self, buffer: Any) -> int:
        with _store_errors(self._place):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _store_errors(self._place):
            return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
