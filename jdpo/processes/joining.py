"""A process joins the others of its run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jdpo.processes.detection import Membership, find_cluster
from jdpo.processes.relay import relay_to
from jdpo.processes.watch import DEFAULT_TIMEOUT

_JAX_HEARTBEAT_SECONDS = 100
"""JAX's own deadline, after which its client aborts the process; it must stay beyond that of `jdpo.processes.watch`."""


class Initialize(Protocol):
    """Has the signature of `jax.distributed.initialize`, as far as `join_cluster` uses it."""

    def __call__(
        self,
        coordinator_address: str,
        num_processes: int,
        process_id: int,
        local_device_ids: list[int] | None,
        *,
        heartbeat_timeout_seconds: int,
    ) -> None: ...


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def initialize_through_relay(
    coordinator_address: str,
    num_processes: int,
    process_id: int,
    local_device_ids: list[int] | None,
    *,
    heartbeat_timeout_seconds: int,
) -> None:
    """Calls `jax.distributed.initialize`, connected so that the loss of process 0 does not abort this one at once.

    Raises:
      TimeoutError: the processes have not all come within JAX's timeout.
    """
    address = coordinator_address
    # With mutual TLS the client checks the name of the host that it connects to.
    if process_id != 0 and not getattr(jax.config, "jax_mtls_cert_file", None):
        address = relay_to(coordinator_address).address
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            local_device_ids,
            cluster_detection_method="deactivate",  # all is known; JAX would restrict the devices by itself
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"process {process_id} could not join the other {num_processes - 1} processes at {coordinator_address}; "
            f"check that all are started, and that process 0 is reached at this address ({error})"
        ) from error


def join_cluster(
    *,
    timeout: float = DEFAULT_TIMEOUT,
    environ: Mapping[str, str] = os.environ,
    environments: Callable[[], Sequence[Any]] | None = None,
    initialize: Initialize = initialize_through_relay,
    say: Callable[[str], None] = _say,
) -> Membership | None:
    """Joins the processes of a run over several hosts, where the environment describes such a run.

    Call it before anything touches a device. A cluster of one process is not joined: JAX would show the process one
    device of its host.

    Args:
      timeout: seconds without a heartbeat after which `ending_together` takes a process for dead.
      environ, environments: see `find_cluster`.
      initialize: joins.
      say: takes one line about what was found; nothing is said where nothing describes a cluster.

    Returns:
      the place of this process; None where nothing describes a cluster.

    Raises:
      ValueError: see `find_cluster`.
      TimeoutError: the other processes do not come.
    """
    found = find_cluster(environ, environments)
    if found is None:
        return None
    say(f"cluster found by {found}")
    if found.num_processes > 1:
        initialize(
            found.coordinator_address,
            found.num_processes,
            found.process_id,
            found.local_device_ids,
            heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_SECONDS, int(2 * timeout) + 60),
        )
    return found
