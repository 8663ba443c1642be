"""Writes docs/notebooks/dpo_step_by_step.ipynb, with outputs, from the .md next to it, which is the one to edit.

python scripts/write_notebook.py      # after the notebook, or what it shows, was changed; needs jdpo[notebook]

Prints the seconds of each cell that takes more than one.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

SOURCE = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "dpo_step_by_step.md"
WRITTEN = SOURCE.with_suffix(".ipynb")
MOST_BYTES = 2 * 2**20


def read_source() -> NotebookNode:
    """Returns the notebook of the .md file, without outputs; its cells have the same ids each time."""
    notebook = jupytext.read(SOURCE)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Runs all cells in a kernel of this environment and keeps their outputs in the notebook.

    Args:
      folder: the working directory of the kernel.

    Raises:
      CellExecutionError: a cell raised, such as an assertion about what the text says.
    """
    # A cell that is stuck must not hold up a whole run of the tests.
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()


def take_times(notebook: NotebookNode) -> list[tuple[str, float]]:
    """Returns (first line, seconds) of each code cell, and removes the times, which would change in every run."""
    times = []
    for cell in notebook.cells:
        stamps = cell.metadata.pop("execution", {})
        if {"iopub.status.busy", "shell.execute_reply"} <= stamps.keys():
            began, ended = (
                datetime.datetime.fromisoformat(stamps[name]) for name in ("iopub.status.busy", "shell.execute_reply")
            )
            times.append((cell.source.split("\n")[0], (ended - began).total_seconds()))
    return times


def main() -> None:
    notebook = read_source()
    execute(notebook, SOURCE.parent)
    times = take_times(notebook)
    for first, seconds in times:
        if seconds >= 1:
            print(f"{seconds:6.1f} s  {first[:80]}")
    print(f"{sum(seconds for _, seconds in times):6.1f} s  all cells")
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MOST_BYTES:
        raise SystemExit(f"{WRITTEN.name} would have {len(text.encode()):,} bytes, at most {MOST_BYTES:,} are allowed")
    WRITTEN.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
