"""A folder in an object store, written and read through fsspec. Requests stay under the address of the folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jdpo.config import public_text
from jdpo.data.sources.stores import error_line
from jdpo.safe_text import terminal

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""Protocol -> the extra of jdpo that has its package."""


class StoreError(OSError):
    """A request that a store did not answer, or refused; the message names the object."""


class ObjectStore:
    """The objects under one address. Names are relative to it, with slashes.

    Credentials and endpoints are those that the libraries find, such as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and
    GOOGLE_APPLICATION_CREDENTIALS.
    """

    def __init__(self, url: str) -> None:
        """
        Args:
          url: the address, such as s3://bucket/runs/first.

        Raises:
          ValueError: the protocol is unknown, or its package is not installed.
          StoreError: the store cannot be opened.
        """
        import fsspec

        self.address = terminal(public_text(url))
        protocol = url.partition("://")[0].lower()
        # What other processes write must be seen, so listings are not kept. A disk needs folders before files.
        options: dict[str, Any] = {"use_listings_cache": False, **({"auto_mkdir": True} if protocol == "file" else {})}
        try:
            self._system, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            advice = f"install it: pip install 'jdpo[{extra}]'" if extra else str(error)
            raise ValueError(
                f"mirror {self.address}: {protocol}:// needs a package that is not installed; {advice}"
            ) from error
        except ValueError as error:
            raise ValueError(f"mirror {self.address}: {error_line(error)}") from error
        except Exception as error:  # any error of a store about credentials and settings
            raise StoreError(f"{self.address}: cannot open the store: {error_line(error)}") from error
        self._root = root.rstrip("/")

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns {name: bytes} of all objects in a folder and its subfolders; empty if there is no such folder.

        Raises:
          StoreError: the store cannot be listed.
        """
        with self._errors_of(folder):
            found = self._system.find(self._path(folder), detail=True)
        start = f"{self._root}/"
        # An object with the name of the folder itself is not in it.
        return {
            path.removeprefix(start): int(entry["size"] or 0)
            for path, entry in found.items()
            if path.startswith(f"{self._path(folder)}/") and not path.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object, or None if there is none of this name.

        Raises:
          StoreError: the store cannot be read.
        """
        with self._errors_of(name):
            try:
                content: bytes = self._system.cat_file(self._path(name))
            except FileNotFoundError:  # or the whole bucket, which writing and listing find out
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, all or nothing.

        Raises:
          StoreError: the store refused it.
        """
        with self._errors_of(name):
            self._system.pipe_file(self._path(name), content)

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file to an object, all or nothing; large ones in several parts at a time.

        Raises:
          FileNotFoundError: the local file is gone.
          StoreError: the store refused it.
        """
        path.stat()  # a missing local file must not be mistaken for an answer of the store
        with self._errors_of(name):
            self._system.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Copies an object to a local file.

        Raises:
          StoreError: the store cannot be read, or there is no such object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors_of(name):
            self._system.get_file(self._path(name), str(path))

    def delete(self, name: str) -> None:
        """Deletes an object, if there is one.

        Raises:
          StoreError: the store refused it.
        """
        with self._errors_of(name), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _errors_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store raises its own kinds of errors
            words = re.sub(r"\?[^\s'\")]*", "?...", error_line(error))  # the query of an address may hold a key
            place = f"{self.address}/{name}" if name else self.address
            raise StoreError(terminal(public_text(f"{place}: {words}"))) from error
