"""`jdpo sft` and `jdpo dpo`: from a config to a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from jdpo.checkpoint.output_folders import check_out
from jdpo.config import ReferenceSettings, TrainConfig
from jdpo.devices import leave_out_missing_tpus
from jdpo.processes import differing, together
from jdpo.reports.progress import make_console
from jdpo.training.continuing import find_newest
from jdpo.training.finish import made_from
from jdpo.training.interrupt import StopRequest
from jdpo.training.reference.reference_source import Reference, settle_reference
from jdpo.training.run import OnStep, Run, RunResult, say_on
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.numerics import jax_settings, resolve_dtype
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Say, Setup, build
from jdpo.training.step.tasks import task_for


def train(config: TrainConfig, *, on_step: OnStep | None = None) -> RunResult:
    """Runs `jdpo sft` or `jdpo dpo`: starts, resumes, or finds the run finished.

    Args:
      config: an SFTConfig or a DPOConfig.
      on_step: called as on_step(step, params) before the first update of this process and after each update;
        the params are on the mesh and valid during the call only, as the next update reuses their memory.

    Returns:
      how it ended.

    Raises:
      ValueError: bad input, before anything is trained.
      FloatingPointError: loss or gradients are not finite; step and rows are named.
    """
    console = make_console()
    say = partial(say_on, console)
    leave_out_missing_tpus()
    config = resolve_dtype(config)
    with (
        StopRequest() as stop,
        jax_settings(config, config.cache_dir),
        closing(RunDirectory(config, task_for(config).command)) as directory,
    ):
        if directory.finished:
            step = directory.state()["results"]["step"]
            say(f"the run in {directory.path} is finished (step {step}); its model is {directory.model}")
            return RunResult(step, False, 0, directory)
        newest: int | None = None
        try:
            setup = build(config, say, stopped=stop.alone)
            # now, and not behind the last step
            together(lambda: check_out(directory.model, [*made_from(setup), directory.checkpoints]))
            inputs = together(setup.inputs)
            _check_same_everywhere(inputs)
            held_out = setup.eval_data.parts() if setup.eval_data is not None else {}
            directory.check_inputs(inputs, {**held_out, **setup.train_data.parts()})
            directory.remember("rows", setup.train_data.summary())  # for the model card of an export
            newest = find_newest(setup, directory)
            reference = _settle(setup, directory, stop, say)
            if stop.asked():  # before anything is compiled
                raise BuildStopped
        except BuildStopped:
            say("stopped by a signal before the first step; what was computed is kept. Run the same command again")
            return RunResult(newest or 0, True, stop.exit_code, directory)
        with ExitStack() as resources:
            return Run(setup, directory, stop, console, reference, resources, newest).go(on_step)


def _check_same_everywhere(inputs: Mapping[str, str]) -> None:
    """
    Args:
      inputs: of the setup, on this process.

    Raises:
      ValueError: the processes have not the same model or rows on their disks; what differs is named.
    """
    if unlike := differing(inputs):
        raise ValueError(
            f"the processes of this run do not have the same files: {', '.join(unlike)} differ from host to host; give "
            "every host the same ones"
        )


def _settle(setup: Setup, directory: RunDirectory, stop: StopRequest, say: Say) -> Reference:
    config = setup.config
    if not isinstance(config, ReferenceSettings):
        return Reference(mode="none")
    began_as: Any = directory.recall("reference")
    reference = settle_reference(
        setup,
        asked=config.reference,
        needs_reference=setup.task.uses_reference,
        sync_ref_model=config.sync_ref_model,
        began_as=began_as,
        stopped=stop.asked,
        say=say,
    )
    if began_as is None:
        directory.remember("reference", reference.mode)
    return reference
