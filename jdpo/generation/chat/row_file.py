"""Files of rows that a conversation adds to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.durable import write_durably


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Appends rows to a JSONL file, all or none of them; returns how many rows the file has then.

    Args:
      path: a file of rows with the same columns, or a new file; its folder is made.

    Raises:
      ValueError: the file holds something else, or cannot be written.
    """
    try:
        before = path.read_bytes() if path.exists() else b""
        lines = before.splitlines()
        for number, line in enumerate(lines, start=1):
            _check(line, rows[0], f"{path}:{number}")
        if before and not before.endswith(b"\n"):
            before += b"\n"
        after = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, before + after.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    return len(lines) + len(rows)


def _check(line: bytes, row: Mapping[str, Any], place: str) -> None:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not row.keys() <= found.keys():
        raise ValueError(f"{place} is no row with {', '.join(row)}; save to another file")
