"""The per-token log-probs of a reference on disk, computed once per row instead of in every epoch and run.

<cache_dir>/reference/<key>/
  key.json             what the log-probs depend on; see `cache_key`
  00000.safetensors    SHARD_ROWS rows: `logps` float32 (float64 if the model computes in it), for each row the values
                       of its chosen completion, then of its rejected one; `lengths` int32 [rows, 2]
  00000.json           digest of the shard, written after it: a shard without this file counts as missing
  asked.json           runs that would have used the log-probs if they had been there

Axes: n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jdpo.data.prepared.prepare import cache_folder
from jdpo.data.reference_cache.cache_key import KEY_FILE, CacheEntry, read_entry
from jdpo.durable import TEMPORARY, is_abandoned, unique_writer, write_durably
from jdpo.file_digests import file_digest
from jdpo.file_locks import lock_file
from jdpo.types import CHOSEN, REJECTED, AnyPair

SHARD_ROWS = 1024
"""Rows in each shard except the last. A computation that is killed loses at most this many."""

REMEDY = "`jdpo reference CONFIG` computes it again"

RowLogps = tuple[np.ndarray, np.ndarray]
"""Log-probs of the completion tokens of a row's chosen and rejected side, 0 for tokens that are not learnt."""


def cache_root(cache_dir: str | None) -> Path:
    """Returns the folder of all entries; None: below `$XDG_CACHE_HOME/jdpo` or ~/.cache/jdpo."""
    return cache_folder(cache_dir) / "reference"


class Shards(NamedTuple):
    """The state of an entry's shards.

    Attributes:
      whole: bool [shards], present with the digest that was written.
      damaged: bool [shards], present with another digest.
      damaged_files: the damaged files.
    """

    whole: np.ndarray
    damaged: np.ndarray
    damaged_files: tuple[Path, ...]

    @property
    def missing(self) -> np.ndarray:
        """bool [shards], neither whole nor damaged."""
        return ~(self.whole | self.damaged)


