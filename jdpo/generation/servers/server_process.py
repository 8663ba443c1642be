"""A server that a command starts, waits for, and ends, whatever ends the command."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from jdpo.durable import naming
from jdpo.safe_text import terminal, terminal_lines

START_SECONDS = 1800.0
"""Default time for a server to start: large models are downloaded, loaded and compiled first."""

_GRACE_SECONDS = 15.0
"""Time for the server to end by itself after SIGTERM."""
_POLL_SECONDS = 0.05
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_SECRET = {"key", "token", "secret", "password"}
"""Parts of the names of options and variables whose values are not shown."""
_LAST_LINES = 15
_LAST_BYTES = 8192

_GUARD = """
if ! read -r line; then
  kill -s TERM -- -"$1" 2>/dev/null && sleep 15 && kill -s KILL -- -"$1" 2>/dev/null
fi
"""
"""A shell script that ends a process group when its standard input closes without a line."""


@contextlib.contextmanager
def running_server(
    command: str,
    *,
    model: str,
    log_file: Path,
    start_seconds: float = START_SECONDS,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Starts a server in a process group of its own and yields its address once it lists its models.

    The whole group is ended when the block ends: by an error, Ctrl-C, SIGTERM and SIGHUP as well. If this process is
    killed, a guard process ends the group.

    Args:
      command: words as in a shell, in which {model} and {port} are replaced; no shell reads them.
      model: replaces {model}.
      log_file: the server's output is appended to it.
      start_seconds: time for the server to start.
      log: is called with sentences on what happens.

    Raises:
      ValueError: the command lacks {port}, or its program does not exist.
      OSError: the server ended before it responded, or did not respond in time; the message has the end of its log.
    """
    port = _free_port()
    words = server_words(command, model=model, port=port)
    url = f"http://localhost:{port}/v1"
    with naming(log_file), log_file.open("ab") as output:
        start = output.tell()
        with _raising_on_signals(), _group(words, output) as process:
            log(f"server: started `{shown_command(words)}` (process {process.pid}); its log is {log_file}")
            _wait_for(process, url, start_seconds, lambda: _last_lines(log_file, start))
            log(f"server: responds at {url}")
            try:
                yield url
            except ConnectionError as error:
                if process.poll() is None:
                    raise
                raise ConnectionError(
                    f"{error}\nthe server {_how_it_ended(process)}; {_last_lines(log_file, start)}"
                ) from error
            finally:
                log("server: ending it")


def server_words(command: str, *, model: str, port: int) -> list[str]:
    """Returns the words of a command line, in which {model} and {port} are replaced.

    Raises:
      ValueError: the command has no {port}, or cannot be read.

    >>> server_words("vllm serve {model} --port {port}", model="my model", port=8000)
    ['vllm', 'serve', 'my model', '--port', '8000']
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--serve: cannot read the command as words of a shell: {error}") from None
    if not any("{port}" in word for word in words):
        raise ValueError(
            f"--serve: expected a command with {{port}}, such as 'vllm serve {{model}} --port {{port}}', found "
            f"{shown_command(words)!r}"
        )
    if "=" in words[0]:
        name = terminal(words[0].partition("=")[0])
        raise ValueError(f"--serve: no shell reads the command; write `env {name}=.. PROGRAM ..`")
    # Replaced in words, so that a path with spaces stays one word.
    return [word.replace("{model}", model).replace("{port}", str(port)) for word in words]


def shown_command(words: Sequence[str]) -> str:
    """Returns a command line for messages and files, without the values of options and variables that are secret.

    >>> shown_command(["env", "HF_TOKEN=hf_0", "serve", "--api-key", "s3", "--key=s", "--max-num-batched-tokens", "64"])
    'env HF_TOKEN=*** serve --api-key *** --key=*** --max-num-batched-tokens 64'
    """
    shown: list[str] = []
    hidden = False  # whether this word is the value of the option before it
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = not _SECRET.isdisjoint(re.split("[-_]", name.lower()))
        shown.append("***" if hidden else f"{name}=***" if is_secret and equals else word)
        hidden = is_secret and not equals and word.startswith("-")
    # Only what would be read as several words or none is quoted, so that stars and braces stay as they are.
    return terminal(" ".join(word if re.fullmatch(r"[^\s'\"]+", word) else shlex.quote(word) for word in shown))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Turns signals that would end this process at once into SystemExit, so that blocks are left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; the guard does the rest
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        # Once is enough: a second signal must not interrupt the ending of the server.
        for each in _ENDING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = {each: signal.signal(each, leave) for each in _ENDING_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _group(words: list[str], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process as the leader of a new group, which is ended with the block."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C in the terminal reaches this process only, which ends the server in order.
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"--serve: cannot start {terminal(words[0])!r}: {error.strerror}") from None
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            _end_group(process)
        finally:
            guard.communicate(b"ended\n")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of a group: in order, and by force those that do not."""
    try:
        if _signal_group(process, signal.SIGTERM):
            deadline = time.monotonic() + _GRACE_SECONDS
            # The leader may end before its workers, which hold the accelerators.
            while _signal_group(process, 0) and time.monotonic() < deadline:
                process.poll()  # an ended leader counts as a process until it is waited for
                time.sleep(_POLL_SECONDS)
    finally:  # also after a second Ctrl-C
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> bool:
    """Returns False if the group has no processes."""
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return False
    return True


def _wait_for(process: subprocess.Popen[bytes], url: str, start_seconds: float, last_lines: Callable[[], str]) -> None:
    deadline = time.monotonic() + start_seconds
    while not _responds(url):
        if process.poll() is not None:
            raise OSError(f"the server {_how_it_ended(process)} before it responded; {last_lines()}")
        if time.monotonic() > deadline:
            raise OSError(f"the server did not list its models within {start_seconds:g} seconds; {last_lines()}")
        time.sleep(_POLL_SECONDS)
    if process.poll() is not None:
        raise OSError(f"the server {_how_it_ended(process)}, and another one responds at {url}; {last_lines()}")


def _responds(url: str) -> bool:
    # Proxies of the environment are for other machines.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/models", timeout=5) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        # It asks for the API key, which this probe does not send.
        return error.code in (401, 403)
    except (OSError, ValueError):
        return False


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_lines(path: Path, start: int) -> str:
    """Returns the last lines of a log after `start` bytes."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - _LAST_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()[-_LAST_LINES:]
    if not lines:
        return f"its log {path} is empty"
    return "\n".join([f"the last lines of its log {path}:", *(f"  {terminal_lines(line)}" for line in lines)])
