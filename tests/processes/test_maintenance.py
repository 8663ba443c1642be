"""Google Cloud's notice that a machine ends, from a server that stands in for its metadata server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from jdpo.processes.maintenance import MaintenanceNotice, metadata_server

PREEMPTED, EVENT = "instance/preempted", "instance/maintenance-event"


class Metadata:
    """Values of a machine; `wait_for_change` waits as on Google Cloud."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        self.changed = threading.Condition()
        self.asked: list[str] = []
        self.number = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

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
                    if query:
                        last = query["last_etag"][0]
                        metadata.changed.wait_for(lambda: f"{path}{metadata.values.get(path)}" != last, 60)
                    value = metadata.values.get(path)
                known = value is not None and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if known else 404)
                self.send_header("ETag", f"{path}{value}")
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def wait_until_asked(self, text: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.asked, 60), self.asked


@pytest.fixture
def signals() -> Iterator[threading.Event]:
    """Is set once this process gets SIGTERM."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    yield came
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    found = Metadata({PREEMPTED: "FALSE", EVENT: "NONE"})
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.set("the end", "")  # lets requests that still wait look again
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def notice_of(metadata: Metadata) -> MaintenanceNotice:
    return MaintenanceNotice(f"127.0.0.1:{metadata.server.server_address[1]}")


@pytest.mark.parametrize(("path", "value"), [(PREEMPTED, "TRUE"), (EVENT, "TERMINATE_ON_HOST_MAINTENANCE")])
def test_the_notice_counts_as_sigterm(
    path: str, value: str, metadata: Metadata, signals: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    with notice_of(metadata).awaited():
        metadata.wait_until_asked(path)
        assert not signals.is_set()
        metadata.set(path, value)
        assert signals.wait(60)
    metadata.values |= {PREEMPTED: "changed", EVENT: "changed"}
    assert f"announces {path} {value}" in capfd.readouterr().err


def test_a_migration_stops_nothing(metadata: Metadata, signals: threading.Event) -> None:
    with notice_of(metadata).awaited():
        metadata.wait_until_asked(EVENT)
        metadata.set(EVENT, "MIGRATE_ON_HOST_MAINTENANCE")
        metadata.asked.clear()
        metadata.wait_until_asked(EVENT)
    metadata.values |= {PREEMPTED: "changed", EVENT: "changed"}
    assert not signals.is_set()


def test_a_machine_that_is_announced_to_end_already_is_used_while_it_lasts(
    metadata: Metadata, signals: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    metadata.values[EVENT] = "TERMINATE_ON_HOST_MAINTENANCE"
    with notice_of(metadata).awaited():
        metadata.wait_until_asked(EVENT)
    metadata.values |= {PREEMPTED: "changed", EVENT: "changed"}
    assert not signals.is_set()
    assert "has announced" in capfd.readouterr().err


def test_a_value_that_a_server_does_not_have_is_not_asked_for_again(
    metadata: Metadata, signals: threading.Event
) -> None:
    del metadata.values[EVENT]
    with notice_of(metadata).awaited():
        metadata.wait_until_asked(PREEMPTED)
        metadata.set(PREEMPTED, "TRUE")
        assert signals.wait(60)
    assert [asked for asked in metadata.asked if asked.startswith(EVENT)] == [f"{EVENT} at once"]


def test_only_machines_of_google_cloud_have_a_metadata_server(tmp_path: Path) -> None:
    product = tmp_path / "product_name"
    assert metadata_server({}, product) is None, "no firmware"
    product.write_text("Standard PC (Q35)\n")
    assert metadata_server({}, product) is None
    product.write_text("Google Compute Engine\n")
    assert metadata_server({}, product) == "169.254.169.254"
    assert metadata_server({"GCE_METADATA_HOST": "127.0.0.1:80"}, product) == "127.0.0.1:80"
    assert metadata_server({"NO_GCE_CHECK": "true"}, product) is None
