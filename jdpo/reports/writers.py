"""Writes metrics: always to metrics.jsonl, on request to TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jdpo import safe_text
from jdpo.durable import naming

Metrics = Mapping[str, float | int]


class Writer(Protocol):
    """Receives one line of metrics at a time."""

    def write(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Tracker(Writer, Protocol):
    """A writer that also shows texts."""

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Writes prompts and their answers after a step."""


class JsonlWriter:
    """Appends one JSON object per line; the line is in the file when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        with naming(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()  # a killed process loses no line; `sync` is for power failures

    def sync(self) -> None:
        """Flushes all lines to the disk, before a checkpoint relies on them."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which `write` has reported; other lines are flushed
            self._file.close()


class TensorBoardWriter:
    """Writes scalars as TensorBoard events with tensorboardX."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        # TensorBoard shows texts as Markdown, which those of a model are not. A tag each, so that its slider goes
        # through the answers to one prompt.
        for number, (prompt, answer) in enumerate(samples):
            text = "\n\n".join(safe_text.markdown(line) for line in (*prompt.split("\n"), "→", *answer.split("\n")))
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Writes scalars to Weights & Biases; a resumed run continues under the id in its output_dir."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            # Written before wandb starts, so that a run that is killed in between continues under the same id.
            id_file.write_text(uuid.uuid4().hex[:8])
        # "allow": a new id starts a run, a known one continues it.
        self._run = wandb.init(dir=str(folder), id=id_file.read_text(), resume="allow", config=dict(config))

    def write(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        import wandb

        # A table each time, since one that was logged cannot grow.
        table = wandb.Table(columns=["step", "prompt", "answer"], data=[[step, *sample] for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKER_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not available, before a run starts.

    Raises:
      ValueError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in TRACKER_PACKAGES:
            raise ValueError(f"unknown tracker {name!r}; known: {', '.join(TRACKER_PACKAGES)}")
        package = TRACKER_PACKAGES[name]
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            # The package is there, but one that it imports is not: installing the package again would not help.
            if error.name != package:
                raise ValueError(_broken(name, package, error)) from error
            raise ValueError(f"report_to {name} needs {package}: pip install 'jdpo[{name}]'") from None
        except Exception as error:  # a broken installation may raise anything when imported
            raise ValueError(_broken(name, package, error)) from error


def _broken(name: str, package: str, error: Exception) -> str:
    return (
        f"report_to {name}: {package} is installed, but importing it fails: {type(error).__name__}: {error}. Fix the "
        "installation, or leave out report_to"
    )


def make_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Returns the trackers by name; raises as `check_trackers` does."""
    check_trackers(names)
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoardWriter(folder / "tensorboard"))
        else:
            trackers.append(WandbWriter(folder, config))
    return trackers
