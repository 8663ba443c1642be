"""Checks the variables that tell libtpu of several TPU slices, before anything waits for the others."""

from __future__ import annotations

from collections.abc import Mapping

NUM_SLICES = "MEGASCALE_NUM_SLICES"
SLICE_ID = "MEGASCALE_SLICE_ID"


def check_slices(environ: Mapping[str, str], asked: int | None = None) -> int:
    """Returns the number of slices that the environment names, 1 if it names none.

    Args:
      asked: `mesh.slices` of the config.

    Raises:
      ValueError: the variables disagree with each other or with `asked`; libtpu would wait for slices that never come.
    """
    # Only libtpu reads these variables, so a run on other devices of a TPU VM is free of them.
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return 1
    slices, index = _number(environ, NUM_SLICES), _number(environ, SLICE_ID)
    if asked is not None and slices is not None and asked != slices:
        raise ValueError(
            f"mesh.slices is {asked}, but {NUM_SLICES} is {slices}: start the run on {asked} slices, or leave "
            "mesh.slices out"
        )
    if slices == 0 or (slices or 1) <= (index or 0):
        raise ValueError(
            f"{SLICE_ID} is {index}, but {NUM_SLICES} is {'not set' if slices is None else slices}; slices are "
            "numbered from 0, and every process needs both variables"
        )
    if (slices or 1) > 1 and index is None:
        raise ValueError(f"{NUM_SLICES} is {slices}, but {SLICE_ID} is not set: it is 0 in the first slice")
    return slices or 1


def check_processes(num_processes: int, num_slices: int) -> None:
    """Refuses a number of processes that is not the same in every slice.

    Raises:
      ValueError: libtpu would wait for slices without a process.
    """
    if num_processes % num_slices:
        raise ValueError(
            f"{NUM_SLICES} is {num_slices}, but the run has {num_processes} process{'es' if num_processes > 1 else ''}:"
            f" every slice needs one process per host, and equally many; without several slices, unset {NUM_SLICES}"
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; expected a whole number")
    return int(text) if text else None
