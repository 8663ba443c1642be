"""Google Cloud's notice that a machine ends, from a server that stands in for its metadata server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jdpo.processes.maintenance import MaintenanceNotice, metadata_server
from tests.processes.metadata_server import EVENT, PREEMPTED, Metadata, serving


class Stop:
    """Notes that it was called."""

    def __init__(self) -> None:
        self._called, self.signals = threading.Event(), list[int]()

    def __call__(self, signum: int) -> None:
        self.signals.append(signum)
        self._called.set()

    def wait(self) -> list[int]:
        self._called.wait(60)
        return self.signals


@pytest.fixture
def stop() -> Stop:
    return Stop()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with serving() as found:
        yield found


def notice_of(metadata: Metadata, stop: Stop) -> MaintenanceNotice:
    return MaintenanceNotice(metadata.address, stop)


@pytest.mark.parametrize(("path", "value"), [(PREEMPTED, "TRUE"), (EVENT, "TERMINATE_ON_HOST_MAINTENANCE")])
def test_the_notice_counts_as_sigterm(
    path: str, value: str, metadata: Metadata, stop: Stop, capfd: pytest.CaptureFixture[str]
) -> None:
    with notice_of(metadata, stop).awaited():
        metadata.wait_until_asked(path)
        assert not stop.signals
        metadata.set(path, value)
        assert stop.wait() == [signal.SIGTERM]
    assert f"announces {path} {value}" in capfd.readouterr().err


def test_a_migration_stops_nothing(metadata: Metadata, stop: Stop) -> None:
    with notice_of(metadata, stop).awaited():
        metadata.wait_until_asked(EVENT)
        metadata.set(EVENT, "MIGRATE_ON_HOST_MAINTENANCE")
        metadata.asked.clear()
        metadata.wait_until_asked(EVENT)
    assert not stop.signals


def test_a_machine_that_is_announced_to_end_already_is_used_while_it_lasts(
    metadata: Metadata, stop: Stop, capfd: pytest.CaptureFixture[str]
) -> None:
    metadata.values[EVENT] = "TERMINATE_ON_HOST_MAINTENANCE"
    with notice_of(metadata, stop).awaited():
        metadata.wait_until_asked(EVENT)
    assert not stop.signals
    assert "has announced" in capfd.readouterr().err


def test_a_value_that_a_server_does_not_have_is_not_asked_for_again(metadata: Metadata, stop: Stop) -> None:
    del metadata.values[EVENT]
    with notice_of(metadata, stop).awaited():
        metadata.wait_until_asked(PREEMPTED)
        metadata.set(PREEMPTED, "TRUE")
        assert stop.wait() == [signal.SIGTERM]
    assert [asked for asked in metadata.asked if asked.startswith(EVENT)] == [f"{EVENT} at once"]


def test_a_server_that_is_busy_is_asked_again(metadata: Metadata, stop: Stop) -> None:
    metadata.num_busy = 3
    with MaintenanceNotice(metadata.address, stop, retry_seconds=0.01).awaited():
        metadata.wait_until_asked(PREEMPTED)
        metadata.set(PREEMPTED, "TRUE")
        assert stop.wait() == [signal.SIGTERM]


def test_only_machines_of_google_cloud_have_a_metadata_server(tmp_path: Path) -> None:
    product = tmp_path / "product_name"
    assert metadata_server({}, product) is None, "no firmware"
    product.write_text("Standard PC (Q35)\n")
    assert metadata_server({}, product) is None
    product.write_text("Google Compute Engine\n")
    assert metadata_server({}, product) == "169.254.169.254"
    assert metadata_server({"GCE_METADATA_HOST": "127.0.0.1:80"}, product) == "127.0.0.1:80"
    assert metadata_server({"NO_GCE_CHECK": "true"}, product) is None
