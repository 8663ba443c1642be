"""Where a run continues: its inputs and checkpoints, checked before anything is loaded; and its state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdpo._version import __version__
from jdpo.checkpoint.manager import CheckpointManager, read_position
from jdpo.checkpoint.output_folders import check_out
from jdpo.checkpoint.steps import complete_steps, damaged_folders, refuse_foreign, settle_steps
from jdpo.config import differences, to_public_dict
from jdpo.models.weights.hub_models import has_weights
from jdpo.processes import agree_on, differing, run_jointly
from jdpo.reports.metrics_file import read_metrics
from jdpo.sharding.placement import replicated
from jdpo.training.finish import source_folders
from jdpo.training.fit.assembly import Assembly
from jdpo.training.logs.recording import Record
from jdpo.training.mirroring import RunMirror
from jdpo.training.run_dir import RunDirectory
from jdpo.training.sanity_checks import check_base
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.weight_placement import load_frozen, load_reference, load_start
from jdpo.training.step.train_step import Frozen, TrainState, saved_parts


def check_inputs(setup: Setup, directory: RunDirectory) -> None:
    """Refuses a run that could not export, or whose inputs differ between processes or from its earlier starts.

    Raises:
      ValueError: naming what is in the way, or what differs.
    """
    # Now, and not after the last step.
    run_jointly(lambda: check_out(directory.model, [*source_folders(setup), directory.checkpoints]))
    inputs = run_jointly(setup.inputs)
    if unlike := differing(inputs):
        raise ValueError(
            f"the processes of this run do not have the same files: {', '.join(unlike)} differ from host to host; give "
            "every host the same ones"
        )
    directory.check_inputs(inputs, file_digests(setup))
    directory.update(rows=setup.train_data.summary())  # for the model card of an export


def file_digests(setup: Setup) -> dict[str, str]:
    """Returns the digest of every file that rows are read from, by its name."""
    held_out = setup.eval_data.file_digests() if setup.eval_data is not None else {}
    return {**held_out, **setup.train_data.file_digests()}


def find_newest(setup: Setup, directory: RunDirectory, mirror: RunMirror | None) -> int | None:
    """Finds the newest whole checkpoint of a run, on every process.

    Every process must call this. Damaged checkpoints are set aside, see `settle_steps`.

    Args:
      mirror: a later checkpoint in it is brought to the run's folder.

    Returns:
      its step, or None if the run starts at step 0.

    Raises:
      ValueError: a checkpoint is of another step than the name of its folder, or of another run.
      OSError: there are checkpoints, but all of them are damaged.
    """
    newest = agree_on(lambda: _newest_on_disk(directory, setup.num_steps))
    if mirror is not None:
        newest = mirror.fetch_newest(newest, setup.num_steps, setup.config)
    if newest is None:
        run_jointly(lambda: _refuse_lost(directory), on_first=True)
    if newest is not None:
        run_jointly(lambda: _check_position(setup, directory.checkpoints.absolute() / str(newest)))
    return newest


def _newest_on_disk(directory: RunDirectory, num_steps: int) -> int | None:
    folder = directory.checkpoints
    newest = settle_steps(folder, num_steps)
    damaged = [place.name for place in damaged_folders(folder)]
    if directory.is_new:
        directory.give_up(damaged)
    return newest


def _refuse_lost(directory: RunDirectory) -> None:
    """Refuses a run without a whole checkpoint if it has damaged ones that were not given up."""
    folder = directory.checkpoints
    damaged = [place.name for place in damaged_folders(folder)]
    # Starting over silently would lose a run whose checkpoints can be repaired.
    if lost := [name for name in damaged if name not in directory.record.given_up]:
        raise OSError(
            f"no checkpoint of the run in {directory.path} is whole: {', '.join(lost)} in {folder} cannot be resumed. "
            "Repair one and rename it to its step; or give the same command with `--resume never`, which keeps them "
            "and starts at step 0 again"
        )


def is_unevaluated(setup: Setup, directory: RunDirectory, step: int | None) -> bool:
    """Returns True if a signal broke off the evaluation after the step of a checkpoint; the same on every process."""
    if step is None or setup.eval_data is None:
        return False

    # Every process reads it, as orbax waits there for all of them.
    position = read_position(directory.checkpoints.absolute() / str(step))
    if not position.get("unevaluated", False):
        return False
    # A start that was killed may have made it since.
    made = agree_on(
        lambda: int(any(line["step"] == step and "eval_loss" in line for line in read_metrics(directory.metrics)))
    )
    return not made


def describe_start(setup: Setup, directory: RunDirectory) -> str:
    """Describes where the run in a folder would be resumed, for a dry run: nothing is changed.

    Args:
      directory: of a run that has begun.

    Raises:
      ValueError: the run would be refused: an input or a checkpoint is not of this run.
      OSError: all checkpoints are damaged.
    """
    can_compare = has_weights(setup.model_folder)  # a dry run works without weights
    if can_compare:
        directory.compare_inputs(setup.inputs(), file_digests(setup))
    refuse_foreign(directory.checkpoints, setup.num_steps)
    steps = complete_steps(directory.checkpoints)
    if not steps:
        _refuse_lost(directory)
        return f"output_dir {directory.path} holds this run, without a checkpoint: it would start again at step 0"
    newest = steps[-1]
    if can_compare:
        _check_position(setup, directory.checkpoints.absolute() / str(newest))
    return (
        f"output_dir {directory.path} holds this run: it would resume from the checkpoint of step {newest} of "
        f"{setup.num_steps}, if the files of that checkpoint are intact"
    )


def _check_position(setup: Setup, checkpoint: Path) -> None:
    position = read_position(checkpoint)
    check_base(position.get("base"), setup.base_identity(), checkpoint)
    saved = position.get("config")
    if saved is not None and (changed := differences(saved, setup.config)):
        raise ValueError(
            f"{checkpoint} was saved by another run than the one in {checkpoint.parents[1]}; move it out. It differs "
            f"in:\n  " + "\n  ".join(changed)
        )


def open_checkpoints(
    setup: Setup, directory: RunDirectory, newest: int | None, mirror: RunMirror | None
) -> CheckpointManager:
    """Opens the checkpoints of a run, of which the step `newest` is known to be whole."""
    config, eval_data = setup.config, setup.eval_data
    return CheckpointManager(
        directory.checkpoints,
        max_to_keep=config.save_total_limit,
        # The evaluation rows may change when a run continues; values on other rows are no better or worse.
        metric_name=f"{config.metric_for_best_model} on {eval_data.digest if eval_data else 'nothing'}",
        greater_is_better=not config.metric_for_best_model.endswith("loss"),
        verified=newest,
        mirror=mirror,
    )


# --- the state


def start_state(setup: Setup, assembly: Assembly, *, live: bool) -> tuple[TrainState, Frozen, None]:
    """Loads the weights and makes the state of step 0; there is no position to continue from."""
    params = load_start(setup)
    frozen = load_frozen(setup, params, live=live, moves=assembly.sync is not None)
    return first_state(setup, assembly, params), frozen, None


def first_state(setup: Setup, assembly: Assembly, params: Any) -> TrainState:
    """Returns the state of step 0.

    Args:
      params: what is trained, on the mesh.
    """
    rng = jax.random.key_data(jax.random.key(setup.config.seed))
    # Committed to the mesh now: a program compiled for arrays on all devices takes no others.
    step, rng, loss_state = jax.device_put((jnp.int32(0), rng, assembly.objective.init_state), replicated(setup.mesh))
    # Jitted with shardings, so that no device ever holds all moments.
    opt_state = jax.jit(assembly.optimizer.init, out_shardings=assembly.state_shardings.opt_state)(params)
    reference_params = load_reference(setup, params, moves=True) if assembly.sync else None
    return TrainState(step, params, opt_state, rng, loss_state, reference_params)


def restore_state(
    setup: Setup, assembly: Assembly, manager: CheckpointManager, step: int, *, live: bool, with_base: bool
) -> tuple[TrainState, Frozen, Mapping[str, Any]]:
    """Reads the state after a step and its position, what else the checkpoint holds, and loads the frozen weights."""
    frozen = load_frozen(setup, None, live=live, moves=assembly.sync is not None, with_base=with_base)
    restored = manager.restore(step, saved_parts(assembly.state))
    return TrainState(**restored.state), frozen, restored.position


def position_after(
    step: int, setup: Setup, record: Record, base_identity: Mapping[str, str] | None, *, unevaluated: bool = False
) -> dict[str, Any]:
    """Returns what a checkpoint holds next to the state; the lines of metrics.jsonl up to it are on the disk then.

    Args:
      base_identity: which base the adapters belong to, where adapters are trained.
      unevaluated: a signal broke off the evaluation after this step, so that the next start has to make it.
    """
    position = {
        "step": step,
        "epoch": step / setup.steps_per_epoch,
        **record.position(),
        "config": to_public_dict(setup.config),
        "jdpo": __version__,
        **({"unevaluated": True} if unevaluated else {}),
    }
    return position if base_identity is None else {**position, "base": dict(base_identity)}
