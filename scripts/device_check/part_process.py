"""Runs a part in a process of its own, which keeps its failure, its memory and its flags to itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jdpo.chips import GPU_POOL
from jdpo.cli.gpu_pool import OWN_SETTINGS, VARIABLE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

MOST_LINES = 25
"""Lines at the end of its output that are kept of a part that failed."""


POLL_SECONDS = 0.2


class Limits(NamedTuple):
    """The seconds that a part may take, and the platform that it must run on, or None."""

    seconds: float
    platform: str | None


def run_part(name: str, request: Mapping[str, Any], limits: Limits, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a part; returns its result with `status`: "done", or "failed" or "stopped" with a `reason`.

    What a part had saved before it failed or was stopped is in the result as well.

    Args:
      request: settings and earlier results.
      say: takes lines of progress.
    """
    with tempfile.TemporaryDirectory(prefix="jdpo-device-check-") as scratch:
        folder = Path(scratch)
        (folder / "request.json").write_text(json.dumps({**request, "scratch": scratch}), encoding="utf-8")
        log = folder / "log.txt"
        code = run_process(
            [str(HERE / "part_worker.py"), name, scratch],
            log=log,
            seconds=limits.seconds,
            environment=environment(limits.platform),
            say=say,
            in_group=True,
        )
        saved = folder / "result.json"
        result: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        if code == 0:
            return {"status": "done", **result}
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_LINES:]
        last = next((line for line in reversed(printed) if line.strip()), "no output")
        status, reason = ("stopped", f"after {limits.seconds:.0f} s") if code is None else ("failed", last)
        return {**result, "status": status, "reason": reason, "output": printed}


def run_process(
    words: Sequence[str],
    *,
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    say: Callable[[str], None] = lambda line: None,
    in_group: bool = False,
) -> int | None:
    """Runs Python with these words; returns its exit code, or None if it took too long and was ended.

    Its output goes to `log`; lines of it that start with "> " are passed on at once.

    Args:
      in_group: the processes that it starts are ended with it. False where this process is in such a group itself.
    """
    ends = time.monotonic() + seconds
    with log.open("w", encoding="utf-8") as written, log.open(encoding="utf-8", errors="replace") as lines:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=written,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=in_group,
        )
        try:
            while (code := process.poll()) is None and time.monotonic() < ends:
                time.sleep(POLL_SECONDS)
                _pass_on(lines, say)
            _pass_on(lines, say)
            return code
        finally:
            with contextlib.suppress(ProcessLookupError):
                if in_group:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()


def _pass_on(lines: TextIO, say: Callable[[str], None]) -> None:
    """Passes on the lines of progress that are new, and whole."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        if line.startswith("> "):
            say(f"  {line[2:].rstrip()}")


def environment(platform: str | None, **more: str) -> dict[str, str]:
    """Returns the environment of a process on a platform: this checkout's jdpo, offline."""
    # gpu is jax's name of a platform, cuda the one that JAX_PLATFORMS takes; the host's own devices stay at hand.
    names = {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}
    chosen = {} if platform is None else {"JAX_PLATFORMS": names[platform]}
    paths = os.pathsep.join(str(path) for path in (ROOT, HERE, ROOT / "benchmarks"))
    if os.environ.get("PYTHONPATH"):
        paths += os.pathsep + os.environ["PYTHONPATH"]
    given = {
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # As `jdpo` sets it where it starts jax itself; a user's own settings win.
    if not any(os.environ.get(name) for name in OWN_SETTINGS):
        given[VARIABLE] = str(GPU_POOL)
    return {**os.environ, **given, **chosen, **more}
