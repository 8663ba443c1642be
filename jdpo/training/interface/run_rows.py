"""The rows that Python code gives a run, kept in the run's folder, from which they are read like any file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jdpo.config import CONFIGS, DatasetConfig, DataSettings
from jdpo.data.sources.given_rows import RowsForm, form_of
from jdpo.processes import run_jointly
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.row_order import Log
from jdpo.words import figure

KEYS = {"train_dataset": "datasets", "eval_dataset": "eval_datasets"}
"""Argument of `jdpo.train` -> the key of the config that it replaces."""


class RunRows(NamedTuple):
    """The rows of a run.

    Attributes:
      datasets, eval_datasets: the keys of the config.
      files: of the rows that are not files already: their name, the file that keeps them, and the rows.
    """

    datasets: tuple[DatasetConfig, ...]
    eval_datasets: tuple[DatasetConfig, ...]
    files: list[tuple[str, Path, RowsForm]]

    def write(self, directory: RunDirectory, log: Log) -> None:
        """Writes the rows into the run's folder, or compares them with those of the run's earlier starts.

        Every process must call this; the rows of the first one count.

        Raises:
          ValueError: a row cannot be written, or the rows are not those that the run started with.
        """
        for name, path, rows in self.files:
            run_jointly(partial(_keep, name, path, rows, directory), on_first=True)
            log(f"{name}: {figure(rows.num_rows, 'row')}, kept in {path}")


def check_config(config: object) -> None:
    """
    Raises:
      ValueError: this is no config; the message says how to make one.
    """
    classes = tuple(CONFIGS.values())
    if isinstance(config, classes):
        return
    name, advice = f"jdpo.{CONFIGS['dpo'].__name__}", ""
    if isinstance(config, dict):
        advice = f"; write {name}(**config)"
    elif isinstance(config, str | os.PathLike):
        advice = f"; write jdpo.load_config({name}, path) to read a file"
    expected = " or ".join(f"jdpo.{one.__name__}" for one in classes)
    raise ValueError(f"config: expected a {expected}, found {type(config).__name__}{advice}")


def rows_of_run(settings: DataSettings, output_dir: str, **given: object) -> RunRows:
    """Returns the rows of a run, from its config or given in its place.

    Args:
      settings: the run's config.
      output_dir: its folder.
      given: train_dataset and eval_dataset; None: as the config says.

    Raises:
      ValueError: there are no rows to train on, rows are given twice, or they are of a kind that cannot be read.
    """
    found = {key: getattr(settings, key) for key in KEYS.values()}
    files = []
    for name, key in KEYS.items():
        rows = given[name]
        if rows is None:
            continue
        if found[key]:
            raise ValueError(f"{name} and the config's {key} both name rows; leave one of them out")
        form = form_of(rows, name)
        path = str(rows)
        if form is not None:
            place = Path(output_dir) / f"{name}{form.ending}"
            path = str(place)
            files.append((name, place, form))
        found[key] = (DatasetConfig(path=path),)
    if not found["datasets"]:
        raise ValueError("there are no rows to train on; give train_dataset, or set datasets in the config")
    return RunRows(**found, files=files)


def _keep(name: str, path: Path, rows: RowsForm, directory: RunDirectory) -> None:
    if directory.is_new or not path.exists():
        try:
            rows.write(path)
        except OSError as error:
            raise ValueError(f"cannot write the rows of {name} to {path}: {error}") from None
    elif (found := rows.difference(path)) is not None:
        raise ValueError(
            f"cannot resume the run in {directory.path}: {name} has changed since it started: {found}. Give the "
            "original rows, or choose another output_dir"
        )
