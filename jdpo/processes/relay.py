"""A local relay between JAX's coordination client and the service in process 0.

JAX's client aborts its process, with about forty lines of C++, within milliseconds of losing the connection to process
0, before any Python code can run. The relay is the end of the connection that the client sees: when process 0 is gone,
the relay keeps the client's side open and sets `lost`, so that `jdpo.processes.watch` can end the process in order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

_CONNECT_SECONDS = 10.0
_CHUNK = 2**16
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


class CoordinatorRelay:
    """Forwards connections from a port of the loopback interface to the coordination service.

    Attributes:
      address: host:port that the client connects to.
      lost: is set once the service has closed an established connection.
    """

    def __init__(self, coordinator: str) -> None:
        """Starts to listen; the service may start later.

        Args:
          coordinator: host:port of the service; IPv6 addresses are in brackets.
        """
        host, _, port = coordinator.rpartition(":")
        self._service = (host.strip("[]"), int(port))
        self.lost = threading.Event()
        # Set unless the client must not see that the service has closed.
        self._released = threading.Event()
        self._released.set()
        self._listener = socket.create_server(("127.0.0.1", 0))  # loopback only; the system picks the port
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="coordinator-relay", daemon=True).start()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hides from the client, while entered, that the service has closed a connection."""
        self._released.clear()
        try:
            yield
        finally:
            self._released.set()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                service = socket.create_connection(self._service, _CONNECT_SECONDS)
            except OSError:  # not up yet; the client tries again until its own timeout
                client.close()
                continue
            service.settimeout(None)  # the limit is for connecting; later, silence is normal
            for end in (client, service):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # barriers wait for messages of a few bytes
            closed = threading.Event()  # by the client
            threading.Thread(target=self._to_service, args=(client, service, closed), daemon=True).start()
            threading.Thread(target=self._to_client, args=(client, service, closed), daemon=True).start()

    def _to_service(self, client: socket.socket, service: socket.socket, closed: threading.Event) -> None:
        while chunk := _received(client):
            try:
                service.sendall(chunk)
            except OSError:  # `_to_client` notices as well and closes both ends
                return
        # The client ended the connection first, so the close of the service that follows is not a loss.
        closed.set()
        _shut(service)

    def _to_client(self, client: socket.socket, service: socket.socket, closed: threading.Event) -> None:
        while chunk := _received(service):
            try:
                client.sendall(chunk)
            except OSError:
                closed.set()
                break
        if not closed.is_set():
            # The service closed first: its process is gone. The client must not see it while `holding`.
            self.lost.set()
            self._released.wait()
        _shut(client)
        _shut(service)


def _received(source: socket.socket) -> bytes:
    """Waits for bytes and returns them; returns b"" once the connection has ended in any way."""
    try:
        return source.recv(_CHUNK)
    except OSError:
        return b""


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


_joined_through: list[CoordinatorRelay] = []
"""The relay of this process, if it has one; a process joins at most one cluster."""


def relay_to(coordinator: str) -> CoordinatorRelay:
    """Starts the relay of this process."""
    reach_loopback_directly()
    _joined_through[:] = [CoordinatorRelay(coordinator)]
    return _joined_through[0]


def current_relay() -> CoordinatorRelay | None:
    """Returns the relay through which this process joined its cluster, if there is one."""
    return _joined_through[0] if _joined_through else None


def reach_loopback_directly() -> None:
    """Keeps gRPC from connecting to the relay through a proxy set in the environment."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        names = (os.environ.get(name) for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"))
        excluded = next(filter(None, names), "")
        os.environ["no_grpc_proxy"] = ",".join(filter(None, [excluded, "127.0.0.1"]))  # noqa: SIM112 (gRPC reads it so)
