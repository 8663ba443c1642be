"""The trackers by name: jdpo's own, and those of other packages, under the entry points `jdpo.trackers`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from jdpo.reports.trackers.tracker import TrackedRun, Tracker
from jdpo.words import did_you_mean

GROUP = "jdpo.trackers"
Factory = Callable[[TrackedRun], Tracker]


class _Own(NamedTuple):
    """One of jdpo's trackers: the package that it needs, and its class."""

    package: str
    module: str
    class_name: str


OWN = {
    "tensorboard": _Own("tensorboardX", "tensorboard_tracker", "TensorBoardTracker"),
    "wandb": _Own("wandb", "wandb_tracker", "WandbTracker"),
    "trackio": _Own("trackio", "trackio_tracker", "TrackioTracker"),
    "mlflow": _Own("mlflow", "mlflow_tracker", "MlflowTracker"),
}

VARIABLES = {
    ("wandb", "project"): "WANDB_PROJECT",
    ("wandb", "name"): "WANDB_NAME",
    ("wandb", "group"): "WANDB_RUN_GROUP",
    ("mlflow", "project"): "MLFLOW_EXPERIMENT_NAME",
}
"""Variables of the environment that users of a tracker know, which count where the config has no value."""


def from_environment(tracker: str, setting: str) -> str | None:
    """Returns the value of a tracker's own variable for `project`, `name` or `group`; None if there is none."""
    return os.environ.get(VARIABLES.get((tracker, setting), "")) or None


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not available, before a run starts.

    Raises:
      ValueError: an unknown tracker, one that is named twice, or whose package is not installed or does not import.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"report_to names {name} {names.count(name)} times; once is enough")
        tracker_factory(name)


def tracker_factory(name: str) -> Factory:
    """Returns what makes a tracker for a run; raises as `check_trackers` does."""
    if name in OWN:
        return _own(name, OWN[name])
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        known = sorted([*OWN, *found])
        names = [one.strip() for one in name.split(",")]
        if len(names) > 1 and set(names) <= set(known):
            raise ValueError(f"report_to: several trackers are written as a list: '[{', '.join(names)}]'")
        near = did_you_mean(name, known)
        raise ValueError(
            f"report_to: unknown tracker {name!r}{'; ' if near else '.'}{near} The trackers are: {', '.join(known)}. "
            "Other packages can add some (docs/trackers.md)"
        )
    return _of_package(found[name])


def _own(name: str, own: _Own) -> Factory:
    try:
        importlib.import_module(own.package)
    except ModuleNotFoundError as error:
        # The package is there, but one that it imports is not: installing the package again would not help.
        if error.name != own.package:
            raise ValueError(_broken(name, own.package, error)) from error
        raise ValueError(f"report_to {name} needs {own.package}: pip install 'jdpo[{name}]'") from None
    except Exception as error:  # a broken installation may raise anything when imported
        raise ValueError(_broken(name, own.package, error)) from error
    factory: Factory = getattr(importlib.import_module(f"jdpo.reports.trackers.{own.module}"), own.class_name)
    return factory


def _of_package(point: EntryPoint) -> Factory:
    package = point.dist.name if point.dist is not None else point.module
    try:
        factory: Factory = point.load()
    except Exception as error:
        raise ValueError(_broken(point.name, package, error)) from error
    return factory


def _broken(name: str, package: str, error: Exception) -> str:
    return (
        f"report_to {name}: {package} is installed, but importing it fails: {type(error).__name__}: {error}. Fix the "
        "installation, or leave out report_to"
    )
