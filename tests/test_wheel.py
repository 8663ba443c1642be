"""A wheel works alone: built from a copy of the tree, installed with its dependencies, away from the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from uv import find_uv_bin

import jdpo

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--countries=8", "--pretrain_steps=20", "--steps=10", "--hidden_size=64", "--num_layers=1", "--probes=2")


def run(*words: str | Path, cwd: Path) -> str:
    """Runs a command with neither this checkout nor another environment on Python's path; returns its output."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_of(version: str) -> Path:
    """Returns an interpreter of a version; skips where there is none."""
    found = shutil.which(f"python{version}")
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    candidates = ([Path(found)] if found else []) + installed
    for candidate in candidates:
        words = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() == version:
            return candidate
    pytest.skip(f"no Python {version} here")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files of the clone."""
    clone = tmp_path_factory.mktemp("clone")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    run(find_uv_bin(), "build", "--quiet", "--wheel", "--out-dir", clone / "dist", clone, cwd=clone)
    (built,) = (clone / "dist").glob("*.whl")
    assert built.name.startswith(f"jdpo-{jdpo.__version__}-")
    return built


@pytest.mark.full
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_an_installed_wheel_runs_the_quickstart(wheel: Path, tmp_path: Path, version: str) -> None:
    environment = tmp_path / "environment"
    run(find_uv_bin(), "venv", "--quiet", "--no-project", "--python", python_of(version), environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(find_uv_bin(), "pip", "install", "--quiet", "--python", python, wheel, cwd=tmp_path)
    command = environment / "bin" / "jdpo"
    assert run(command, "--version", cwd=tmp_path).strip() == jdpo.__version__
    run(command, "quickstart", "--output_dir=qs", *SMALL, cwd=tmp_path)
    assert (tmp_path / "qs" / "report.md").is_file()
    # Where templates are missing, a run would only warn.
    assert (tmp_path / "qs" / "runs" / "dpo" / "report.html").is_file()
    shown = run(command, "generate", "qs/runs/dpo", "--prompts=qs/data/pairs.jsonl", "--output_dir=gen", cwd=tmp_path)
    assert "answers" in shown
