"""Joins a process with the others of its run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jdpo.processes.detection import Membership, find_cluster
from jdpo.processes.last_line import end_at_once
from jdpo.processes.megascale import check_processes, check_slices
from jdpo.processes.relay import relay_to
from jdpo.processes.watch import DEFAULT_TIMEOUT
from jdpo.safe_text import terminal

_JOIN_SECONDS = 300.0  # as JAX by default
_JAX_HEARTBEAT_SECONDS = 100
"""JAX's own deadline, after which its client aborts the process; it must be later than that of `watch`."""


class Initialize(Protocol):
    """The part of the signature of `jax.distributed.initialize` that `join_cluster` uses."""

    def __call__(
        self,
        coordinator_address: str,
        num_processes: int,
        process_id: int,
        local_device_ids: list[int] | None,
        *,
        heartbeat_timeout_seconds: int,
    ) -> None: ...


def _log(text: str) -> None:
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
    """Calls `jax.distributed.initialize` through a relay, so that losing process 0 does not abort this process at once.

    If not all processes join within `join_seconds`, this one ends with one line and exit code 75; JAX would abort it
    a little later.

    Raises:
      ConnectionError: process 0 cannot listen at its address.
    """
    address = coordinator_address
    # Process 0 hosts the service and cannot lose it, so it needs no relay.
    # With mutual TLS the client checks the name of the host that it connects to, which the relay would hide.
    if process_id != 0 and not getattr(jax.config, "jax_mtls_cert_file", None):
        address = relay_to(coordinator_address).address

    def give_up() -> None:
        end_at_once(
            f"process {process_id} of {num_processes}: not all processes have joined this run through "
            f"{coordinator_address} within {join_seconds:.0f} s; check that all of them were started and can reach "
            "process 0 at this address (`jdpo doctor`, started in the same way, names those that are missing)"
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
            cluster_detection_method="deactivate",  # everything is known, and JAX would choose the devices differently
            initialization_timeout=int(join_seconds) + 30,  # after the timer above, whose message is one line
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
    slices: int | None = None,
    environ: Mapping[str, str] = os.environ,
    environments: Callable[[], Sequence[Any]] | None = None,
    initialize: Initialize = initialize_through_relay,
    log: Callable[[str], None] = _log,
) -> Membership | None:
    """Joins the processes of a run over several hosts, if the environment describes such a run.

    Call it before the first use of a device. A cluster of one process is not joined, because JAX would then show the
    process only one device of its host.

    Args:
      timeout: seconds without a heartbeat after which a process counts as dead in `ending_together`.
      slices: `mesh.slices` of the config, with which the environment must agree.
      environ, environments: see `find_cluster`.
      initialize: joins the cluster.
      log: receives one line about the cluster, if there is one.

    Returns:
      the place of this process; None if nothing describes a cluster.

    Raises:
      ValueError: see `find_cluster`; or the slices of this run are described in two ways.
      ConnectionError: process 0 cannot listen at its address.
    """
    # First, since finding the cluster may wait for the host of process 0.
    num_slices = check_slices(environ, slices)
    found = find_cluster(environ, environments)
    if found is None:
        return None
    check_processes(found.num_processes, num_slices)
    log(f"cluster found by {found}")
    if found.num_processes > 1:
        initialize(
            found.coordinator_address,
            found.num_processes,
            found.process_id,
            found.local_device_ids,
            # JAX's deadline comes last: it aborts the process, while `watch` ends it with a message.
            heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_SECONDS, int(2 * timeout) + 60),
        )
    return found
