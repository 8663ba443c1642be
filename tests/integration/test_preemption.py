"""A run on a machine of Google Cloud that is taken away saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.checkpoint.steps import complete_steps
from jdpo.exit_codes import PREEMPTED as PREEMPTED_CODE
from jdpo.reports.metrics_file import read_metrics
from tests.processes.metadata_server import PREEMPTED, serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ci
def test_a_notice_of_preemption_and_the_sigterm_after_it_save_once(
    run_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = run_words(output_dir=run, num_train_epochs=2000, save_steps=10**6)
    log = tmp_path / "log"
    with serving() as metadata, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "jdpo.cli.main", "dpo", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT), "GCE_METADATA_HOST": metadata.address},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + 300
            while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 3:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            metadata.set(PREEMPTED, "TRUE")
            # Google Cloud then shuts the machine down, which sends the signal itself.
            while "announces instance/preempted TRUE" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            process.kill()
            process.wait()
    assert code == PREEMPTED_CODE, log.read_text()
    assert len(complete_steps(run / "checkpoints")) == 1
