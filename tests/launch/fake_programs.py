"""Scripts that stand for the programs of a cluster: they note how they are called, and do as a test asks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest


FAKE_JDPO = """
code=$(head -n 1 "$FAKES/codes")
sed -i 1d "$FAKES/codes"
exit "${code:-0}"
"""
"""Ends with the next of the exit codes that `Fakes.codes` was given, and then with 0."""


class Fakes:
    """A folder of programs that comes first on PATH. $FAKES names it in their scripts; `calls` is what was called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        self.codes()
        monkeypatch.setenv("FAKES", str(folder))
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(self, name: str, body: str) -> None:
        """Adds a program: a script for bash, before which the call is noted."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> "$FAKES/calls"\n{body}')
        path.chmod(0o755)

    def codes(self, codes: Iterable[int] = ()) -> None:
        """Sets the exit codes of the next calls of FAKE_JDPO."""
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def calls(self, program: str) -> list[str]:
        """Returns the calls of a program, in order, as its name and its words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split(" ")[0] == program]


def write_config(folder: Path, **keys: str) -> Path:
    """Writes the config of a run that is never started; keyword arguments add keys."""
    path = folder / "run.yaml"
    output = {"output_dir": str(folder / "run out")}
    path.write_text(json.dumps({"model_name_or_path": "model", "datasets": "pairs.jsonl", **output, **keys}))
    return path
