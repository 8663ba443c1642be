"""Agreement between the processes of a run; with a single process every function returns at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

_CAUSE_BYTES = 2**12
"""The length to which every process pads or cuts an error's text: a collective operation needs equal shapes."""


def is_first() -> bool:
    """Returns True on the process that writes the files of which a run has one."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(mine: bool) -> bool:
    """Returns True on every process if `mine` is True on any."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([mine]))))


def gathered(mine: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, [processes, ...]; every process gives one of the same shape."""
    if jax.process_count() == 1:
        return mine[None]
    from jax.experimental import multihost_utils

    found: np.ndarray = multihost_utils.process_allgather(mine)
    return found


def text_of_first(mine: str) -> str:
    """Returns the text of the first process on every process; the texts of the others are ignored."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    content = np.frombuffer(mine.encode(), np.uint8)
    # Shapes have to be equal everywhere, so the length goes first.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = content if is_first() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes().decode() if length else ""


def raise_on_all(error: Exception | None) -> None:
    """Raises an error on every process if any process has one.

    If only the process with the error raised it, the others would wait for that process at their next common step.

    Args:
      error: the error of this process, or None.

    Raises:
      Exception: `error`, if it is not None.
      ValueError: another process has an error; the message names the process and holds its text.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.reshape(multihost_utils.process_allgather(np.array([error is not None])), -1)
        if failed.any():
            # The lowest index of those that failed, so that all processes name the same one.
            first = int(np.argmax(failed))
            # Every process takes part, also those without an error, whose text nobody reads.
            text = (str(error) or type(error).__name__).encode()[:_CAUSE_BYTES].ljust(_CAUSE_BYTES, b"\0")
            texts = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
            # "replace", because the cut may be within a character.
            cause = texts[first].tobytes().rstrip(b"\0").decode(errors="replace")
            error = error or ValueError(f"process {first} of this run has failed: {cause}")
    if error is not None:
        raise error


@overload
def run_jointly(work: Callable[[], T]) -> T: ...


@overload
def run_jointly(work: Callable[[], T], *, on_first: Literal[True]) -> T | None: ...


def run_jointly(work: Callable[[], T], *, on_first: bool = False) -> T | None:
    """Calls `work` on every process and waits for all; if it fails on one process, all raise.

    Args:
      work: must not contain collective operations: a process that fails alone would leave the others waiting there.
      on_first: call it on the first process only, while the others wait.

    Returns:
      the result of `work`, or None on a process that does not call it.

    Raises:
      Exception: the error of `work` on this process, or a ValueError that names another process and its error.
    """
    error: Exception | None = None
    # KeyboardInterrupt is not caught: it ends this process, and `ending_together` tells the others.
    found: T | None = None
    try:
        if is_first() or not on_first:
            found = work()
    except Exception as raised:
        error = raised
    raise_on_all(error)
    return found


def max_over_processes(mine: float) -> float:
    """Returns the largest of the processes' numbers on every process."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    bits = np.array([mine]).view(np.uint32)  # jax would make a float32 of a float64
    return float(np.max(multihost_utils.process_allgather(bits).reshape(-1).view(np.float64)))


def any_process_later(mine: Sequence[bool]) -> Callable[[], list[bool]]:
    """Starts `any_process` of several flags without waiting, so that devices stay busy meanwhile.

    Returns:
      a function that waits for the answers, one for each flag.
    """
    # A jitted reduction is queued after the running step and returns at once; process_allgather would wait for it.
    devices = Mesh(np.array(jax.devices()), ("devices",))
    # [devices, flags], each process fills in the rows of its own devices.
    flags = jax.make_array_from_callback(
        (jax.device_count(), len(mine)),
        NamedSharding(devices, PartitionSpec("devices")),
        lambda index: np.array([mine]),
    )
    found = jax.jit(_any_device, out_shardings=NamedSharding(devices, PartitionSpec()))(flags)
    return lambda: [bool(flag) for flag in np.asarray(found.addressable_data(0))]


def _any_device(flags: jax.Array) -> jax.Array:
    # A function of the module: one that is made in each call would be compiled in each call.
    return flags.any(axis=0)


def differing(mine: Mapping[str, str]) -> list[str]:
    """Returns, on every process, the names of the texts that differ between processes.

    Args:
      mine: name -> text, with the same names in the same order on every process.
    """
    if jax.process_count() == 1:
        return []
    from jax.experimental import multihost_utils

    # Digests have one length, as the gathering needs; the texts do not.
    digests = [hashlib.sha256(text.encode()).digest() for text in mine.values()]
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)  # [texts, 32]
    everywhere = multihost_utils.process_allgather(table)  # [processes, texts, 32]
    differs = (everywhere != everywhere[0]).any(axis=(0, 2))
    return [name for name, other in zip(mine, differs, strict=True) if other]


def agree_on(find: Callable[[], int | None]) -> int | None:
    """Returns on every process the step that `find` returns on the first one; if it fails there, all raise.

    Raises:
      Exception: the error of `find` on the first process; a ValueError on the others.
    """
    found = run_jointly(find, on_first=True)
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    # An array cannot hold None; steps are never negative.
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
    return None if step < 0 else step
