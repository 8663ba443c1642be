"""Tokenized rows on disk: a memory-mapped Arrow file, and a JSON file next to it with its digests.

`<key>.arrow` is written under a temporary name and renamed; `<key>.json` follows, so a file without its JSON is not
complete. Opening takes the same time for any number of rows: if size and modification time are those in the JSON, the
file is trusted, and the tokens of a record batch are compared with a checksum when they are first read. If size or time
differ (in a copy of the cache, for example), the whole file is read and compared. A file that does not match counts as
missing.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jdpo.data.prepared.row_arrays import TAG_TYPES, RowArrays, Tags, concatenated, dtype_of, interleaved, longest
from jdpo.durable import unique_writer, write_durably
from jdpo.file_digests import file_digest
from jdpo.types import AnyPair, TokenizedCompletion

R = TypeVar("R", bound=AnyPair | TokenizedCompletion)
Elements = tuple[np.ndarray, np.ndarray]
"""The elements of a field of consecutive rows, and where each row's begin: offsets [rows + 1], elements."""

BATCH_ROWS = 2048
"""A record batch has at least this many rows, except the last one."""


# --- reading


class StoredRows(Generic[R]):
    """Tokenized rows by index, read from the file on access.

    Attributes:
      lengths: int32 [rows], tokens of the longest sequence of each row.
      tags: see `Tags`.
      about: the value of `RowWriter.about`.
      digest: content digest of the token ids and masks.
      path: the Arrow file.
    """

    def __init__(self, path: Path, row_type: type[R], meta: dict[str, Any]) -> None:
        """Opens the file.

        Args:
          meta: the content of the JSON file.

        Raises:
          ValueError: the file is not the one that `meta` describes.
        """
        import pyarrow as pa

        self.path = path
        self.about: dict[str, Any] = meta["about"]
        self.digest: str = meta["digest"]
        self.row_type = row_type
        # Mapped: several processes of one host share the pages, and the operating system can drop them.
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._checks: list[int] = meta["batches"]
        # First row of every record batch, and the total number at the end.
        self._starts = [0, *itertools.accumulate(batch.num_rows for batch in self._batches)]
        self._arrays: dict[int, dict[str, Elements]] = {}  # batches whose checksum was compared
        self.lengths = self._column("length", np.dtype(np.int32))
        self.tags = Tags(*(self._column(name, dtype) for name, dtype in TAG_TYPES.items()))
        # Lengths and tags are checked when the file is opened, since plans depend on them; tokens when they are read.
        if _check((self.lengths, *self.tags)) != meta["tags"] or len(self._checks) != len(self._batches):
            raise ValueError(f"{path} is not as it was written")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> R:
        """Returns a row.

        Raises:
          ValueError: the tokens on disk differ from those that were written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # The last record batch that starts at or before the row.
        number = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[number]
        *fields, origin = self.row_type._fields
        values = []
        for offsets, elements in map(self._checked(number).__getitem__, fields):
            values.append(elements[offsets[row] : offsets[row + 1]])
        row_type: Any = self.row_type
        made: R = row_type(*values, self._batches[number].column(origin)[row].as_py())
        return made

    def blocks(self) -> Iterator[dict[str, Elements]]:
        """Yields all rows, in blocks: {field: (offsets [rows + 1], elements)}, as views of the file.

        Raises:
          ValueError: the tokens on disk differ from those that were written.
        """
        for number in range(len(self._batches)):
            yield self._checked(number)

    def lengths_of(self, field: str) -> np.ndarray:
        """Returns the number of elements of a field in every row, int64 [rows]. Reads no rows."""
        parts = [np.diff(np.asarray(batch.column(field).offsets)) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64)

    def counts_of(self, mask: str, *, skip: int = 0) -> np.ndarray:
        """Returns how many elements of a mask are True after the first `skip`, for every row: int64 [rows]."""
        counts = []
        for number in range(len(self._batches)):
            offsets, elements = self._views(number)[mask]
            # Differences of one cumulative sum count every row at once.
            up_to = np.concatenate([[0], np.cumsum(elements, dtype=np.int64)])
            first = np.minimum(offsets[:-1] + skip, offsets[1:])
            counts.append(up_to[offsets[1:]] - up_to[first])
        return np.concatenate(counts)

    def rows_with(self, ids: np.ndarray) -> dict[int, tuple[int, int]]:
        """Returns {id: (number of rows with it, index of the first)} for the token ids, int [n], that occur."""
        found: dict[int, tuple[int, int]] = {}
        if not len(ids):
            return found
        is_wanted = np.zeros(int(ids.max()) + 2, bool)  # larger ids are clipped to the last place, which stays False
        is_wanted[ids] = True
        fields = [field for field in self.row_type._fields[:-1] if dtype_of(field) != np.bool_]
        for number, start in enumerate(self._starts[:-1]):
            pairs = []  # [2, n]: a token, and a row that contains it
            for offsets, tokens in map(self._views(number).__getitem__, fields):
                places = np.flatnonzero(is_wanted.take(tokens, mode="clip"))
                pairs.append(np.stack([tokens[places], np.searchsorted(offsets, places, side="right") - 1]))
            # A token that occurs several times in a row counts once.
            tokens, rows = np.unique(np.concatenate(pairs, axis=1), axis=1)
            for id, first, count in zip(*np.unique(tokens, return_index=True, return_counts=True), strict=True):
                before, at = found.get(int(id), (0, start + int(rows[first])))
                found[int(id)] = before + int(count), at
        return dict(sorted(found.items()))

    def _column(self, name: str, dtype: np.dtype) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(batch.column(name)) for batch in self._batches)])

    def _checked(self, number: int) -> dict[str, Elements]:
        """Returns the arrays of a record batch; compares them with their checksum the first time."""
        if number not in self._arrays:
            views = self._views(number)
            if _check(array for pair in views.values() for array in pair) != self._checks[number]:
                raise ValueError(
                    f"tokenized rows {self._starts[number]} to {self._starts[number + 1] - 1} of {self.path} are not "
                    "as they were written; delete this file, and the next start tokenizes the rows again"
                )
            self._arrays[number] = views
        return self._arrays[number]

    def _views(self, number: int) -> dict[str, Elements]:
        """Returns {field: (offsets [rows + 1], elements)} of a record batch, as views of the mapped file."""
        views = {}
        for field in self.row_type._fields[:-1]:
            column = self._batches[number].column(field)
            views[field] = np.asarray(column.offsets), np.asarray(column.values).view(dtype_of(field))
        return views


# --- writing


class RowWriter(Generic[R]):
    """Writes rows as they arrive, with about one record batch in memory.

    Attributes:
      about: JSON values to store with the rows; set it before the file is closed.
    """

    def __init__(self, path: Path, row_type: type[R]) -> None:
        import pyarrow as pa

        self.about: dict[str, Any] = {}
        *self._fields, self._origin = row_type._fields
        storage = {name: pa.uint8() if dtype_of(name) == np.bool_ else pa.int32() for name in self._fields}
        columns = [(name, pa.list_(kind)) for name, kind in storage.items()] + [("length", pa.int32())]
        columns += [(name, pa.from_numpy_dtype(dtype)) for name, dtype in TAG_TYPES.items()]
        self._schema = pa.schema([*columns, (self._origin, pa.string())])
        self._row_type = row_type
        self._path = path
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._pending: list[RowArrays] = []
        self._content = hashlib.sha256()
        self._checks: list[int] = []
        self._kept: list[tuple[np.ndarray, ...]] = []  # lengths and tags of every record batch

    def append(self, block: RowArrays) -> None:
        """Adds rows, which are written once there are enough for a record batch."""
        if len(block):
            # The digest covers rows in their order and not the record batches, so BATCH_ROWS may change.
            self._content.update(interleaved(block))
            self._pending.append(block)
        # Record batches of a chunk each would make the file's index large and reading slow.
        if sum(map(len, self._pending)) >= BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Finishes the file."""
        self._flush()
        self._writer.close()

    def meta(self) -> dict[str, Any]:
        """Returns the content of the JSON file next to the finished file, except its stamp."""
        kept = [np.concatenate(arrays) for arrays in zip(*self._kept, strict=True)]
        return {
            "file_digest": file_digest(self._path),
            "digest": self._content.hexdigest(),
            "batches": self._checks,
            "tags": _check(kept),
            "about": self.about,
        }

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        block = concatenated(self._pending)
        self._pending = []
        lengths = longest(block.lengths, self._row_type)
        columns: dict[str, Any] = {}
        arrays: list[np.ndarray] = []
        for field in self._fields:
            # int32 offsets, as Arrow's lists have them; a record batch has far fewer than 2^31 tokens.
            offsets = np.concatenate([[0], block.lengths[field].cumsum()]).astype(np.int32)
            elements = block.values[field]
            arrays += [offsets, elements]
            stored = elements.view(np.uint8) if elements.dtype == np.bool_ else elements  # read back without a copy
            # Lists of uint8, because Arrow's booleans are bits, which numpy cannot view without a copy.
            columns[field] = pa.ListArray.from_arrays(offsets, pa.array(stored))
        columns["length"] = pa.array(lengths)
        columns |= {name: pa.array(array) for name, array in zip(Tags._fields, block.tags, strict=True)}
        columns[self._origin] = pa.array(block.origins, pa.string())
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._checks.append(_check(arrays))
        self._kept.append((lengths, *block.tags))


