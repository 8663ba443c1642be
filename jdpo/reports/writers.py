"""Writes metrics.jsonl, line by line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from jdpo.durable import naming


class JsonlWriter:
    """Appends one JSON object per line; the line is in the file when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float | int]) -> None:
        with naming(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()  # a killed process loses no line; `sync` is for power failures

    def sync(self) -> None:
        """Flushes all lines to the disk, before a checkpoint relies on them."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which `write` has reported; other lines are flushed
            self._file.close()
