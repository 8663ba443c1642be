"""The plan of a run and its memory per device, without loading weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from jdpo.checkpoint.mirror.object_store import ObjectStore
from jdpo.checkpoint.mirror.run_fetch import RunInMirror
from jdpo.config import OutputSettings, ReferenceSettings, TrainConfig
from jdpo.devices import leave_out_missing_tpus
from jdpo.training.continuing import describe_start
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.run_setup import Log, build
from jdpo.training.setup.tasks import task_for
from jdpo.training.setup.validation import Mode
from jdpo.words import memory


def dry_run(config: TrainConfig, log: Log) -> None:
    """Checks everything that a run checks before it loads weights, and logs its plan and its memory per device.

    If output_dir holds a run, the settings are compared with it, and where it would be resumed is logged.

    Args:
      log: takes lines for the user.

    Raises:
      ValueError: bad input.
    """
    leave_out_missing_tpus()
    config = resolve_dtype(config)
    with numerics(config):
        # Only read: a dry run leaves no trace.
        directory = RunDirectory(config, task_for(config).command, only_read=True)
        setup = build(config, log, weights=False)
        live = setup.task.uses_reference and isinstance(config, ReferenceSettings) and config.reference == "live"
        mode: Mode = "live" if live else "none"  # auto and cached free the reference before the run trains
        # Any policy will do here: what is kept from step to step does not depend on it.
        remat = "none" if config.remat == "auto" else config.remat
        log(describe_kept(assemble(setup, reference=mode, remat=remat)))
        log("`jdpo plan CONFIG.yaml --on v5e-16 h100x8` tells activations, time and cost of a step on other machines")
        if directory.finished:
            log(f"the run in {directory.path} is finished: {directory.outcome}")
        elif not directory.is_new:
            log(describe_start(setup, directory))
        if config.mirror is not None:
            log(describe_mirror(config, task_for(config).command))


def describe_mirror(config: OutputSettings, command: str) -> str:
    """Describes what a run would continue from in its mirror; nothing is written.

    Raises:
      ValueError: the mirror holds another run.
      OSError: it cannot be read.
    """
    assert config.mirror is not None
    found = RunInMirror(ObjectStore(config.mirror))
    if not found.has_begun:
        return f"mirror {found.store.address} can be read, and holds no checkpoint yet"
    found.check_owner(Path(config.output_dir), config, command, {})
    if not found.steps:
        return f"mirror {found.store.address} holds this run, finished, with its model"
    return (
        f"mirror {found.store.address} holds this run: with an empty or older output_dir it would continue from the "
        f"checkpoint of step {found.steps[-1]}"
    )


def describe_kept(assembly: Assembly) -> str:
    """Describes in a line what each device keeps from the first step to the last, without activations and batches."""
    parts = {
        "weights that are trained": bytes_per_device(assembly.state.params),
        "state of the optimizer": bytes_per_device(assembly.state.opt_state),
        "frozen weights": bytes_per_device((assembly.frozen, assembly.state.reference_params)),
        # As large as the weights, whose shardings the step gives them.
        "gradients": bytes_per_device(assembly.state.params),
    }
    listed = ", ".join(f"{memory(size)} {name}" for name, size in parts.items() if size)
    return f"kept on each device: {memory(sum(parts.values()))} ({listed}), besides activations"


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree of shapes with shardings takes on the device that holds the most of it."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
