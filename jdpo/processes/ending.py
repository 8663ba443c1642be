"""The end of a run's processes: what ends one of them ends all, and each says why."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jdpo.processes.last_line import end_at_once, write_line
from jdpo.processes.relay import current_relay
from jdpo.processes.watch import DEFAULT_TIMEOUT, Verdict, Watch

_FAILED_EXIT_CODE = 1
_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
_GRACE_SECONDS = 20.0
_LAST_WORDS_SECONDS = 5.0


def _same_command() -> str:
    return "Start all processes of this run again with the same command to continue."


@contextlib.contextmanager
def ending_together(
    shown: Callable[[str], str],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    advice: Callable[[], str] = _same_command,
    stacks_folder: Path | None = None,
) -> Iterator[None]:
    """While entered, the end of one process of a run ends all of them, wherever they wait for it.

    What all processes find out together (see `together`) all raise. This is for the rest: an error that one process
    has alone, such as a disk that fails in the middle of a step, and a process that dies or stops without a word. A
    process that waits for another in a collective operation cannot be reached by an exception, so a thread ends it,
    with one line on stderr that names the process at fault. The exit code is 1 where that process reported an error,
    and LOST_EXIT_CODE where it is dead or stopped.

    Args:
      shown: an error's text -> what the other processes may see of it.
      timeout: seconds without a heartbeat after which a process is taken for dead.
      advice: returns whole sentences that say what was saved, and how to continue.
      stacks_folder: where the Python stacks of a process that ends for the loss of another are written; None, or a
        folder that does not exist: the folder for temporary files.
    """
    joined = _joined()
    client, index, relay = joined.client, joined.process_id, current_relay()
    if client is None:
        yield
        return
    host = f"host {socket.gethostname()}, pid {os.getpid()}"
    watch = Watch(client, index=index, count=joined.num_processes, timeout=timeout, host=host, relay=relay)

    def end_with_others() -> None:
        verdict = watch.wait()
        if verdict is not None and verdict.lost:
            _end_for_loss(verdict, lambda: f"{_write_stacks(stacks_folder, index)} {shown(advice())}")
        elif verdict is not None and not watch.left_within(_GRACE_SECONDS):  # else there was something to put in order
            _end_for_failure(verdict, client)

    thread = threading.Thread(target=end_with_others, name="processes", daemon=True)
    with relay.holding() if relay is not None else contextlib.nullcontext():
        watch.start()
        thread.start()
        try:
            yield
        except BaseException as error:
            if may_be_of_a_loss(error):
                thread.join(watch.suspect())  # it ends this process if another is gone
            watch.report(shown(f"{type(error).__name__}: {error}"))
            raise
        finally:
            watch.leave()
            thread.join(_GRACE_SECONDS)


def _joined() -> Any:
    """Returns what JAX knows of the cluster that this process has joined; its client is None for a single process.

    jax.process_index would initialize the devices, for which all processes wait for each other.
    """
    from jax._src import distributed  # it has no public name

    return distributed.global_state


def may_be_of_a_loss(error: BaseException) -> bool:
    """Tells whether an error may come from a collective operation that another process has not taken part in."""
    seen: BaseException | None = error
    while seen is not None:
        # Some collective operations raise the runtime's status as a ValueError, as seen from jax 0.12.
        if isinstance(seen, jax.errors.JaxRuntimeError) or _STATUS.match(str(seen)):
            return "RESOURCE_EXHAUSTED" not in str(seen)
        seen = seen.__cause__ or seen.__context__
    return False


def _end_for_loss(verdict: Verdict, more: Callable[[], str]) -> None:
    """Writes the line and ends the process at once: JAX's shutdown would wait for the process that is gone.

    Args:
      more: gives the rest of the line; it may touch a disk that does not answer, so it is not waited for long.
    """
    rest = [_same_command()]

    def ask() -> None:
        rest[:] = [more()]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_SECONDS)
    end_at_once(f"process {verdict.process} of this run {verdict.text}; this one ends with it. {rest[0]}")


def _end_for_failure(verdict: Verdict, client: Any) -> None:
    write_line(f"process {verdict.process} of this run has failed, and this one waits for it: {verdict.text}")
    with contextlib.suppress(Exception):
        client.shutdown()  # the one that failed waits until all have come here
    os._exit(_FAILED_EXIT_CODE)


def _write_stacks(folder: Path | None, index: int) -> str:
    """Writes the Python stacks of all threads to a file; returns a sentence that names it."""
    try:
        if folder is None or not folder.is_dir():
            folder = Path(tempfile.mkdtemp(prefix="jdpo-"))
        path = folder / f"stacks-of-process-{index}.txt"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        return f"The stacks of its threads could not be written: {error}."
    return f"The stacks of its threads are in {path}."
