"""Servers that a command starts: awaited, and ended with everything that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from jdpo.generation.servers.server_process import running_server, server_words

SERVER = """
import http.server, subprocess, sys

worker = subprocess.Popen(["sleep", "1000"])
print("worker", worker.pid, "of", sys.argv[1], flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""

COMMAND = """
import sys, time
from pathlib import Path
from jdpo.generation.servers.server_process import running_server

folder = Path(sys.argv[1])
command = f"{sys.executable} {folder / 'server.py'} {{model}} {{port}}"
with running_server(command, model="toy", log_file=folder / "server.log"):
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def server(tmp_path: Path) -> str:
    (tmp_path / "server.py").write_text(SERVER)
    return f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"


def worker_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def is_running(pid: int) -> bool:
    try:
        # Nothing may wait for a process whose parent has ended: then it stays as a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_is_started_awaited_and_ended_with_its_workers(server: str, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    lines: list[str] = []
    with running_server(server, model="a model", log_file=log, log=lines.append) as url:
        urllib.request.urlopen(f"{url}/models").close()
        worker = worker_of(log)
        assert is_running(worker)
    assert not is_running(worker)
    assert "of a model" in log.read_text()
    assert "server.log" in lines[0]


def test_a_server_is_ended_after_an_error(server: str, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(ZeroDivisionError), running_server(server, model="toy", log_file=log):
        raise ZeroDivisionError
    assert not is_running(worker_of(log))


def test_a_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("of an earlier server\n")
    with (
        pytest.raises(OSError, match="exit code 3") as error,
        running_server("sh -c 'echo no memory: {port}; exit 3'", model="toy", log_file=log),
    ):
        raise AssertionError
    assert "no memory" in str(error.value)
    assert "earlier" not in str(error.value)


def test_a_server_that_does_not_respond_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(OSError, match=r"within 0\.2 seconds"),
        running_server("sh -c 'echo worker $$ {port}; exec sleep 1000'", model="toy", log_file=log, start_seconds=0.2),
    ):
        raise AssertionError
    assert not is_running(worker_of(log))


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("vllm serve", "{port}"),
        ("'vllm {port}", "cannot read"),
        ("A=1 vllm --port {port}", "env A="),
        ("no-such-program {port}", "cannot start"),
    ],
)
def test_commands_that_cannot_start_a_server(command: str, phrase: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=phrase),
        running_server(command, model="toy", log_file=tmp_path / "server.log"),
    ):
        raise AssertionError


def test_a_path_with_spaces_is_one_word() -> None:
    assert server_words("serve {model} --port={port}", model="a b'c", port=1) == ["serve", "a b'c", "--port=1"]


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_server_too(signum: signal.Signals, server: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", COMMAND, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
        worker = worker_of(tmp_path / "server.log")
        command.send_signal(signum)
        command.wait(30)
    ended = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}
    assert command.returncode == ended[signum]
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:  # the guard of a killed command takes a moment
        time.sleep(0.01)
    assert not is_running(worker)
    assert os.path.exists(tmp_path / "server.log")
