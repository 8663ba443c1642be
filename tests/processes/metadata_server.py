"""A server that stands in for the metadata server of Google Cloud."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PREEMPTED, EVENT = "instance/preempted", "instance/maintenance-event"


class Metadata:
    """Values of a machine; `wait_for_change` waits as on Google Cloud."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        self.changed = threading.Condition()
        self.asked: list[str] = []
        self.number = 0
        self.num_busy = 0  # requests that are still answered with 503
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def set(self, path: str, value: str) -> None:
        with self.changed:
            self.values[path], self.number = value, self.number + 1
            self.changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                path, query = parts.path.removeprefix("/computeMetadata/v1/"), parse_qs(parts.query)
                with metadata.changed:
                    metadata.asked.append(path if query else f"{path} at once")
                    metadata.changed.notify_all()
                    busy, metadata.num_busy = metadata.num_busy > 0, max(0, metadata.num_busy - 1)
                    if query and not busy:
                        last = query["last_etag"][0]
                        metadata.changed.wait_for(lambda: f"{path}{metadata.values.get(path)}" != last, 60)
                    value = metadata.values.get(path)
                known = value is not None and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(503 if busy else 200 if known else 404)
                self.send_header("ETag", f"{path}{value}")
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def wait_until_asked(self, text: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.asked, 60), self.asked


@contextlib.contextmanager
def serving() -> Iterator[Metadata]:
    """Yields the metadata of a machine that is not going to end, while they are served."""
    found = Metadata({PREEMPTED: "FALSE", EVENT: "NONE"})
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        for path in list(found.values):  # requests that still wait are answered
            found.set(path, "the end")
        found.server.shutdown()
        thread.join()
        found.server.server_close()
