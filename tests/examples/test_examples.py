"""Every example runs as a reader would run it, and its loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SHARED = {"packed_training.py", "toy_pairs.py"}
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in SHARED)


def importable(module: str) -> bool:
    """Returns whether a module imports here: some pairs of flax and jax versions break flax.nnx."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


@pytest.mark.ci
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns(name: str) -> None:
    if "nnx" in name and not importable("flax.nnx"):
        pytest.skip("the installed flax.nnx does not import with the installed jax")
    done = subprocess.run(
        [sys.executable, name],
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "PYTHONWARNINGS": "error::DeprecationWarning:jdpo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert last < 0.97 * first, done.stdout


@pytest.mark.ci
def test_examples_pass_a_strict_type_checker(tmp_path: Path) -> None:
    files = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=mypy.ini", f"--cache-dir={tmp_path}", *files],
        cwd=FOLDER,
        env=os.environ | {"MYPYPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_every_example() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"]({name})" not in readme] == []
