"""Plans that were made before, in files whose names are digests of everything that decides a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.config import TrainConfig
from jdpo.config.groups import DataSettings, LoggingSettings, OutputSettings, SampleSettings
from jdpo.durable import write_durably
from jdpo.file_digests import code_digests
from jdpo.planning.machines import Machine
from jdpo.planning.target_plan import TargetPlan

# fmt: off
_CODE = (
    "chips.py", "config/", "data/batching/", "devices.py", "losses/", "models/", "planning/", "sharding/", "training/",
)
# fmt: on
"""Files and folders of the package that decide a plan."""

_PACKAGE = Path(__file__).resolve().parents[2]

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax")
"""Packages whose versions decide a plan."""

_ENVIRONMENT = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
"""Variables that compilers read."""

_IN_PROGRAM = {"max_length", "loss_on"}
"""Keys of groups that otherwise decide nothing: rows are given by their lengths."""


def plan_key(config: TrainConfig, machine: Machine, lengths: Sequence[Sequence[int]]) -> str:
    """Returns a digest of everything that decides a plan.

    Args:
      config: `model_name_or_path` is a folder with config.json.
    """
    decides_nothing = {
        field.name
        for group in (DataSettings, LoggingSettings, OutputSettings, SampleSettings)
        for field in dataclasses.fields(group)
    } - _IN_PROGRAM
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in decides_nothing}
    # By what it holds: a folder may be moved, or change.
    settings["model_name_or_path"] = (Path(config.model_name_or_path) / "config.json").read_text(encoding="utf-8")
    known = {
        "settings": settings,
        "machine": dataclasses.asdict(machine),
        "lengths": [list(map(int, of_row)) for of_row in lengths],
        "code": {path: digest for path, digest in code_digests(_PACKAGE).items() if path.startswith(_CODE)},
        "versions": {name: _version(name) for name in _COMPILERS},
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def read_plan(folder: Path, key: str) -> TargetPlan | None:
    """Returns a plan that was made before; None where there is none, or its file is damaged."""
    try:
        found = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        return TargetPlan.from_dict(_checked(found))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_plan(folder: Path, key: str, plan: TargetPlan) -> None:
    """Keeps a plan.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan.as_dict(), sort_keys=True)
    content = json.dumps({"plan": plan.as_dict(), "digest": hashlib.sha256(text.encode()).hexdigest()}, indent=1)
    # Several commands may plan the same target.
    write_durably(folder / f"{key}.json", content, writer=f".{os.getpid()}")


def _checked(found: Any) -> dict[str, Any]:
    """Returns the plan in a file.

    Raises:
      ValueError, KeyError, TypeError: it is not as it was written.
    """
    plan: dict[str, Any] = found["plan"]
    if hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest() != found["digest"]:
        raise ValueError("the plan is not as it was written")
    return plan


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
