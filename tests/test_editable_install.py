"""An editable install by pip and by uv is a plain path, for Python and for tools that read files."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USE = """\
from jdpo import train
from jdpo.new_module import ANSWER

assert callable(train)
print(ANSWER)
"""


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command with neither this checkout nor another environment on Python's path; returns its output."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a clone called jdpo, as `git clone` names it."""
    folder = tmp_path_factory.mktemp("above")
    clone = folder / "jdpo"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "jdpo", cwd=ROOT).splitlines()
    for name in (*names, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.full
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_editable_install_is_a_plain_path(above: Path, tmp_path: Path, installer: str) -> None:
    if installer == "uv" and find_spec("uv") is None:
        pytest.skip("uv is not installed here; it is part of the test extra")
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    # Dependencies come from the environment that runs the tests, without its own editable install.
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if installer == "uv":
        from uv import find_uv_bin

        run(find_uv_bin(), "pip", "install", "--python", python, "--no-deps", "-e", above / "jdpo", cwd=tmp_path)
    else:
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(*pip, "install", "--no-deps", "--quiet", "-e", above / "jdpo", cwd=tmp_path)

    # Python and mypy find a module written after the install, also from above the clone, where the folder jdpo is
    # not a package.
    new = above / "jdpo" / "jdpo" / "new_module.py"
    new.write_text('ANSWER = "found"\n')
    try:
        (above / "use.py").write_text(USE)
        printed = run(python, "use.py", cwd=above, JAX_PLATFORMS="cpu")
        assert printed == "found\n"
        mypy = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
        mypy += ["--python-executable", str(python), "--follow-imports=skip", "use.py"]
        assert "Success" in run(*mypy, cwd=above)
        (above / "use.py").write_text("import jdpo.no_such_module\n")
        with pytest.raises(AssertionError, match="no_such_module"):
            run(*mypy, cwd=above)
    finally:
        new.unlink()
