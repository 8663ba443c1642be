"""Exports a checkpoint of a run as a Hugging Face model folder, whether the run has ended or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from jdpo.checkpoint.hf_export import parse_size
from jdpo.checkpoint.manager import read_position, restore_params
from jdpo.checkpoint.output_folders import check_out
from jdpo.checkpoint.steps import complete_steps, damaged_folders, fault_of
from jdpo.config import CONFIGS, MemorySettings, MeshConfig, defaults_of, load_config
from jdpo.models.lora.targets import require_loadable
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.finish import export_trained, results_at, source_folders
from jdpo.training.run_record import RunRecord
from jdpo.training.sanity_checks import check_base
from jdpo.training.setup.folder_digests import folder_digest
from jdpo.training.setup.model_setup import ModelSetup, build_model
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.weight_placement import load_base


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
                f"{path} was set aside as damaged, so it cannot be exported; take another step, or repair it and "
                "rename it to its step"
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


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    export_dtype: str | None = None,
    max_shard_size: str | None = None,
    merge_adapters: bool | None = None,
    log: Callable[[str], None],
) -> None:
    """Writes the model, or the adapters, of a checkpoint as the run itself would at its end; the run is only read.

    Args:
      export_dtype, max_shard_size: None: as the run's config says.
      merge_adapters: see `export_trained`.
      log: takes lines for the user.

    Raises:
      ValueError: a file of the checkpoint is damaged, the model that the run started from is gone, or the export is
        refused.
    """
    # Before anything is read: a wrong `out` should cost no minutes.
    check_out(out, [checkpoint.run / "checkpoints"])
    if (fault := fault_of(checkpoint.folder)) is not None:
        raise ValueError(
            f"checkpoint {checkpoint.folder} is damaged: {fault}; bring the file back, or take another step"
        )
    record, out = _record_of(checkpoint.run), out.expanduser().absolute()
    given = {"export_dtype": export_dtype, "max_shard_size": max_shard_size}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    saved = checkpoint.run / "resolved_config.yaml"
    config = resolve_dtype(load_config(CONFIGS[record.command], saved, overrides))
    parse_size(config.max_shard_size)
    metrics = checkpoint.run / "metrics.jsonl"
    with numerics(config), _in_folder(record.started_in):
        setup = build_model(_on_this_host(config))
        check_base(read_position(checkpoint.folder).get("base"), setup.base_identity(), checkpoint.folder)
        _check_model(record.inputs, setup, checkpoint.run)
        merging = setup.exports_merged if merge_adapters is None else merge_adapters
        if setup.adaptation is None:
            _refuse_merging(checkpoint, merge_adapters)
        elif not merging:
            _refuse_layout(given)
            require_loadable(setup.adaptation.sites, setup.adaptation.lora.sites)
        # Again, now that the model's folders are known.
        check_out(out, source_folders(setup))
        log(f"exporting step {checkpoint.step} of {checkpoint.run} to {out}")
        lines = read_metrics(metrics)
        if not any(line["step"] <= checkpoint.step for line in lines):
            log(f"note: {metrics} has no line up to step {checkpoint.step}, so the model card has no results")
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            setup.trained,
            setup.shardings,
        )
        export_trained(
            # The run's own config, for the model card; `setup` was built with the mesh of this host.
            dataclasses.replace(setup, config=config),
            # The params alone: the optimizer's state is not read, which may be twice as large.
            restore_params(checkpoint.folder, abstract),
            load_base(setup) if merging else None,
            out,
            command=record.command,
            rows=record.rows or "The run did not record its rows.",
            results=results_at(lines, checkpoint.step),
            merge_adapters=merging,
            kept=[checkpoint.run / "checkpoints"],
        )


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


def _refuse_merging(checkpoint: Checkpoint, asked: bool | None) -> None:
    if asked is not None:
        flag = "--merge" if asked else "--no-merge"
        raise ValueError(f"{flag}: {checkpoint.folder} holds all weights, not adapters")


def _refuse_layout(given: Mapping[str, str | None]) -> None:
    flags = [f"--{key.removeprefix('export_')}" for key, value in given.items() if value is not None]
    if flags:
        raise ValueError(
            f"no effect of {' and '.join(flags)}: adapters alone are exported as they were trained, in one file; "
            "leave it out, or give --merge"
        )


M = TypeVar("M", bound=MemorySettings)


def _on_this_host(config: M) -> M:
    """Returns a run's config without the mesh and the attention backend of its devices, which need not be here."""
    defaults = defaults_of(MemorySettings)
    attention = {key: defaults[key] for key in ("attention", "attention_block_q", "attention_block_kv")}
    return dataclasses.replace(config, mesh=MeshConfig(), **attention)
