"""Agreement between the processes of a run; with one process every function answers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

_CAUSE_BYTES = 2**12


def is_first() -> bool:
    """Whether this process writes the files that a run has one of."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(mine: bool) -> bool:
    """Whether it is so on any process; every process gets the same answer."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([mine]))))


def raise_where_any(error: Exception | None) -> None:
    """Raises an error on every process where any process has one: its own, or one that says whose it is.

    A process that failed alone would leave the others waiting for it at their next common step.

    Args:
      error: what went wrong on this process, if anything did.

    Raises:
      Exception: `error` where it is not None.
      ValueError: another process has one; it has its text.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.reshape(multihost_utils.process_allgather(np.array([error is not None])), -1)
        if failed.any():
            first = int(np.argmax(failed))
            text = (str(error) or type(error).__name__).encode()[:_CAUSE_BYTES].ljust(_CAUSE_BYTES, b"\0")
            texts = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
            cause = texts[first].tobytes().rstrip(b"\0").decode(errors="replace")
            error = error or ValueError(f"process {first} of this run has failed: {cause}")
    if error is not None:
        raise error


@overload
def together(work: Callable[[], T]) -> T: ...


@overload
def together(work: Callable[[], T], *, on_first: Literal[True]) -> T | None: ...


def together(work: Callable[[], T], *, on_first: bool = False) -> T | None:
    """Does something on every process and waits for all; where it fails on one process, all raise.

    Args:
      work: has no steps that processes take together: one that fails alone would leave the others there.
      on_first: it is done on the first process only, while the others wait.

    Returns:
      what `work` returns here; None where it is not done.

    Raises:
      Exception: what `work` raised here, or a ValueError with the process where it did and why.
    """
    error: Exception | None = None
    found: T | None = None
    try:
        if is_first() or not on_first:
            found = work()
    except Exception as raised:
        error = raised
    raise_where_any(error)
    return found


def most_of_processes(mine: float) -> float:
    """The largest of the processes' numbers; every process gets the same."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    bits = np.array([mine]).view(np.uint32)  # jax would make a float32 of a float64
    return float(np.max(multihost_utils.process_allgather(bits).reshape(-1).view(np.float64)))


def any_process_later(mine: bool) -> Callable[[], bool]:
    """As `any_process`, but asked now and answered when the result is called: what devices do meanwhile goes on."""
    devices = Mesh(np.array(jax.devices()), ("devices",))
    flags = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(devices, PartitionSpec("devices")), lambda index: np.array([mine])
    )
    found = jax.jit(jnp.any, out_shardings=NamedSharding(devices, PartitionSpec()))(flags)
    return lambda: bool(np.asarray(found.addressable_data(0)))


def differing(mine: Mapping[str, str]) -> list[str]:
    """Names of the texts that are not the same on every process; every process gets the same answer.

    Args:
      mine: the same names in the same order everywhere.
    """
    if jax.process_count() == 1:
        return []
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(text.encode()).digest() for text in mine.values()]
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    everywhere = multihost_utils.process_allgather(table)
    unlike = (everywhere != everywhere[0]).any(axis=(0, 2))
    return [name for name, other in zip(mine, unlike, strict=True) if other]


def agree_on(find: Callable[[], int | None]) -> int | None:
    """A step that the first process finds, on every process; where it fails there, all raise.

    Raises:
      Exception: what `find` raised on the first process; a ValueError on the others.
    """
    found = together(find, on_first=True)
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
    return None if told < 0 else told
