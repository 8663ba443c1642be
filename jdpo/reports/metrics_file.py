"""Reads metrics.jsonl, which has one JSON object per line, when a run continues, ends or is exported.

A power cut, a full disk or an editor can leave anything in this file. Complete lines are used, and the others never
stop a run, because checkpoints do not depend on them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.durable import free_place, keep_old, utc_stamp, write_durably

_START = b'{"step": '
"""The beginning of every line that jdpo writes."""


class MetricsLines(NamedTuple):
    """The content of a metrics.jsonl.

    Attributes:
      lines: the objects that could be read, each with an integer `step` and numbers otherwise.
      texts: the same lines as bytes.
      damage: number and fault of every other line. A last line that a crash cut off is not damage, because it belongs
        to a step that no checkpoint has.
    """

    lines: list[dict[str, Any]]
    texts: list[bytes]
    damage: list[str]

    def summary(self) -> str:
        """Describes the damage in a few words."""
        more = len(self.damage) - 1
        return self.damage[0] + (f", and {more} more" if more > 0 else "")


def scan_metrics(path: Path) -> MetricsLines:
    """Reads a metrics.jsonl, damaged or not.

    Raises:
      OSError: the file cannot be read.
    """
    found = MetricsLines([], [], [])
    # Every line ends in a newline, so `tail` is empty unless a crash cut the last line off.
    *texts, tail = path.read_bytes().split(b"\n")
    for number, text in enumerate([*texts, tail], start=1):
        line = _parse(text)
        if isinstance(line, dict):
            found.lines.append(line)
            found.texts.append(text)
        elif text and not (number > len(texts) and _is_torn(text)):
            found.damage.append(f"line {number} {line}")
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the readable lines of a metrics.jsonl; see `MetricsLines`. There are none if there is no such file."""
    try:
        return scan_metrics(path).lines if path.is_file() else []
    except OSError:
        return []


def cut_metrics(path: Path, last_step: int | None) -> str | None:
    """Removes the lines after `last_step`, and lines that cannot be read, from a metrics.jsonl, atomically.

    Args:
      last_step: step of the checkpoint from which the run continues; None: it starts at step 0, whose evaluation is
        made again, and no line stays.

    Returns:
      a sentence for the user if the file was damaged; the damaged file is then kept next to the new one.
    """
    if not os.path.lexists(path):
        return f"{path} is missing; the metrics up to step {last_step} are lost" if last_step else None
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        found = scan_metrics(path)
    except OSError as error:
        kept = keep_old(path, "damaged")
        return (
            f"{path} cannot be read ({error.strerror or error}); it is kept as {kept.name}, and a new file is started"
        )
    # The original bytes: encoding the objects again could change how a number is written.
    both = zip(found.lines, found.texts, strict=True)
    texts = [text for line, text in both if last_step is not None and line["step"] <= last_step]
    content = b"".join(text + b"\n" for text in texts)
    note = None
    if found.damage:
        kept = free_place(path, f"{path.stem}.damaged-{utc_stamp()}", path.suffix)
        # A copy, not a rename: until the new file is written, there is always a metrics.jsonl.
        shutil.copyfile(path, kept)
        note = (
            f"{path} is damaged ({found.summary()}); its readable lines are used, and the damaged file is kept as "
            f"{kept.name}"
        )
    # Nothing to remove is the usual case; the file then keeps its time.
    if content != path.read_bytes():
        write_durably(path, content)
    return note


def _parse(text: bytes) -> dict[str, Any] | str:
    """Returns the object of a line, or what is wrong with the line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(line, dict):
        return "is not a JSON object"
    step = line.get("step")
    if type(step) is not int or step < 0:  # isinstance would accept true
        return "has no step"
    wrong = [key for key, value in line.items() if not _is_number(value)]
    return f"has a value that is not a number under {wrong[0]!r}" if wrong else line


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):  # isinstance would accept true
        return False
    try:
        float(value)  # JSON integers have any size
    except OverflowError:
        return False
    return True


def _is_torn(text: bytes) -> bool:
    """Returns True if a last line without a newline is the beginning of a line that jdpo wrote."""
    # NUL bytes are what some file systems leave in a file after a power failure: damage, not a torn line.
    return b"\0" not in text and (text.startswith(_START) or _START.startswith(text))
