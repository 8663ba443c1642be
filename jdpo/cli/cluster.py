"""Running a command as one process of several."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jdpo.cli.gpu_pool import reserve_gpu_memory
from jdpo.config import OutputSettings


@contextlib.contextmanager
def in_cluster(
    output: OutputSettings, command: str, words: Sequence[str], *, shown: Callable[[str], str], trains: bool
) -> Iterator[None]:
    """Joins the other processes of the run, if there are any, and exits together with them. Reserves GPU memory.

    Args:
      output: the run's settings.
      command, words: the command line.
      shown: makes a text safe to show.
      trains: whether the command leaves checkpoints in output_dir.

    Raises:
      ValueError: see `join_cluster`.
    """
    from jdpo.processes import ending_together, join_cluster

    timeout = output.heartbeat_timeout_seconds
    # Now, since JAX reserves the memory when it first looks for devices.
    note = reserve_gpu_memory(os.environ, has_plugin=importlib.util.find_spec("jax_plugins") is not None)
    joined = join_cluster(timeout=timeout)
    if note is not None and (joined is None or joined.process_id == 0):
        print(note, flush=True)
    # One process has nobody to wait for, so its errors end it as usual.
    if joined is None or joined.num_processes == 1:
        yield
        return
    from jdpo.checkpoint.steps import complete_steps  # imported now, as a dying process should not import

    folder = Path(output.output_dir) if trains else None

    def advice() -> str:
        steps = complete_steps(folder / "checkpoints") if folder is not None else []
        return how_to_continue(command, words, folder, steps, resumes=output.resume == "auto")

    with ending_together(shown, timeout=timeout, advice=advice, stacks_folder=folder):
        yield


def how_to_continue(
    command: str, words: Sequence[str], folder: Path | None, steps: Sequence[int], *, resumes: bool
) -> str:
    """Returns what is saved and which command continues, as a message.

    Args:
      command, words: the command line that was given.
      folder: output_dir, for a command that trains.
      steps: the checkpoints in it, oldest first.
      resumes: whether the command line allows to resume.
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
    return f"{saved}. To {then}, run the same command on every host: {again}"
