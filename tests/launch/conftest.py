"""Configs to launch, and programs on PATH that take the place of kubectl, srun and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Fake = Callable[[str, str], Path]

CONFIG = "model_name_or_path: org/model\ndatasets: gs://bucket/pairs.jsonl\noutput_dir: runs/first\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the current folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    path = Path("dpo.yaml")
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a program on PATH: a name and the text of its script. Returns a file of the lines that scripts append."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def put(name: str, script: str) -> Path:
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)
        return tmp_path / "calls"

    return put


CODED = """\
echo "${0##*/} $*" >> "$CALLS"
code=$(head -n 1 codes 2>/dev/null)
[[ ! -e codes ]] || sed -i 1d codes
exit "${code:-0}"
"""
"""Notes the call of a program and ends with the next exit code in `codes`, a file in the current folder, or with 0."""


def calls_of(calls: Path, program: str) -> list[str]:
    """Returns the noted calls of a program, in order."""
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return [line for line in lines if line.split()[0] == program]
