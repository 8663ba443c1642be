"""Tokenized rows on disk: one Arrow file, memory-mapped, with a JSON file beside it that vouches for it.

`<key>.arrow` is written to a temporary name and renamed; `<key>.json`, with its digest, follows. A file that
is not as its JSON says counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jdpo.types import TokenizedCompletion, TokenizedPair

R = TypeVar("R", bound=TokenizedPair | TokenizedCompletion)

BATCH_ROWS = 1024
"""Rows in each record batch of a file, but the last."""


class RowStore(Generic[R]):
    """Tokenized rows by index, read from the file when asked for.

    Attributes:
      lengths: int32 [rows], tokens of the longest sequence of each row.
      about: what `RowWriter.about` was.
      digest: content digest of the token ids and masks.
      path: the Arrow file.
    """

    def __init__(self, path: Path, row_type: type[R], meta: dict[str, Any]) -> None:
        import pyarrow as pa

        self.path = path
        self.about: dict[str, Any] = meta["about"]
        self.digest: str = meta["digest"]
        self.row_type = row_type
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        lengths = [np.asarray(batch.column("length")) for batch in self._batches]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> R:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch, offset = self._batches[index // BATCH_ROWS], index % BATCH_ROWS
        *arrays, origin = self.row_type._fields
        values = [_cell(batch.column(name), offset, _dtype(name)) for name in arrays]
        row_type: Any = self.row_type
        row: R = row_type(*values, batch.column(origin)[offset].as_py())
        return row

    def lengths_of(self, field: str) -> np.ndarray:
        """Elements of a field of every row, int64 [rows]; reads no rows."""
        parts = [np.diff(np.asarray(batch.column(field).offsets)) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64)

    def counts_of(self, mask: str) -> np.ndarray:
        """How many elements of a mask are True behind the first, of every row: int64 [rows]."""
        counts = []
        for batch in self._batches:
            offsets = np.asarray(batch.column(mask).offsets).astype(np.int64)
            up_to = np.concatenate([[0], np.cumsum(np.asarray(batch.column(mask).values), dtype=np.int64)])
            first = np.minimum(offsets[:-1] + 1, offsets[1:])
            counts.append(up_to[offsets[1:]] - up_to[first])
        return np.concatenate(counts)


class RowWriter(Generic[R]):
    """Writes rows as they come, holding one record batch in memory.

    Attributes:
      about: JSON values to be kept with the rows; to be set before the file is closed.
    """

    def __init__(self, path: Path, row_type: type[R]) -> None:
        import pyarrow as pa

        self.about: dict[str, Any] = {}
        *self._arrays, self._origin = row_type._fields
        storage = {name: pa.uint8() if _dtype(name) == np.bool_ else pa.int32() for name in self._arrays}
        self._schema = pa.schema(
            [(name, pa.list_(kind)) for name, kind in storage.items()]
            + [("length", pa.int32()), (self._origin, pa.string())]
        )
        self._path = path
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._pending: list[R] = []
        self._content = hashlib.sha256()

    def append(self, row: R) -> None:
        self._pending.append(row)
        for name in self._arrays:
            values: np.ndarray = getattr(row, name)
            self._content.update(len(values).to_bytes(4, "little") + values.astype(_dtype(name)).tobytes())
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Finishes the file."""
        self._flush()
        self._writer.close()

    def meta(self) -> dict[str, Any]:
        """What the JSON file beside the finished file is to say."""
        return {
            "file_digest": _file_digest(self._path),
            "digest": self._content.hexdigest(),
            "about": self.about,
        }

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        rows, self._pending = self._pending, []
        columns: dict[str, Any] = {
            name: _lists([getattr(row, name) for row in rows], _dtype(name)) for name in self._arrays
        }
        columns["length"] = pa.array([row_length(row) for row in rows], pa.int32())
        columns[self._origin] = pa.array([row.origin for row in rows], pa.string())
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def row_length(row: TokenizedPair | TokenizedCompletion) -> int:
    """Tokens of the longest sequence of a row."""
    if isinstance(row, TokenizedPair):
        return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
    return len(row.tokens)


def open_store(folder: Path, key: str, row_type: type[R]) -> RowStore[R] | None:
    """Opens rows kept under `key`, or None where there are none or they are damaged."""
    path = folder / f"{key}.arrow"
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if _file_digest(path) != meta["file_digest"]:
            return None
        return RowStore(path, row_type, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def creating(folder: Path, key: str, row_type: type[R]) -> Iterator[RowWriter[R]]:
    """A writer whose rows are kept under `key` at the end of the block; nothing stays if it raises.

    Raises:
      ValueError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            writer = RowWriter(Path(temporary) / "rows.arrow", row_type)
            with contextlib.closing(writer):
                yield writer
            meta = json.dumps(writer.meta(), indent=1, ensure_ascii=False)
            (Path(temporary) / "rows.json").write_text(meta, encoding="utf-8")
            for suffix in (".arrow", ".json"):  # the one that vouches for the other comes last
                os.replace(Path(temporary) / f"rows{suffix}", folder / f"{key}{suffix}")
    except OSError as error:
        raise ValueError(
            f"cannot keep tokenized rows in {folder}: {error.strerror or error}; set cache_dir to a folder that "
            "can be written"
        ) from error


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dtype(field: str) -> type[np.generic]:
    return np.bool_ if field.endswith("_mask") else np.int32


def _lists(vectors: list[np.ndarray], dtype: type[np.generic]) -> Any:
    """An Arrow list array of vectors; bools are stored as bytes, to be read back without a copy."""
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, vectors)], dtype=np.int32)
    values = np.concatenate(vectors).astype(dtype)
    return pa.ListArray.from_arrays(offsets, pa.array(values.view(np.uint8) if dtype == np.bool_ else values))


def _cell(column: Any, row: int, dtype: type[np.generic]) -> np.ndarray:
    start, stop = np.asarray(column.offsets)[row : row + 2]
    values: np.ndarray = np.asarray(column.values)[start:stop]
    return values.view(np.bool_) if dtype == np.bool_ else values
