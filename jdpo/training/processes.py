"""Agreement between the processes of a run; with one process every function answers at once."""

from __future__ import annotations

import jax
import numpy as np


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


def agree_on(step: int | None) -> int | None:
    """The first process's step, on every process."""
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if told < 0 else told
