"""The tracebacks that orbax prints when a save fails in the background, next to the error that jdpo raises for it."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any


def quieten() -> None:
    """Keeps those tracebacks back in this process; `JDPO_TRACEBACK=1` shows them.

    Orbax raises the same error again when it is asked about its save, so nothing is lost.
    """
    if os.environ.get("JDPO_TRACEBACK"):
        return
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _is_kept not in logger.filters:
            logger.addFilter(_is_kept)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops


def _is_kept(record: logging.LogRecord) -> bool:
    by_orbax = "orbax" in record.pathname or "never retrieved" in record.getMessage()
    return not (by_orbax and record.levelno >= logging.ERROR)


def _without_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def reason(error: Exception) -> str:
    """Returns what a save failed of in a line: of a full disk that alone, of anything else orbax's first line."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__
