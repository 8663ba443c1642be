"""Google Cloud's notice that this machine is going to be preempted or terminated, which counts as SIGTERM.

The metadata server of a machine announces both: `instance/preempted` becomes TRUE when a spot machine is taken away,
and `instance/maintenance-event` becomes TERMINATE_ON_HOST_MAINTENANCE before a machine with accelerators, which cannot
migrate, is stopped. A request with `wait_for_change` is answered when the value changes, so nothing polls.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jdpo.processes.last_line import write_line

_SERVER = "169.254.169.254"
"""By number: a look-up of the name would take seconds on machines elsewhere."""
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_EVENTS = {"instance/preempted": ("TRUE",), "instance/maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",)}
"""Path on the metadata server -> values that announce the end of the machine. A migration does not."""
_HAS_NOT = (http.client.BAD_REQUEST, http.client.FORBIDDEN, http.client.NOT_FOUND)
_WAIT_SECONDS = 300
"""After this time the server answers even if nothing has changed, so that a connection that was lost is noticed."""
_RETRY_SECONDS = 30.0
_CONNECT_SECONDS = 5.0


def metadata_server(environ: Mapping[str, str] = os.environ, product: Path = _PRODUCT) -> str | None:
    """Returns host or host:port of the metadata server; None except on Google Cloud.

    Asks nobody: the firmware of a machine names its maker. GCE_METADATA_HOST and NO_GCE_CHECK are the variables that
    Google's own libraries read.

    Args:
      product: file that names the machine.
    """
    if environ.get("NO_GCE_CHECK", "").lower() == "true":
        return None
    if host := environ.get("GCE_METADATA_HOST"):
        return host
    try:
        return _SERVER if product.read_text(encoding="utf-8").startswith("Google") else None
    except OSError:
        return None


class MaintenanceNotice:
    """A thread that waits for the notice."""

    def __init__(self, server: str, stop: Callable[[int], None], *, retry_seconds: float = _RETRY_SECONDS) -> None:
        """
        Args:
          server: host or host:port of the metadata server.
          stop: is called with SIGTERM when the notice comes. The process is not sent the signal: the system sends it
            seconds later, and a second one would end the run at once.
          retry_seconds: pause after a request that failed.
        """
        self._server, self._stop, self._retry_seconds = server, stop, retry_seconds
        self._over = threading.Event()
        self._ended, self._ending = os.pipe()
        self._tags: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="maintenance-notice", daemon=True)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """While entered, the thread waits for the notice."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            os.write(self._ending, b".")
            self._thread.join()
            os.close(self._ended)
            os.close(self._ending)

    def _run(self) -> None:
        paths = list(_EVENTS)
        while paths and not self._over.is_set():
            try:
                if self._announced(paths):
                    return
            except (OSError, http.client.HTTPException, ValueError):  # it restarts now and then
                self._over.wait(self._retry_seconds)

    def _announced(self, paths: list[str]) -> bool:
        """Asks for some values until one announces the end; removes the paths that this server does not have."""
        with contextlib.ExitStack() as stack:
            waiting: dict[str, http.client.HTTPConnection] = {}
            while paths:
                for path in set(paths) - set(waiting):
                    waiting[path] = self._ask(path)
                    stack.callback(waiting[path].close)
                ends = {connection.sock.fileno(): path for path, connection in waiting.items()}
                poller = select.poll()
                for end in (self._ended, *ends):
                    poller.register(end, select.POLLIN)
                # The connections have time limits of their own only while a request is being answered.
                ready = [end for end, _ in poller.poll(1000 * (_WAIT_SECONDS + _RETRY_SECONDS))]
                if self._ended in ready or not ready:
                    return False
                for path in (ends[end] for end in ready):
                    connection = waiting.pop(path)
                    response = connection.getresponse()
                    value = response.read().decode(errors="replace").strip()
                    connection.close()
                    if response.status in _HAS_NOT:
                        paths.remove(path)  # such as on GKE, whose metadata server has only some of them
                    elif response.status != http.client.OK:
                        raise http.client.HTTPException(f"status {response.status}")  # 503 while it restarts
                    elif self._ends_machine(path, value, response.getheader("ETag", "0")):
                        return True
        return False

    def _ask(self, path: str) -> http.client.HTTPConnection:
        """Sends a request for a value; the first one is answered at once, later ones when the value changes."""
        connection = http.client.HTTPConnection(self._server, timeout=_CONNECT_SECONDS)
        query = ""
        if path in self._tags:
            query = f"?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={self._tags[path]}"
        connection.request("GET", f"/computeMetadata/v1/{path}{query}", headers={"Metadata-Flavor": "Google"})
        return connection

    def _ends_machine(self, path: str, value: str, tag: str) -> bool:
        """Notes a value; calls `stop` and returns True if it announces the end of the machine."""
        is_first = path not in self._tags
        self._tags[path] = tag
        if value not in _EVENTS[path]:
            return False
        if is_first:
            # A run that was restarted on the same machine would otherwise stop at once, again and again.
            write_line(f"Google Cloud has announced {path} {value} already; the run goes on until SIGTERM", "warning")
            return False
        write_line(f"Google Cloud announces {path} {value}: stopping as after SIGTERM", "warning")
        self._stop(signal.SIGTERM)
        return True


@contextlib.contextmanager
def heeding_maintenance(stop: Callable[[int], None], *, enabled: bool) -> Iterator[None]:
    """While entered, on Google Cloud, a notice that this machine ends counts as SIGTERM.

    Args:
      stop: is called with SIGTERM then.
    """
    server = metadata_server() if enabled else None
    with MaintenanceNotice(server, stop).awaited() if server is not None else contextlib.nullcontext():
        yield