class CacheFolder:
    """The folder of one entry, complete or not.

    Attributes:
      path: the folder.
      num_rows: number of rows of the complete entry.
      dtype: dtype of the log-probs.
    """

    def __init__(self, root: Path, key: str, *, num_rows: int, dtype: np.dtype) -> None:
        self.path, self.key = root / key, key
        self.num_rows, self.dtype = num_rows, np.dtype(dtype)
        # Rounded up: the last shard has the remainder.
        self.num_shards = -(-num_rows // SHARD_ROWS)

    def rows_of(self, shard: int) -> range:
        """Returns the rows of a shard."""
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.num_rows))

    def count_rows(self, shards: np.ndarray) -> int:
        """Returns the number of rows of the shards that are True in bool [shards]."""
        return sum(len(self.rows_of(int(shard))) for shard in np.flatnonzero(shards))

    def shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def examine(self) -> Shards:
        """Reads every shard and compares it with the digest next to it."""
        whole, damaged = np.zeros(self.num_shards, bool), np.zeros(self.num_shards, bool)
        files: list[Path] = []
        try:
            read_entry(self.path)
        except ValueError:
            files.append(self.path / KEY_FILE)
        for shard in range(self.num_shards):
            path = self.shard_path(shard)
            found = _read_text(path.with_suffix(".json"))
            if found is not None:
                whole[shard] = self.is_whole(shard)
                damaged[shard] = not whole[shard]
            if damaged[shard]:
                files.append(path)
        return Shards(whole, damaged, tuple(files))

    def is_whole(self, shard: int) -> bool:
        """Returns whether a shard is present and as it was written; reads the whole file."""
        found = _read_text(self.shard_path(shard).with_suffix(".json"))
        return found is not None and found == self._voucher(shard)

    def has_entry(self) -> bool:
        """Returns whether `key.json` exists and is undamaged."""
        try:
            return read_entry(self.path) is not None
        except ValueError:
            return False

    def write_entry(self, entry: CacheEntry) -> None:
        """Writes `key.json`."""
        assert entry.key == self.key, (entry.key, self.key)
        _write(self.path / KEY_FILE, entry.text().encode())

    def write_shard(self, shard: int, rows: Sequence[RowLogps]) -> None:
        """Writes one shard, all or nothing.

        Args:
          rows: the log-probs of each row of `rows_of(shard)`, in that order.
        """
        from safetensors.numpy import save

        assert len(rows) == len(self.rows_of(shard)), (len(rows), shard)
        lengths = np.array([[len(side) for side in row] for row in rows], np.int32)
        # One flat array per shard: a file with one tensor per row would be mostly header.
        logps = np.concatenate([side for row in rows for side in row]).astype(self.dtype)
        path = self.shard_path(shard)
        path.with_suffix(".json").unlink(missing_ok=True)  # the digest of a damaged shard would not fit the new one
        _write(path, save({"logps": logps, "lengths": lengths}))
        # Computed from the file on disk, so the digest also covers what the disk returned.
        voucher = self._voucher(shard)
        assert voucher is not None
        _write(path.with_suffix(".json"), voucher.encode())

    def _voucher(self, shard: int) -> str | None:
        """Returns the exact content that the JSON file next to a shard must have; None if there is no shard."""
        try:
            digest = file_digest(self.shard_path(shard))
        except FileNotFoundError:
            return None
        except OSError:  # a folder of that name, or a disk error
            return ""
        rows = self.rows_of(shard)
        values = {"key": self.key, "first_row": rows.start, "num_rows": len(rows), "sha256": digest}
        return json.dumps(values, indent=1) + "\n"

    def refuse_damaged(self, shards: Shards) -> None:
        """Refuses an entry with damaged files.

        Raises:
          ValueError: files are damaged; the message names them and says what to do.
        """
        if shards.damaged_files:
            raise ValueError(f"the reference's cached log-probs are damaged: {self.damage(shards)}; {REMEDY}")

    def damage(self, shards: Shards) -> str:
        """Returns a sentence that names the damaged files, at least one."""
        first = shards.damaged_files[0]
        name = str(first) if first.name == KEY_FILE else f"{first} or the .json next to it"
        more = len(shards.damaged_files) - 1
        return f"{name} is not as it was written{f', nor are {more} more' if more else ''}"

    def open(self, shards: Shards | None = None) -> ReferenceCache:
        """Opens the log-probs of a complete entry.

        Args:
          shards: the result of `examine`, which is called if this is None.

        Raises:
          ValueError: shards are damaged or missing.
        """
        shards = shards or self.examine()
        self.refuse_damaged(shards)
        if not shards.whole.all():
            missing = self.shard_path(int(np.flatnonzero(~shards.whole)[0]))
            raise ValueError(
                f"the reference's cached log-probs are not complete: {missing} and {int((~shards.whole).sum()) - 1} "
                "more shards are missing; `jdpo reference CONFIG` computes them"
            )
        return ReferenceCache(self)

    # --- other runs

    def try_lock(self) -> IO[str] | None:
        """Locks the entry against other runs until the returned file is closed; returns None if another run has it."""
        return lock_file(self.path / ".lock")

    def clear_unfinished(self) -> None:
        """Removes unfinished files of killed processes. Call it under the lock."""
        for path in self.path.glob(f"*{TEMPORARY}"):
            with contextlib.suppress(OSError):  # another process removes it, too
                # The lock may have no effect on another host, which may be writing.
                if is_abandoned(path):
                    path.unlink(missing_ok=True)

    def asked_by(self) -> list[str]:
        """Returns the runs recorded by `ask`. A damaged list counts as empty, since no result depends on it."""
        try:
            names = json.loads((self.path / "asked.json").read_text(encoding="utf-8"))["runs"]
            return [str(name) for name in names]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def ask(self, run: str) -> None:
        """Records that a run would have used this entry."""
        runs = self.asked_by()
        if run not in runs:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "asked.json", json.dumps({"runs": [*runs, run]}, indent=1).encode())


