"""Running a command as one process of several."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jdpo.cli.gpu_pool import may_use_gpu, reserve_gpu_memory
from jdpo.cli.nccl_timeout import gpu_libraries, limit_nccl
from jdpo.config import TrainConfig, WatchdogConfig
from jdpo.config.addresses import shown_text

if TYPE_CHECKING:
    from jdpo.processes import Deadlines


@contextlib.contextmanager
def in_cluster(config: TrainConfig, command: str, words: Sequence[str], *, trains: bool) -> Iterator[None]:
    """Joins the other processes of the run, if there are any, and exits together with them. Reserves GPU memory.

    While entered, a guard ends the process if it is stuck, or asked to stop with nothing to save.

    Args:
      config: of the run.
      command, words: the command line.
      trains: whether the command leaves checkpoints in output_dir.

    Raises:
      ValueError: see `join_cluster`.
    """
    from jdpo.checkpoint.steps import complete_steps  # imported now, as a dying process should not import
    from jdpo.processes import ending_together, guarded, heeding_maintenance, join_cluster

    folder = Path(config.output_dir) if trains else None
    timeout, deadlines = config.heartbeat_timeout_seconds, deadlines_of(config.watchdog)
    several = False

    def advice() -> str:
        steps = complete_steps(folder / "checkpoints") if folder is not None else []
        text = how_to_continue(command, words, folder, steps, resumes=config.resume == "auto", several=several)
        return shown_text(text)

    with (
        guarded(deadlines, folder, advice) as guard,
        heeding_maintenance(guard.stop, enabled=config.maintenance_notice),
    ):
        # Now, since JAX reads both when it first looks for devices.
        has_plugin = importlib.util.find_spec("jax_plugins") is not None
        note = reserve_gpu_memory(os.environ, has_plugin=has_plugin)
        if deadlines is not None and has_plugin and may_use_gpu(os.environ):
            limit_nccl(os.environ, gpu_libraries(), watchdog_seconds=deadlines.compile)
        joined = join_cluster(timeout=timeout, slices=config.mesh.slices)
        if note is not None and (joined is None or joined.process_id == 0):
            print(note, flush=True)
        # One process has nobody to wait for, so its errors end it as usual.
        if joined is None or joined.num_processes == 1:
            yield
            return
        several = True
        guard.joined(joined.process_id, joined.num_processes)
        with ending_together(shown_text, timeout=timeout, advice=advice, stacks_folder=folder, guard=guard):
            yield


def deadlines_of(settings: WatchdogConfig) -> Deadlines | None:
    """Returns the deadlines that a config sets; None if it switches the watchdog off."""
    from jdpo.processes import Deadlines

    if not settings.enabled:
        return None
    return Deadlines(
        step_factor=settings.step_factor,
        step=settings.step_seconds,
        start=settings.start_seconds,
        compile=settings.compile_seconds,
        evaluation=settings.evaluation_seconds,
        save=settings.save_seconds,
        export=settings.export_seconds,
        other=settings.other_seconds,
    )


def how_to_continue(
    command: str,
    words: Sequence[str],
    folder: Path | None,
    steps: Sequence[int],
    *,
    resumes: bool,
    several: bool = True,
) -> str:
    """Returns what is saved and which command continues, as a message.

    Args:
      command, words: the command line that was given.
      folder: output_dir, for a command that trains.
      steps: the checkpoints in it, oldest first.
      resumes: whether the command line allows to resume.
      several: whether the run has several processes.
    """
    if folder is None:
        saved, then = "The results so far are kept", "continue"
    elif steps:
        saved, then = f"The last checkpoint is step {steps[-1]} in {folder / 'checkpoints'}", "continue from it"
    else:
        saved, then = f"There is no checkpoint in {folder / 'checkpoints'} yet", "start again from step 0"
    # Quoted for a shell, so that the line can be pasted.
    # A run that forbids resuming would refuse the folder; the later of two values of a key wins.
    again = shlex.join(["jdpo", command, *words, *([] if resumes else ["--resume", "auto"])])
    return f"{saved}. To {then}, run the same command {'on every host' if several else 'again'}: {again}"
