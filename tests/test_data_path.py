"""The benchmark of the data path runs end to end at a toy size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "data_path.py"


@pytest.mark.full
@pytest.mark.parametrize(("consumed", "code", "verdict"), [("0.001", 0, "met"), ("1e9", 1, "MISSED")])
def test_it_reports_every_bar(tmp_path: Path, consumed: str, code: int, verdict: str) -> None:
    words = ["--rows", "700", "--num_proc", "2", "--pairs_per_second", consumed, "--out", str(tmp_path / "report.md")]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report.strip() == done.stdout.strip()
    assert report.startswith("# 700 rows through the data path")
    (line,) = [line for line in report.splitlines() if line.startswith("| loader over model")]
    assert line.endswith(f"| >= 20 | {verdict} |")
