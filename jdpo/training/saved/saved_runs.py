"""Checkpoints of runs: finding one, and the model setup that reads its weights, whether the run has ended or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from jdpo.checkpoint.manager import read_position, restore_params
from jdpo.checkpoint.steps import complete_steps, damaged_folders, fault_of
from jdpo.config import CONFIGS, MemorySettings, MeshConfig, defaults_of, load_config
from jdpo.training.run_record import RunRecord
from jdpo.training.sanity_checks import check_base
from jdpo.training.setup.folder_digests import folder_digest
from jdpo.training.setup.model_setup import ModelSetup, build_model
from jdpo.training.setup.numerics import numerics, resolve_dtype

Params = Any


class Checkpoint(NamedTuple):
    """One step of a run.

    Attributes:
      run: the run's folder.
      step: updates made.
    """

    run: Path
    step: int

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints" / str(self.step)


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Finds the checkpoint that a path names.

    Args:
      path: a run's folder, or the folder of one of its steps.
      step: a step of the run; None: its newest.

    Raises:
      ValueError: there is no such run or step.
    """
    path = path.expanduser().absolute()
    if path.parent.name == "checkpoints" and path.name.isdigit() and (path.parents[1] / "run.json").is_file():
        if step not in (None, int(path.name)):
            raise ValueError(f"{path} is step {path.name}; leave --step out, or name the folder of the run")
        path, step = path.parents[1], int(path.name)
    if not (path / "run.json").is_file():
        if path in damaged_folders(path.parent):
            raise ValueError(
                f"{path} was set aside as damaged, so it is not read; take another step, or repair it and rename it to "
                "its step"
            )
        raise ValueError(
            f"{path} is not a checkpoint: expected the output_dir of a run, or a folder checkpoints/STEP in one"
        )
    folder = path / "checkpoints"
    steps = complete_steps(folder)
    if step is None:
        if not steps:
            raise ValueError(f"{path} holds no whole checkpoint yet{_set_aside_in(folder)}")
        step = steps[-1]
    if step not in steps:
        fault = fault_of(folder / str(step)) if (folder / str(step)).is_dir() else None
        why = f": {folder / str(step)} is not one, as {fault}" if fault else ""
        has = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise ValueError(f"{path} has no whole checkpoint of step {step}{why}; {has}{_set_aside_in(folder)}")
    return Checkpoint(path, step)


def _set_aside_in(folder: Path) -> str:
    names = [place.name for place in damaged_folders(folder)]
    return f" (set aside as damaged: {', '.join(names)})" if names else ""


@contextlib.contextmanager
def opened(
    checkpoint: Checkpoint, overrides: Sequence[str] = (), *, mesh: Mesh | None = None
) -> Iterator[tuple[RunRecord, ModelSetup]]:
    """Sets up the model of a checkpoint; the run is only read. While the block runs, jax computes in its dtype.

    Args:
      overrides: keys of the run's config that are to have other values.
      mesh: None: all devices of this host along fsdp, whatever mesh the run had.

    Raises:
      ValueError: a file of the checkpoint is damaged, or the model that the run started from is gone or another one.
    """
    if (fault := fault_of(checkpoint.folder)) is not None:
        raise ValueError(
            f"checkpoint {checkpoint.folder} is damaged: {fault}; bring the file back, or take another step"
        )
    record = _record_of(checkpoint.run)
    config = resolve_dtype(load_config(CONFIGS[record.command], checkpoint.run / "resolved_config.yaml", [*overrides]))
    with numerics(config), _in_folder(record.started_in):
        # Built for this host, but with the run's own config, for the model card.
        setup = dataclasses.replace(build_model(_on_this_host(config), mesh=mesh), config=config)
        check_base(read_position(checkpoint.folder).get("base"), setup.base_identity(), checkpoint.folder)
        _check_model(record.inputs, setup, checkpoint.run)
        yield record, setup


def restore_trained(checkpoint: Checkpoint, setup: ModelSetup, dtype: Any = None) -> Params:
    """Restores what was trained, all weights or adapters; the optimizer's state, which may be larger, is not read.

    Args:
      dtype: of the restored weights; None: that of training. They are cast as they are read, so that the devices never
        hold them twice.
    """
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        setup.trained,
        setup.shardings,
    )
    return restore_params(checkpoint.folder, abstract)


def _record_of(run: Path) -> RunRecord:
    record = RunRecord.read(run / "run.json")
    if record.command not in CONFIGS:
        raise ValueError(
            f"{run / 'run.json'} was not written by a run of jdpo ({', '.join(CONFIGS)}), or it is damaged"
        )
    return record


def _in_folder(started_in: str | None) -> contextlib.AbstractContextManager[None]:
    """While entered, relative paths of a run's config are relative to where it was started, if that folder exists."""
    if started_in is None or not Path(started_in).is_dir():
        return contextlib.nullcontext()
    return contextlib.chdir(started_in)


def _check_model(inputs: Mapping[str, str], setup: ModelSetup, run: Path) -> None:
    """Refuses another model than the run started from, such as a newer one of the same name on the hub.

    `check_base` does so for the base of adapters.
    """
    began_with = inputs.get(f"the model {setup.model_name}")
    if setup.adaptation is None and began_with not in (None, folder_digest(setup.model_folder)):
        raise ValueError(
            f"the model {setup.model_name} in {setup.model_folder} is not the one that {run} started from: its config, "
            "tokenizer and dtypes would not be those of the checkpoint; bring the old one back"
        )


M = TypeVar("M", bound=MemorySettings)


def _on_this_host(config: M) -> M:
    """Returns a run's config without the mesh and the attention backend of its devices, which need not be here."""
    defaults = defaults_of(MemorySettings)
    attention = {key: defaults[key] for key in ("attention", "attention_block_q", "attention_block_kv")}
    return dataclasses.replace(config, mesh=MeshConfig(), **attention)
