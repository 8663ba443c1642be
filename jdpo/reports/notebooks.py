"""Output in a Jupyter notebook: one line of progress that is replaced as the run progresses."""

from __future__ import annotations

import sys
from typing import Any


def in_notebook() -> bool:
    """Returns True in a Jupyter kernel, whose output is kept in the notebook; False in a terminal with IPython."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookLine:
    """A line in the output of the current cell. A stored notebook has its last text alone."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Shows a text in place of the last one."""
        from IPython.display import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
