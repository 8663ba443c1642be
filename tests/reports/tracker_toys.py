"""Toys for tests of trackers: an installed distribution, a run, and a reader of TensorBoard's files."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def install(folder: Path, trackers: Mapping[str, str], modules: Mapping[str, str]) -> Path:
    """Writes a distribution as an installer leaves it; returns its folder, which belongs on sys.path.

    Args:
      trackers: name of an entry point -> "module:attribute".
      modules: name of a module -> its source.
    """
    about = folder / "toy_trackers-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-trackers\nVersion: 1.0\n")
    points = "".join(f"{name} = {place}\n" for name, place in trackers.items())
    (about / "entry_points.txt").write_text(f"[jdpo.trackers]\n{points}")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


ANGRY = """
class Angry:
    def __init__(self, run):
        pass

    def __getattr__(self, method):
        raise RuntimeError(f"no {method}!")
"""


def install_diary(folder: Path) -> Path:
    """Installs the tracker of docs/trackers.md, as its reader would, and one that raises at every call."""
    page = (DOCS / "trackers.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# diary\.py\n.*?)```", page, re.DOTALL)
    point = re.search(r'\[project\.entry-points\."jdpo\.trackers"\]\n(\w+) = "(.*)"', page)
    assert source is not None
    assert point is not None
    return install(folder, {point[1]: point[2], "angry": "angry:Angry"}, {"diary": source[1], "angry": ANGRY})


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The trackers `diary` of docs/trackers.md, and `angry`, installed for this process."""
    monkeypatch.syspath_prepend(install_diary(tmp_path / "site"))
    assert {point.name for point in entry_points(group="jdpo.trackers")} == {"diary", "angry"}
    yield tmp_path / "site"
    for name in ("diary", "angry"):
        sys.modules.pop(name, None)


def tensorboard_events(folder: Path) -> list[Any]:
    """Returns the events of all files of a folder, oldest first: records of length, checksum, event, checksum."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events
