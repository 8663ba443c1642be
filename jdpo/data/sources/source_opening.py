"""Opening the dataset that a config names: a file, a folder, a remote store or the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from jdpo.config import DatasetConfig, public_text
from jdpo.data.sources.files import File, Row
from jdpo.data.sources.folders import files_of_folder, refuse_no_file
from jdpo.data.sources.hub_datasets import HubSource
from jdpo.data.sources.readers import READERS, ending_of, reader_of
from jdpo.data.sources.remote import is_url, open_store
from jdpo.data.sources.splits import Slice, parse_split
from jdpo.data.sources.stores import Disk, Store
from jdpo.safe_text import terminal

MOST_FILES = 200
"""`Source.file_digests` lists the files of a dataset up to this number; of more files it gives one digest."""

COUNTED = (".parquet", ".arrow")
"""Endings of files that state their number of rows, so that counting them reads no rows."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Source(Protocol):
    """An opened dataset.

    Attributes:
      left_out: names of the data files in its folder that belong to no split.
      has_splits: False for a single file.
    """

    left_out: tuple[str, ...]
    has_splits: bool

    def rows(self) -> Iterator[Row]:
        """Yields raw rows with their origins."""

    def digest(self) -> str:
        """Returns a digest of the content that `rows` yields, origins included."""

    def known_rows(self) -> int | None:
        """Returns the number of rows if it is known without reading them, otherwise None."""

    def file_digests(self) -> dict[str, str]:
        """Returns {file: digest of its content}, so that a message can name the file that changed."""


def read_rows(dataset: DatasetConfig) -> Iterator[Row]:
    """Yields (raw row, origin); origins look like `pairs.jsonl:17`, `pairs.json[3]`, `org/name:train[5]`.

    Raises:
      ValueError: the path does not exist, or a file is empty or broken; the message names the file and line.
    """
    return open_source(dataset).rows()


def open_source(dataset: DatasetConfig) -> Source:
    """Opens what `dataset.path` names: a local or remote file or folder, or a dataset of the hub.

    Raises:
      ValueError: the path does not exist, the split cannot be read, the hub or the store cannot be reached, or an
        option of the hub is set for files.
    """
    store, path = _located(dataset.path)
    kind, place = store.kind(path), store.place(path)
    if kind is None:
        if is_on_hub(dataset.path):
            return HubSource(dataset)
        hint = "" if is_url(dataset.path) else " (a name on the hub has the form org/name)"
        if "*" in dataset.path:
            hint = "; patterns of names are not expanded: give a folder, or a list of files"
        raise ValueError(f"{place}: no such file or folder{hint}")
    _refuse_hub_options(dataset, place, f"{'' if isinstance(store, Disk) else 'remote '}{kind}")
    refuse_no_file(store, path)
    split = parse_split(dataset.split)
    if kind == "folder":
        files, left_out = files_of_folder(store, path, split.name)
        return FileSource(files, left_out, split, place, has_splits=True)
    if split.name != "train":
        raise ValueError(
            f"{place}: a file has one split, 'train', but split is {dataset.split!r}; leave split out, or "
            "take a slice such as train[:90%]"
        )
    name = public_text(path).rsplit("/", 1)[-1]
    if ending_of(name) is None:
        raise ValueError(f"{place}: cannot read this kind of file; expected {', '.join(READERS)}")
    return FileSource((File(store, path, terminal(name)),), (), split, place, has_splits=False)


def is_on_hub(path: str) -> bool:
    """Returns True if the path of a dataset is taken for a name on the hub."""
    # A path that exists always wins over the hub. `data/pairs.jsonl` has the form of a hub name, but its ending
    # shows that a file was meant, so the error is "no such file" and not one of the hub.
    return (
        not is_url(path)
        and ending_of(path) is None
        and _HUB_NAME.fullmatch(path) is not None
        and not os.path.exists(os.path.expanduser(path))
    )


def _located(path: str) -> tuple[Store, str]:
    if is_url(path) and not os.path.exists(path):  # a local folder may be called a::b
        return open_store(path)
    return Disk(), os.path.expanduser(path)


def _refuse_hub_options(dataset: DatasetConfig, place: str, kind: str) -> None:
    for option in ("name", "revision"):
        value = getattr(dataset, option)
        if value is not None:
            raise ValueError(
                f"{place}: {option} is {value!r}, but it applies to datasets of the hub only, and this is a "
                f"{kind if kind.startswith('remote') else f'local {kind}'}; remove {option}"
            )


class FileSource:
    """The rows of one or more files, one file after the other."""

    def __init__(
        self, files: Sequence[File], left_out: Sequence[str], split: Slice, place: str, *, has_splits: bool
    ) -> None:
        self.files = tuple(files)
        self.left_out = tuple(left_out)
        self.has_splits = has_splits
        self.split = split
        self.place = place

    def rows(self) -> Iterator[Row]:
        found = False
        # Rows before the slice are read and thrown away: files of rows without an index leave no other way.
        for row in itertools.islice(self._all_rows(), *self._bounds()):
            found = True
            yield row
        if not found:
            raise ValueError(f"{self.place}: split {self.split.text} selects no rows")

    def digest(self) -> str:
        # Labels are part of the digest, because origins are part of the rows; the folder's place is not.
        digest = hashlib.sha256(repr(self.split).encode())
        for file, content in zip(self.files, self._digests, strict=True):
            digest.update(f"{file.label}\0{content}\0".encode())
        return digest.hexdigest()

    def known_rows(self) -> int | None:
        if not all(ending_of(file.label) in COUNTED for file in self.files):
            return None
        start, stop = self.split.bounds(sum(reader_of(file.label).count(file) for file in self.files))
        return max(stop - start, 0)

    def file_digests(self) -> dict[str, str]:
        if len(self.files) > MOST_FILES:
            return {self.place: self.digest()}
        return {file.place: content for file, content in zip(self.files, self._digests, strict=True)}

    @functools.cached_property
    def _digests(self) -> tuple[str, ...]:
        return tuple(file.digest() for file in self.files)

    def _bounds(self) -> tuple[int, int | None]:
        # Counting may read all files, so it is done only for percentages and negative bounds.
        if not self.split.needs_count():
            return self.split.plain_bounds()
        return self.split.bounds(sum(reader_of(file.label).count(file) for file in self.files))

    def _all_rows(self) -> Iterator[Row]:
        for file in self.files:
            empty = True
            for row in reader_of(file.label).rows(file):
                empty = False
                yield row
            if empty:
                raise ValueError(f"{file.place}: the file is empty: it has no rows")
