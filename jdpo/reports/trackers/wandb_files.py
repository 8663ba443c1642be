"""Reads the files in which Weights & Biases keeps what an offline run logged."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

HEADER_BYTES = 7
BLOCK_BYTES = 32768
WHOLE, FIRST, LAST = 1, 2, 4
"""Kinds of parts; records that end a block are split."""


def newest_step_in(folder: Path, run_id: str) -> int:
    """Returns the newest step in the files of the starts of a run; -1 if there is none.

    A row is written when the next step begins, and reaches the disk seconds later, so a killed run lacks its last rows.
    """
    from wandb.proto import wandb_internal_pb2

    newest = -1
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        for content in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                newest = max(newest, record.history.step.num)
    return newest


def _records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a log in the format of LevelDB; what a kill has cut off at its end is left out."""
    at, record = HEADER_BYTES, b""
    while at + 7 <= len(content):
        if (left := BLOCK_BYTES - at % BLOCK_BYTES) < 7:  # too small for the head of a part
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)  # of which the checksum is left to wandb
        part = content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 or len(part) < length:
            return
        record = part if kind in (WHOLE, FIRST) else record + part
        if kind in (WHOLE, LAST):
            yield record
