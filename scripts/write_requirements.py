"""Writes docker/requirements-*.txt: every package of the container images, with its version.

python scripts/write_requirements.py      # after dependencies in pyproject.toml changed; asks PyPI
"""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docker"
ACCELERATORS = ("tpu", "cuda")
EXTRAS = ("gcs", "s3", "tensorboard", "wandb")
"""Extras of every image, next to that of its accelerator."""

PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_31"
"""Those of the Dockerfile's base image; libtpu needs glibc 2.31."""

HEADER = "# Written by scripts/write_requirements.py. {}\n"


def build_requirements() -> list[str]:
    """Returns what building the wheel of jdpo needs, which is pinned as well."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return list(settings["build-system"]["requires"])


def pinned(accelerator: str) -> str:
    """Returns the newest versions that fit together, one package per line."""
    extras = [word for extra in (accelerator, *EXTRAS) for word in ("--extra", extra)]
    words = [find_uv_bin(), "pip", "compile", "pyproject.toml", "-", *extras, "--no-header", "--no-annotate", "--quiet"]
    words += ["--python-version", PYTHON, "--python-platform", PLATFORM]
    build = "\n".join(build_requirements())
    done = subprocess.run(words, cwd=ROOT, input=build, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for accelerator in ACCELERATORS:
        path = FOLDER / f"requirements-{accelerator}.txt"
        note = f"Python {PYTHON}, Linux on x86-64; extras {', '.join((accelerator, *EXTRAS))}."
        path.write_text(HEADER.format(note) + pinned(accelerator), encoding="utf-8")
        print(f"wrote {path}")
