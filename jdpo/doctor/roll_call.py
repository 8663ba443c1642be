"""The roll call: processes report to process 0 before they join, so that missing ones can be named.

JAX's coordination service does not tell who has come until all have. Until the roll call ends, process 0 listens at the
address of that service itself, so a process that cannot report could not have joined either.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdpo.processes import Membership

_LINE_BYTES = 2**20
_HELLO_SECONDS = 10.0
"""Time limit for the one line of a connected process; whatever else connects, such as a port scan, is dropped."""
_BETWEEN_ATTEMPTS = 0.2
_FAULT_SECONDS = 5.0
_GRACE_SECONDS = 30.0
"""How much longer a process waits for the answer than process 0 waits for the others: it may have come earlier."""


class RollCall(NamedTuple):
    """Who has reported.

    Attributes:
      hosts: index of a process -> its host and pid, for those that have reported.
      missing: indices of those that have not.
      faults: processes that do not fit the others, such as two with one index; in words.
      unreachable: why process 0 cannot be reached; "" if it can.
    """

    hosts: Mapping[int, str]
    missing: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()
    unreachable: str = ""

    @property
    def complete(self) -> bool:
        """True if all processes are there, once each."""
        return not (self.missing or self.faults or self.unreachable)


def call_roll(membership: Membership, timeout: float) -> RollCall:
    """Waits until all processes have reported to process 0, at most `timeout` seconds.

    Raises:
      ConnectionError: process 0 cannot listen at its address.
    """
    here = f"{socket.gethostname()}, pid {os.getpid()}"
    if membership.process_id != 0:
        return _report(membership, here, timeout)
    port = int(membership.coordinator_address.rpartition(":")[2])
    try:
        listener = _listener(port)
    except OSError as error:
        raise ConnectionError(
            f"process 0 cannot listen at port {port}: {error.strerror or error}; end the process that uses it, or "
            "choose another port"
        ) from error
    with listener:
        return _Roll(membership.num_processes, here).call(listener, timeout)


def _listener(port: int) -> socket.socket:
    # Both versions of IP where there are two, as JAX's service listens.
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


class _Roll:
    """The processes that have reported to process 0."""

    def __init__(self, count: int, here: str) -> None:
        self._count = count
        self._hosts = {0: here}
        self._faults: list[str] = []
        self._waiting: list[tuple[int, socket.socket]] = []

    def call(self, listener: socket.socket, timeout: float) -> RollCall:
        end = time.monotonic() + timeout
        while len(self._hosts) < self._count and (left := end - time.monotonic()) > 0:
            if select.select([listener], [], [], left)[0]:
                connection, _ = listener.accept()
                was_well = not self._faults
                self._hear(connection)
                if self._faults and was_well:  # waiting will not mend it; those just starting still hear of it
                    end = min(end, time.monotonic() + _FAULT_SECONDS)
        missing = tuple(index for index in range(self._count) if index not in self._hosts)
        found = RollCall(dict(self._hosts), missing, tuple(self._faults))
        for _, connection in self._waiting:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                connection.sendall(json.dumps(found._asdict()).encode() + b"\n")
            connection.close()
        return found

    def _hear(self, connection: socket.socket) -> None:
        said = _line(connection, _HELLO_SECONDS)
        try:
            values = json.loads(said)
            index, count, host = int(values["process"]), int(values["count"]), str(values["host"])
        except (ValueError, KeyError, TypeError):  # not a process of jdpo
            connection.close()
            return
        if count != self._count or not 0 <= index < count:
            self._faults.append(
                f"process {index} on {host} was started as one of {count} processes, and process 0 as one of "
                f"{self._count}"
            )
        # One that has ended, and was started again, replaces the first.
        elif index == 0 or any(each == index and _is_open(other) for each, other in self._waiting):
            self._faults.append(f"two processes have the index {index}: {self._hosts[index]} and {host}")
        else:
            self._hosts[index] = host
        self._waiting.append((index, connection))


def _is_open(connection: socket.socket) -> bool:
    """Returns False if the other end of a connection, which has nothing more to say, has closed it."""
    # A closed connection can be read, and gives nothing.
    return not select.select([connection], [], [], 0)[0]


def _report(membership: Membership, here: str, timeout: float) -> RollCall:
    host, _, port = membership.coordinator_address.rpartition(":")
    end = time.monotonic() + timeout
    why = ""
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), _HELLO_SECONDS) as connection:
                hello = {"process": membership.process_id, "count": membership.num_processes, "host": here}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                answer = _line(connection, timeout + _GRACE_SECONDS)
            if answer:
                return _read(json.loads(answer))
            why = "it has closed the connection"
        except (OSError, ValueError) as error:  # not up yet, or not process 0 of jdpo doctor
            why = str(error)
        time.sleep(_BETWEEN_ATTEMPTS)
    return RollCall({membership.process_id: here}, unreachable=why or "no answer")


def _read(values: Mapping[str, Any]) -> RollCall:
    hosts = {int(index): str(host) for index, host in values["hosts"].items()}
    return RollCall(hosts, tuple(map(int, values["missing"])), tuple(map(str, values["faults"])))


def _line(connection: socket.socket, seconds: float) -> bytes:
    """Returns the line that comes from a connection; b"" if none comes in time."""
    connection.settimeout(seconds)
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < _LINE_BYTES and (part := connection.recv(2**16)):
            line += part
    return line if line.endswith(b"\n") else b""
