"""A process joins the others of its run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jdpo.processes.detection import Membership, find_cluster
from jdpo.processes.last_line import end_at_once
from jdpo.processes.relay import relay_to
from jdpo.processes.watch import DEFAULT_TIMEOUT
from jdpo.safe_text import terminal

_JOIN_SECONDS = 300.0
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
    print(terminal(text), file=sys.stderr, flush=True)


def initialize_through_relay(
    coordinator_address: str,
    num_processes: int,
    process_id: int,
    local_device_ids: list[int] | None,
    *,
    heartbeat_timeout_seconds: int,
    join_seconds: float = _JOIN_SECONDS,
) -> None:
    """Calls `jax.distributed.initialize`, connected so that the loss of process 0 does not abort this one at once.

    Where not all processes come within `join_seconds`, this one ends with one line and LOST_EXIT_CODE: JAX would abort
    it a little later.

    Raises:
      ConnectionError: process 0 cannot serve at its address.
    """
    address = coordinator_address
    # With mutual TLS the client checks the name of the host that it connects to.
    if process_id != 0 and not getattr(jax.config, "jax_mtls_cert_file", None):
        address = relay_to(coordinator_address).address

    def give_up() -> None:
        end_at_once(
            f"process {process_id} of {num_processes}: not all processes have joined this run through "
            f"{coordinator_address} within {join_seconds:.0f} s; check that all are started, and that all reach "
            "process 0 at this address"
        )

    timer = threading.Timer(join_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            local_device_ids,
            cluster_detection_method="deactivate",  # all is known; JAX would restrict the devices by itself
            initialization_timeout=int(join_seconds) + 30,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"cannot join the processes of this run through {coordinator_address}: {error}"
        ) from error
    finally:
        timer.cancel()


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
      ConnectionError: process 0 cannot serve at its address.
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
