"""The exit codes of a run, and which of them a launcher starts again; docs/scale.md has the same table."""

from __future__ import annotations

import signal
from typing import NamedTuple


class ExitCode(NamedTuple):
    """An exit code of `jdpo sft`, `jdpo dpo` and `jdpo reference`.

    Attributes:
      code: the number.
      meaning: what has happened.
      restart: True if the same command continues the run, so that a launcher starts it again.
    """

    code: int
    meaning: str
    restart: bool


DONE, FAILED, USAGE = 0, 1, 2
LOST = 75
"""EX_TEMPFAIL of sysexits.h: another process of the run is gone; the same command continues the run."""
STALLED = 124
"""As `timeout` of coreutils: this process was alive and did not get any further."""
HUNG_UP = 128 + signal.SIGHUP
INTERRUPTED = 128 + signal.SIGINT
PREEMPTED = 128 + signal.SIGTERM

EXIT_CODES = (
    ExitCode(DONE, "done", restart=False),
    ExitCode(FAILED, "the run failed: its message says why", restart=False),
    ExitCode(USAGE, "the command line, the config or the data is wrong", restart=False),
    ExitCode(LOST, "another process of the run has died, is stuck or did not join", restart=True),
    ExitCode(STALLED, "this process was stuck: a phase took longer than its deadline", restart=True),
    ExitCode(HUNG_UP, "its terminal was closed (SIGHUP); a checkpoint is saved", restart=False),
    ExitCode(INTERRUPTED, "stopped by Ctrl-C; a checkpoint is saved", restart=False),
    ExitCode(128 + signal.SIGABRT, "a library aborted the process", restart=True),
    ExitCode(128 + signal.SIGKILL, "killed, as by the system when memory runs out", restart=True),
    ExitCode(128 + signal.SIGSEGV, "a library crashed the process", restart=False),
    ExitCode(PREEMPTED, "preempted, or stopped by SIGTERM; a checkpoint is saved", restart=True),
)
"""Every code that a launcher may see, in order."""

RESTART_CODES = tuple(each.code for each in EXIT_CODES if each.restart)
"""Exit codes after which a launcher starts the same command again; after any other, it stops."""
