"""Full disks, missing memory and Ctrl-C while a command starts: one line each."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdpo.checkpoint.steps import MANIFEST
from jdpo.cli.commands.runs.train import interrupted
from jdpo.cli.failures import explain_failure
from jdpo.config import OutputSettings
from jdpo.durable import write_durably
from jdpo.reports.writers import JsonlWriter


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_is_one_line_with_the_file(number: int) -> None:
    shown = explain_failure(OSError(number, os.strerror(number), "/data/run/metrics.jsonl"))
    assert shown is not None
    assert shown.startswith("cannot write /data/run/metrics.jsonl: ")
    assert "Free some space" in shown
    assert "\n" not in shown


def test_a_full_disk_is_known_by_its_words_too() -> None:
    shown = explain_failure(RuntimeError("I/O error: No space left on device (os error 28)\nmore"))
    assert shown is not None
    assert shown.startswith("the disk is full (I/O error: No space left on device (os error 28)). Free")
    own = OSError("the checkpoint of step 2 could not be written to x: No space left on device. Free space there")
    assert explain_failure(own) == str(own)


def test_a_second_ctrl_c_names_the_last_checkpoint(tmp_path: Path) -> None:
    run = OutputSettings(output_dir=str(tmp_path))
    assert "there is no checkpoint" in interrupted(run)
    for step in (3, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / MANIFEST).write_text(json.dumps({"step": step, "files": {}}))
    assert f"the last checkpoint is step 10 in {tmp_path / 'checkpoints'}" in interrupted(run)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_missing_memory_names_what_may_limit_it(error: Exception) -> None:
    assert "ulimit -v" in str(explain_failure(error))


def test_other_errors_are_left_alone() -> None:
    assert explain_failure(RuntimeError("something else")) is None
    assert explain_failure(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = JsonlWriter(path)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        writer.write({"step": 1})
    writer.close()
    (tmp_path / "run.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"):
        write_durably(tmp_path / "run.json", "x")


IMPORTING = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: background jobs ignore it
from jdpo.cli import main as command
pathlib.Path(sys.argv[1]).write_text("import os, signal\\nos.kill(os.getpid(), signal.SIGINT)\\n")
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
command.COMMANDS["dpo"] = ("interrupts_itself", "")
sys.argv = ["jdpo", "dpo"]
sys.exit(command.main())
"""


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(tmp_path / "interrupts_itself.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (130, "jdpo: interrupted\n")
