"""scripts/launch holds what `jdpo launch` renders, and every script there passes shellcheck."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jdpo.launch.launchers import LAUNCHERS
from jdpo.launch.rendering import comment_lines, yaml_block, yaml_scalar

ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_launch", ROOT / "scripts" / "write_launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_are_what_launch_renders() -> None:
    module = script()
    rendered = module.files()
    there = {path.relative_to(ROOT): path for path in (ROOT / module.FOLDER).rglob("*") if path.is_file()}
    assert there.keys() == rendered.keys(), "run python scripts/write_launch.py, and delete what it no longer writes"
    for path, text in rendered.items():
        assert there[path].read_text(encoding="utf-8") == text, f"{path}: run python scripts/write_launch.py"
    assert {words.split()[0] for words in module.EXAMPLES.values()} == {*LAUNCHERS}
    # Nothing of the machine that rendered them, and no secret.
    assert not [path for path, text in rendered.items() if str(ROOT) in text or re.search(r"\bhf_\w+", text)]


def shellcheck(text: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)


SCRIPTS = sorted(path for path in (ROOT / "scripts" / "launch").rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.parent.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    done = shellcheck(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout


def test_shellcheck_refuses_a_broken_script() -> None:
    assert "SC2086" in shellcheck("#!/bin/bash\nfile=$1\nrm $file\n").stdout


@pytest.mark.parametrize(
    "text", ["a: 1\n", "a: 1", "a:\tb\n", "  x\n", "\x07", "", "\n\n", "a  \n\nb\n\n", "é 東京 👩\u200d🚀\n"]
)
def test_texts_survive_in_yaml(text: str) -> None:
    import yaml

    assert yaml.safe_load(f"key: {yaml_block(text, 2)}\n") == {"key": text}
    assert yaml.safe_load(f"key: {yaml_scalar(text)}\n") == {"key": text}


def test_a_comment_stays_a_comment() -> None:
    text = comment_lines("runs/x\nrm -rf /; " + "word " * 60, 4)
    assert all(line.startswith("    # ") for line in text.splitlines()[1:])
    assert r"runs/x\nrm" in text
