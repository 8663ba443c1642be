"""Hides the tracebacks that orbax prints when a background save fails; jdpo raises an error for it."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any


def quieten() -> None:
    """Hides those tracebacks in this process, unless JDPO_TRACEBACK=1 is set.

    Orbax raises the same error again when it is asked about its save, so no information is lost.
    """
    if os.environ.get("JDPO_TRACEBACK"):
        return
    # Orbax logs with absl, and asyncio reports tasks of it whose error nobody fetched.
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _is_kept not in logger.filters:
            logger.addFilter(_is_kept)
    # A hook that another tool has set, such as pytest's, stays in force.
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops


def _is_kept(record: logging.LogRecord) -> bool:
    by_orbax = "orbax" in record.pathname or "never retrieved" in record.getMessage()
    return not (by_orbax and record.levelno >= logging.ERROR)


def _without_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def reason(error: Exception) -> str:
    """Returns in one line why a save failed: the system's message for a full disk, else the first line of the error."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__
