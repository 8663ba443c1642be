"""scripts/_env.sh: which Python it chooses, its error if there is none, and when it makes the environment again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash") or pytest.skip("needs bash", allow_module_level=True)


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that sources _env.sh, with a minimal PATH."""
    command = [BASH, "-c", f'set -euo pipefail; source "{ROOT}/scripts/_env.sh"; {script}']
    variables = {"PATH": "/usr/bin:/bin"} | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def fake_python(folder: Path, name: str, version: str) -> None:
    """Writes an executable that is this Python but reports another version."""
    folder.mkdir(exist_ok=True)
    major, minor = version.split(".")
    script = folder / name
    script.write_text(
        f'#!{BASH}\n[[ "$1" == --version ]] && {{ echo "Python {version}.0"; exit; }}\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}, 0); exec(sys.argv[1])" "$2"\n'
    )
    script.chmod(0o755)


def test_named_python_of_a_wrong_version_is_refused(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "old", "3.9")
    done = bash("find_python", tmp_path, PYTHON=str(tmp_path / "bin" / "old"))
    assert done.returncode == 1
    assert "is Python 3.9.0; Python 3.11, 3.12 or 3.13 is needed" in done.stderr


def test_an_error_names_the_unsuitable_python_that_was_found(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "python3", "3.14")
    done = bash("find_python", tmp_path, PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert "3.11, 3.12 or 3.13 is needed, and Python 3.14.0 was found" in done.stderr


def test_a_suitable_python_is_found_after_an_unsuitable_one(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "python3", "3.14")
    fake_python(tmp_path / "bin", "python3.13", "3.13")
    done = bash('find_python; echo "$PYTHON"', tmp_path, PATH=str(tmp_path / "bin"))
    assert done.stdout.strip() == "python3.13"


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "precious").write_text("")
    done = bash('make_env .venv ""', tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert ".venv is there and is no Python environment" in done.stderr
    assert (tmp_path / ".venv" / "precious").exists()


@pytest.mark.ci
def test_an_environment_is_made_once_and_again_when_pyproject_changes(tmp_path: Path) -> None:
    project = (
        '[project]\nname = "nothing"\nversion = "{}"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "pyproject.toml").write_text(project.format(1))
    # A build backend without requirements, so that pip needs no package index.
    (tmp_path / "backend.py").write_text(
        "import zipfile\n"
        "def get_requires_for_build_editable(config_settings=None): return []\n"
        "def build_editable(directory, config_settings=None, metadata_directory=None):\n"
        "    name = 'nothing-1-py3-none-any.whl'\n"
        "    with zipfile.ZipFile(f'{directory}/{name}', 'w') as wheel:\n"
        "        info = 'nothing-1.dist-info/'\n"
        "        wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: nothing\\nVersion: 1\\n')\n"
        "        tags = 'Root-Is-Purelib: true\\nTag: py3-none-any\\n'\n"
        "        wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: x\\n' + tags)\n"
        "        wheel.writestr(info + 'RECORD', '')\n"
        "    return name\n"
    )
    script = 'make_env env ""; command -v python; date +%s%N >>env/visits; wc -l <env/visits'
    first, again = (bash(script, tmp_path, PYTHON=sys.executable, PIP_NO_INDEX="1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == [str(tmp_path / "env/bin/python"), "1"]
    assert again.stdout.split()[-1] == "2"
    (tmp_path / "pyproject.toml").write_text(project.format(2))
    changed = bash(script, tmp_path, PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert changed.stdout.split()[-1] == "1"
