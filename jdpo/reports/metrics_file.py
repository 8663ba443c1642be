"""metrics.jsonl: one JSON object per line, read back when a run continues, ends or is exported.

A power cut, a full disk or an editor can leave anything in this file. Lines that are whole are used, and the others
never stop a run: checkpoints do not depend on them.
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
      texts: the same as they are in the file.
      damage: for each other line, its number and what is wrong with it. The last line, where a crash cut it off, is not
        damage: it belongs to a step that no checkpoint has.
    """

    lines: list[dict[str, Any]]
    texts: list[bytes]
    damage: list[str]

    def summary(self) -> str:
        """The damage in a few words."""
        more = len(self.damage) - 1
        return self.damage[0] + (f", and {more} more" if more > 0 else "")


def scan_metrics(path: Path) -> MetricsLines:
    """Reads a metrics.jsonl, whatever is in it.

    Raises:
      OSError: it cannot be read at all.
    """
    found = MetricsLines([], [], [])
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
    """The lines of a metrics.jsonl that can be read; see `MetricsLines`. None where there is no such file."""
    try:
        return scan_metrics(path).lines if path.is_file() else []
    except OSError:
        return []


def cut_metrics(path: Path, last_step: int) -> str | None:
    """Takes the lines after `last_step` off a metrics.jsonl, all or nothing, and those that cannot be read.

    Args:
      last_step: the step of the checkpoint that the run continues from.

    Returns:
      a sentence for the person who started the run where the file was damaged; it is then kept next to the new one.
    """
    if not os.path.lexists(path):
        return f"{path} is missing: the metrics up to step {last_step} are lost" if last_step else None
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        found = scan_metrics(path)
    except OSError as error:
        kept = keep_old(path, "damaged")
        return f"{path} cannot be read ({error.strerror or error}): it is kept as {kept.name}, and a new one begins"
    texts = [text for line, text in zip(found.lines, found.texts, strict=True) if line["step"] <= last_step]
    content = b"".join(text + b"\n" for text in texts)
    note = None
    if found.damage:
        kept = free_place(path, f"{path.stem}.damaged-{utc_stamp()}", path.suffix)
        shutil.copyfile(path, kept)
        note = (
            f"{path} is damaged ({found.summary()}): the lines that can be read are kept, and the damaged file is "
            f"{kept.name}"
        )
    if content != path.read_bytes():
        write_durably(path, content)
    return note


def _parse(text: bytes) -> dict[str, Any] | str:
    """A line's object, or what is wrong with it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(line, dict):
        return "is not a JSON object"
    step = line.get("step")
    if type(step) is not int or step < 0:
        return "has no step"
    wrong = [key for key, value in line.items() if not _is_number(value)]
    return f"has no number under {wrong[0]!r}" if wrong else line


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_torn(text: bytes) -> bool:
    """True if a last line without a newline is the beginning of one that jdpo wrote."""
    return b"\0" not in text and (text.startswith(_START) or _START.startswith(text))