def open_rows(folder: Path, key: str, row_type: type[R]) -> StoredRows[R] | None:
    """Opens the rows stored under `key`; returns None if there are none or they are damaged."""
    path = folder / f"{key}.arrow"
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stamp = _stamp(path)
        # Usually a copied cache: the content decides, and the new stamp is stored so that the next start is fast again.
        if any(meta[name] != value for name, value in stamp.items()):
            if file_digest(path) != meta["file_digest"]:
                return None
            with contextlib.suppress(OSError):  # a read-only cache has to be read whole at every start
                write_durably(path.with_suffix(".json"), json.dumps(meta | stamp), writer=unique_writer())
        return StoredRows(path, row_type, meta)
    # Any damage of the JSON or the Arrow file only means that the rows are tokenized again.
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def writing_rows(folder: Path, key: str, row_type: type[R]) -> Iterator[RowWriter[R]]:
    """Yields a writer whose rows are stored under `key` when the block ends; nothing is stored if the block raises.

    Raises:
      ValueError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder)
        # In the same folder, because os.replace is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            writer = RowWriter(Path(temporary) / "rows.arrow", row_type)
            with contextlib.closing(writer):
                yield writer
            if open_rows(folder, key, row_type) is not None:
                return  # another process was faster, and may have mapped its file already
            meta, path = writer.meta(), folder / f"{key}.arrow"
            _put(Path(temporary) / "rows.arrow", path, meta["file_digest"])
            # The JSON last, since it declares the Arrow file complete.
            write_durably(path.with_suffix(".json"), json.dumps(meta | _stamp(path)), writer=unique_writer())
    except OSError as error:
        raise cannot_write(folder, error) from error


def _put(new: Path, path: Path, digest: str) -> None:
    """Moves a file to its place, unless the same content is there, which other processes may have mapped.

    On NFS, a mapped file that another host replaces is gone, and reading it ends the process.

    Args:
      digest: of the new file.
    """
    try:
        os.link(new, path)  # fails if there is a file, whoever has just written it
        return
    except FileExistsError:
        with contextlib.suppress(OSError):
            if file_digest(path) == digest:
                return
    except OSError:  # a file system without hard links
        pass
    os.replace(new, path)


def cannot_write(folder: Path, error: OSError) -> ValueError:
    """Returns the error for a cache that cannot be written."""
    return ValueError(
        f"cannot write tokenized rows to {folder}: {error.strerror or error}; set cache_dir to a writable folder"
    )


def _clear_abandoned(folder: Path) -> None:
    """Removes unfinished files of killed processes: those that have not been written to for a day."""
    for path in folder.glob(".new-*"):
        with contextlib.suppress(OSError):  # another process may have just removed it
            # A folder's own time does not change while its file grows.
            newest = max(file.stat().st_mtime for file in [*path.iterdir()] or [path])
            if newest < time.time() - 86_400:
                shutil.rmtree(path, ignore_errors=True)


def _stamp(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _check(arrays: Iterable[np.ndarray]) -> int:
    """Returns one CRC-32 over all arrays in their order."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
    return value
