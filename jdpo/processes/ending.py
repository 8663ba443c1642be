"""Ends all processes of a run when one of them ends; each of them logs why."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jdpo.exit_codes import FAILED, LOST, STALLED
from jdpo.processes.guard import Guard, end_for_stall
from jdpo.processes.last_line import end_saying, this_process, write_line, write_stacks
from jdpo.processes.process_progress import PROGRESS
from jdpo.processes.relay import current_relay
from jdpo.processes.watch import DEFAULT_TIMEOUT, Verdict, Watch

_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
_GRACE_SECONDS = 20.0
"""Time for a process to raise and clean up by itself before its thread ends it."""


def _same_command() -> str:
    return "Start all processes of this run again with the same command to continue."


@contextlib.contextmanager
def ending_together(
    shown: Callable[[str], str],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    advice: Callable[[], str] = _same_command,
    stacks_folder: Path | None = None,
    guard: Guard | None = None,
) -> Iterator[None]:
    """Ends every process of a run, while entered, when one of them ends.

    Errors that all processes detect at the same point are raised by all of them (see `run_jointly`). This context
    handles the rest: an error on one process only, such as a disk failure in the middle of a step, and a process that
    dies or stops without an error. A process that waits in a collective operation cannot be reached by an exception, so
    a thread ends it, with one line on stderr that names the failed process. The exit code is 1 if that process reported
    an error, and exit code 75 if it died or stopped.

    Args:
      shown: error text -> the text that the other processes may show.
      timeout: seconds without a heartbeat after which a process counts as dead.
      advice: returns sentences about what was saved and how to continue.
      stacks_folder: folder for the Python stacks of a process that ends because another is gone. Default, and if the
        folder does not exist: the folder for temporary files.
      guard: of this process; with it, the processes also end together when one of them is stuck (exit code 124, and 75
        for those that wait for it), and tell each other of a signal that asks to stop.
    """
    joined = _joined()
    client, index, relay = joined.client, joined.process_id, current_relay()
    if client is None:
        yield
        return
    watch = Watch(
        client,
        index=index,
        count=joined.num_processes,
        timeout=timeout,
        host=this_process(),
        relay=relay,
        state=guard.state if guard else None,
        on_stop=guard.stop if guard else None,
    )

    def end_with_others() -> None:
        verdict = watch.wait()
        if verdict is not None and guard is not None and (verdict.leaves or (verdict.lost and PROGRESS.may_leave)):
            guard.leave()
        elif verdict is not None and verdict.stuck is not None:
            code = STALLED if index in verdict.stuck else LOST
            end_for_stall(verdict.text, code, index, stacks_folder, lambda: shown(advice()))
        elif verdict is not None and verdict.lost:
            end_saying(
                f"process {verdict.process} of this run {verdict.text}; this process ends as well",
                lambda: f"{write_stacks(stacks_folder, f'stacks-of-process-{index}.txt')} {shown(advice())}",
            )
        elif verdict is not None and not watch.left_within(_GRACE_SECONDS):  # otherwise it has ended in order
            _end_for_failure(verdict, client)

    thread = threading.Thread(target=end_with_others, name="processes", daemon=True)
    # A client that sees the connection close aborts the process, before `watch` can end it in order.
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
            # It may be ending this process already; if so, its line comes before anything that follows here.
            thread.join(_GRACE_SECONDS)


def _joined() -> Any:
    """Returns JAX's state of the cluster that this process has joined; its client is None for a single process.

    jax.process_index would initialize the devices, for which all processes wait for each other.
    """
    from jax._src import distributed  # it has no public name

    return distributed.global_state


def may_be_of_a_loss(error: BaseException) -> bool:
    """Returns True if an error may come from a collective operation that another process did not join."""
    seen: BaseException | None = error
    while seen is not None:
        # Some collective operations raise the runtime's status as a ValueError, as seen from jax 0.12.
        if isinstance(seen, jax.errors.JaxRuntimeError) or _STATUS.match(str(seen)):
            return "RESOURCE_EXHAUSTED" not in str(seen)  # a full device is this process's own failure
        seen = seen.__cause__ or seen.__context__
    return False


def _end_for_failure(verdict: Verdict, client: Any) -> None:
    write_line(f"process {verdict.process} of this run has failed, and this process waits for it: {verdict.text}")
    with contextlib.suppress(Exception):
        client.shutdown()  # the failed process waits until all have called this
    os._exit(FAILED)  # no exception reaches the main thread inside a collective operation
