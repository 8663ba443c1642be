"""A reference's per-token log-probs on disk, so that it runs over every row once and not in every epoch and run.

<cache_dir>/reference/<key>/
  key.json             what the log-probs are of; see `reference_key`
  00000.safetensors    of SHARD_ROWS rows one after the other: `logps` float32 (float64 where the model computes in
                       it), the values of each row's chosen completion, then of its rejected; `lengths` int32 [rows, 2]
  00000.json           vouches for the shard, written after it: a shard without one counts as missing
  asked.json           runs that would have used the log-probs, had they been there

Axes: n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jdpo.data.prepared.prepare import cache_folder
from jdpo.data.reference_cache.cache_key import KEY_FILE, Entry, read_entry
from jdpo.durable import TEMPORARY, write_durably
from jdpo.file_digests import file_digest
from jdpo.file_locks import lock_file
from jdpo.types import CHOSEN, REJECTED, AnyPair

SHARD_ROWS = 1024
"""Rows in each shard but the last: what a killed computation loses at most."""

REMEDY = "`jdpo reference CONFIG` computes it anew"

RowLogps = tuple[np.ndarray, np.ndarray]
"""Log-probs of the completion tokens of a row's chosen and rejected side, 0 for those that are not learnt."""


def cache_root(cache_dir: str | None) -> Path:
    """Where the entries of the cache lie; None: under `$XDG_CACHE_HOME/jdpo`, else ~/.cache/jdpo."""
    return cache_folder(cache_dir) / "reference"


class Shards(NamedTuple):
    """What was found of an entry: bool [shards] each, and the files that are not as they were written."""

    whole: np.ndarray
    damaged: np.ndarray
    damaged_files: tuple[Path, ...]

    @property
    def missing(self) -> np.ndarray:
        """Neither whole nor damaged."""
        return ~(self.whole | self.damaged)