class ReferenceCache:
    """The log-probs of a complete entry by row, memory-mapped. Several threads may read it at once.

    Attributes:
      path: the folder.
      dtype: dtype of the log-probs.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self.path, self.dtype, self._num_rows = folder.path, folder.dtype, folder.num_rows
        self._shard_path = folder.shard_path
        self._shards = [_Shard(folder.shard_path(shard), folder.dtype) for shard in range(folder.num_shards)]

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int, pair: AnyPair) -> RowLogps:
        """Returns the log-probs of the completion tokens of row `index`.

        Args:
          pair: the row itself, whose lengths must be those of the row that was scored.

        Raises:
          ValueError: there is no such row, or its lengths differ; the message names row and file.
        """
        # numpy would read a negative index from the end, and return the scores of another row.
        if not 0 <= index < len(self):
            raise ValueError(f"row {index} ({pair.origin}) is not among the {len(self)} cached rows of {self.path}")
        shard, offset = divmod(index, SHARD_ROWS)
        found = self._shards[shard].row(offset)
        expected = (len(pair.chosen_ids), len(pair.rejected_ids))
        # Row numbers alone cannot show that the data changed; a wrong length is a sure sign.
        lengths = (len(found[CHOSEN]), len(found[REJECTED]))
        if lengths != expected:
            raise ValueError(
                f"row {index} ({pair.origin}) has completions of {expected[0]} and {expected[1]} tokens, but "
                f"{self._shard_path(shard)} holds log-probs of {lengths[0]} and {lengths[1]}; {REMEDY}"
            )
        return found


class _Shard:
    """One file of log-probs, memory-mapped by safetensors, which copies only the slices that are read."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        from safetensors import safe_open

        file = safe_open(path, framework="numpy")
        self._logps = file.get_slice("logps")
        self._ends = np.cumsum(file.get_tensor("lengths").reshape(-1), dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        found = (self._logps.get_dtype(), self._logps.get_shape())
        if found != (_DTYPE_NAMES[dtype], [total]):
            raise ValueError(
                f"{path}: expected {total} log-probs of {dtype}, found {found[0]} of shape {found[1]}; {REMEDY}"
            )

    def row(self, offset: int) -> RowLogps:
        # Two sides per row, so side n of a row ends at index 2 * row + n.
        middle, stop = int(self._ends[2 * offset]), int(self._ends[2 * offset + 1])
        start = int(self._ends[2 * offset - 1]) if offset else 0
        return self._logps[start:middle], self._logps[middle:stop]


_DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
"""dtype -> its name in safetensors files."""


def reference_logps_of(
    cache: ReferenceCache, pairs: Sequence[AnyPair], indices: np.ndarray, *, num_slots: int, length: int
) -> np.ndarray:
    """Returns cached log-probs in the layout of `collate_pairs`: float32 (or float64) [num_slots, 2, length].

    The value of the j-th completion token of a side is at position len(prompt) + j; all other positions are 0.

    Args:
      pairs: the rows of a batch.
      indices: int [pairs], their row numbers in the data.

    Raises:
      ValueError: a row is not in the cache, or has other lengths there.
    """
    assert len(pairs) == len(indices) <= num_slots, (len(pairs), len(indices), num_slots)
    # Slots without a pair stay 0; their weight is 0 too.
    logps = np.zeros((num_slots, 2, length), cache.dtype)
    for slot, (index, pair) in enumerate(zip(indices, pairs, strict=True)):
        start = len(pair.prompt_ids)
        for side, values in enumerate(cache.row(int(index), pair)):
            logps[slot, side, start : start + len(values)] = values
    return logps


def _write(path: Path, content: bytes) -> None:
    # Two hosts may share the folder without knowing of each other.
    write_durably(path, content, writer=unique_writer())


def _read_text(path: Path) -> str | None:
    """Returns the text of a file, None if it does not exist, and a text unlike any voucher if it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return "unreadable"
