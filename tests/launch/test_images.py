"""The Dockerfile and the pinned packages of the images, which cannot be built here."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)


def test_the_dockerfile_passes_hadolint_and_a_careless_one_does_not() -> None:
    done = hadolint(DOCKERFILE.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout
    done = hadolint("FROM python\nRUN cd /tmp && pip install jax\nUSER root\n")
    assert done.returncode == 1
    assert {"DL3006", "DL3013", "DL3042", "DL3003", "DL3002"} <= {*re.findall(r"DL\d+", done.stdout)}


def test_the_image_is_pinned_small_and_not_root() -> None:
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"FROM \S+:\d+\.\d+\.\d+-", line)]
    assert sum("--requirement" in line for line in lines) == 1  # one layer for dependencies
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:1000"]
    assert 'ENTRYPOINT ["jdpo"]' in lines
    # The pods run as that user.
    template = (ROOT / "jdpo/launch/templates/jobset.yaml.jinja").read_text(encoding="utf-8")
    assert "runAsUser: 1000" in template
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"  # what is not named stays out, such as runs and credentials


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_requirements", ROOT / "scripts" / "write_requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("accelerator", ["tpu", "cuda"])
def test_every_dependency_is_pinned_within_its_bounds(accelerator: str) -> None:
    module = script()
    path = module.FOLDER / f"requirements-{accelerator}.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)  # fails on a line that pins nothing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][extra] for extra in (accelerator, *module.EXTRAS)]
    needed = [Requirement(each) for each in [*project["dependencies"], *chain(*extras), *module.build_requirements()]]
    for each in needed:
        found = pins.get(canonicalize_name(each.name))
        assert found, f"{each} is not in {path.name}: run python scripts/write_requirements.py"
        assert each.specifier.contains(found), f"{path.name} has {each.name} {found}, pyproject.toml {each.specifier}"
    assert ("libtpu" in pins) == (accelerator == "tpu")
    assert ("jax-cuda13-plugin" in pins) == (accelerator == "cuda")