class CacheFolder:
    """The folder of one entry, whole or not.

    Attributes:
      path: the folder.
      num_rows: rows that the entry is to hold.
      dtype: of the log-probs.
    """

    def __init__(self, root: Path, key: str, *, num_rows: int, dtype: np.dtype) -> None:
        self.path, self.key = root / key, key
        self.num_rows, self.dtype = num_rows, np.dtype(dtype)
        self.num_shards = -(-num_rows // SHARD_ROWS)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.num_rows))

    def count_rows(self, shards: np.ndarray) -> int:
        """Rows of the shards that are True in bool [shards]."""
        return sum(len(self.rows_of(int(shard))) for shard in np.flatnonzero(shards))

    def shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def examine(self) -> Shards:
        """Reads every shard and compares it with the file that vouches for it."""
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
                whole[shard] = found == self._voucher(shard)
                damaged[shard] = not whole[shard]
            if damaged[shard]:
                files.append(path)
        return Shards(whole, damaged, tuple(files))

    def has_entry(self) -> bool:
        """Whether the file that says what the log-probs are of stands, undamaged."""
        try:
            return read_entry(self.path) is not None
        except ValueError:
            return False

    def write_entry(self, entry: Entry) -> None:
        """Keeps what the log-probs are of."""
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
        logps = np.concatenate([side for row in rows for side in row]).astype(self.dtype)
        path = self.shard_path(shard)
        path.with_suffix(".json").unlink(missing_ok=True)  # of a damaged shard: it would not vouch for the new one
        _write(path, save({"logps": logps, "lengths": lengths}))
        voucher = self._voucher(shard)
        assert voucher is not None
        _write(path.with_suffix(".json"), voucher.encode())

    def _voucher(self, shard: int) -> str | None:
        """What the file that vouches for a shard must hold, byte for byte; None where there is no shard."""
        try:
            digest = file_digest(self.shard_path(shard))
        except FileNotFoundError:
            return None
        except OSError:  # a folder in its place, or a disk that does not give it back
            return ""
        rows = self.rows_of(shard)
        values = {"key": self.key, "first_row": rows.start, "num_rows": len(rows), "sha256": digest}
        return json.dumps(values, indent=1) + "\n"

    def refuse_damaged(self, shards: Shards) -> None:
        """
        Raises:
          ValueError: naming the damaged files and what to do.
        """
        if shards.damaged_files:
            raise ValueError(f"the reference's cached log-probs are damaged: {self.damage(shards)}; {REMEDY}")

    def damage(self, shards: Shards) -> str:
        """Names the damaged files, of which there is at least one."""
        first = shards.damaged_files[0]
        name = str(first) if first.name == KEY_FILE else f"{first} or the .json beside it"
        more = len(shards.damaged_files) - 1
        return f"{name} is not as it was written{f', nor are {more} more' if more else ''}"

    def open(self, shards: Shards | None = None) -> ReferenceCache:
        """The log-probs by row.

        Args:
          shards: what `examine` found, so that it need not look again.

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
        """Keeps other runs from computing this entry until the file given is closed; None while another does."""
        return lock_file(self.path / ".lock")

    def clear_unfinished(self) -> None:
        """Removes what a killed process was writing; to be called under the lock."""
        for path in self.path.glob(f"*{TEMPORARY}"):
            path.unlink(missing_ok=True)

    def asked_by(self) -> list[str]:
        """The runs that left their name with `ask`; a damaged list counts as empty, since nothing depends on it."""
        try:
            names = json.loads((self.path / "asked.json").read_text(encoding="utf-8"))["runs"]
            return [str(name) for name in names]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def ask(self, run: str) -> None:
        """Remembers that a run would have used this entry."""
        runs = self.asked_by()
        if run not in runs:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "asked.json", json.dumps({"runs": [*runs, run]}, indent=1).encode())


class ReferenceCache:
    """Log-probs by row, memory-mapped; may be read from several threads.

    Attributes:
      path: the folder.
      dtype: of the log-probs.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self.path, self.dtype, self._num_rows = folder.path, folder.dtype, folder.num_rows
        self._shard_path = folder.shard_path
        self._shards = [_Shard(folder.shard_path(shard), folder.dtype) for shard in range(folder.num_shards)]

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int, pair: AnyPair) -> RowLogps:
        """The log-probs of the completion tokens of row `index`.

        Args:
          pair: the row itself; its lengths must be those of the row that was scored.

        Raises:
          ValueError: there is no such row, or it is another; row and file are named.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"row {index} ({pair.origin}) is not among the {len(self)} cached rows of {self.path}")
        shard, offset = divmod(index, SHARD_ROWS)
        found = self._shards[shard].row(offset)
        expected = (len(pair.chosen_ids), len(pair.rejected_ids))
        lengths = (len(found[CHOSEN]), len(found[REJECTED]))
        if lengths != expected:
            raise ValueError(
                f"row {index} ({pair.origin}) has completions of {expected[0]} and {expected[1]} tokens, but "
                f"{self._shard_path(shard)} holds log-probs of {lengths[0]} and {lengths[1]}; {REMEDY}"
            )
        return found


class _Shard:
    """One file of log-probs."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        tensors = _map_safetensors(path)
        self._logps, lengths = tensors["logps"], np.asarray(tensors["lengths"])
        self._ends = np.cumsum(lengths.reshape(-1), dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        if self._logps.dtype != dtype or self._logps.shape != (total,):
            raise ValueError(
                f"{path} should hold {total} {dtype} log-probs, found {self._logps.shape} {self._logps.dtype}; {REMEDY}"
            )

    def row(self, offset: int) -> RowLogps:
        middle, stop = int(self._ends[2 * offset]), int(self._ends[2 * offset + 1])
        start = int(self._ends[2 * offset - 1]) if offset else 0
        return self._logps[start:middle], self._logps[middle:stop]


def reference_logps_of(
    cache: ReferenceCache, pairs: Sequence[AnyPair], indices: np.ndarray, *, num_slots: int, length: int
) -> np.ndarray:
    """Cached log-probs in the layout of `collate_pairs`: float32 (or float64) [num_slots, 2, length].

    The value of the j-th completion token of a side stands at position len(prompt) + j; elsewhere stands 0.

    Args:
      pairs: the rows of a batch.
      indices: int [pairs], which rows of the data they are.

    Raises:
      ValueError: a row is not in the cache, or is another there.
    """
    assert len(pairs) == len(indices) <= num_slots, (len(pairs), len(indices), num_slots)
    logps = np.zeros((num_slots, 2, length), cache.dtype)
    for slot, (index, pair) in enumerate(zip(indices, pairs, strict=True)):
        start = len(pair.prompt_ids)
        for side, values in enumerate(cache.row(int(index), pair)):
            logps[slot, side, start : start + len(values)] = values
    return logps


def _write(path: Path, content: bytes) -> None:
    # Under a name of its own, should processes of two hosts share the folder without knowing.
    write_durably(path, content, writer=f".{socket.gethostname()}-{os.getpid()}")


def _read_text(path: Path) -> str | None:
    """None where there is no file; what is not UTF-8, or cannot be read, is a text that nothing equals."""
    try:
        return path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return "unreadable"


_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I32": np.dtype("<i4")}


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped and not read: safetensors' own reader would copy each slice."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    tensors = {}
    for name, about in header.items():
        start, stop = (8 + size + offset for offset in about["data_offsets"])
        tensors[name] = data[start:stop].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return tensors
