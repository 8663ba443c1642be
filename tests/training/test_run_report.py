"""The page of a run's folder, whatever state it is in, and what is no run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdpo.cli.main import main
from jdpo.config import CONFIGS, load_config
from jdpo.file_locks import lock_file
from jdpo.reports.data_summary.run_data import DATA_VERSION
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.finish import log_findings, outcome_at
from jdpo.training.pages.run_report import read_page_run, write_report
from jdpo.training.run_dir import RunDirectory
from tests.html_page import HtmlPage
from tests.reports.simulated_runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of 40 steps, without a model."""
    return write_run(tmp_path / "run")


def page_of(*words: str) -> str:
    assert main(["report", *words]) == 0
    page = Path(words[-1] if "--output" in words else f"{words[0]}/report.html").read_text(encoding="utf-8")
    return HtmlPage(page).words


def test_a_finished_run_has_a_page_in_its_folder(run: Path) -> None:
    text = page_of(str(run))
    for phrase in ("finished: 40 steps", "Held-out loss", "Reward margin", "Who?", "Me.", "resolved_config.yaml"):
        assert phrase in text, phrase
    assert "damaged" not in text
    assert "missing" not in text


@pytest.mark.ci
def test_a_page_needs_no_accelerator(run: Path) -> None:
    # As with one that another process holds: jax cannot open what it is told to use.
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from jdpo.cli.main import main; sys.exit(main())", "report", str(run)],
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "There is no verdict" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_tells_how_it_ended(tmp_path: Path) -> None:
    for ended, phrase in (
        ("stopped", "stopped: step 40"),
        (None, "not finished: step 40"),
        ("failed", "failed: step 40"),
    ):
        run = write_run(tmp_path / phrase[:4], finished=False, ended=ended)
        assert phrase in page_of(str(run))


def test_a_run_that_goes_on_is_known_by_its_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, ended=None)
    (run / ".lock").touch()
    lock = lock_file(run / ".lock")
    assert lock is not None
    with lock:  # as the run itself does while it goes on
        assert read_page_run(run, "run").status == "running"
        # How a run ended is in its files, and its lock is left alone.
        over = write_run(tmp_path / "over", finished=False, ended="failed")
        (over / ".lock").hardlink_to(run / ".lock")
        assert read_page_run(over, "run").status == "failed"
    assert read_page_run(run, "run").status == "unfinished"


def test_steps_without_lines_are_noted_once_there_are_checkpoints(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert read_page_run(run, "run").notes == []
    (run / "checkpoints" / "40").mkdir(parents=True)
    assert "metrics.jsonl is missing" in read_page_run(run, "run").notes[0]


def test_damaged_files_are_left_out_and_named(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')  # torn: the run writes it now
    (run / "samples.jsonl").unlink()
    whole = read_page_run(run, "run")
    assert whole.notes == []
    assert len(whole.lines) == 6
    (run / "metrics.jsonl").write_text("no json\n" + lines)
    (run / "run.json").write_text('{"command": 3, "inputs": 7}')
    (run / "samples.jsonl").write_text("[1]\n")
    (run / "data.json").write_text("{")
    found = read_page_run(run, "run")
    notes = " ".join(found.notes)
    for phrase in ("metrics.jsonl is damaged", "no verdict", "samples.jsonl is damaged", "data.json is damaged"):
        assert phrase in notes, phrase
    assert found.lines == whole.lines
    text = page_of(str(run))
    assert "data.json is damaged" in text
    assert "Reward margin" in text
    for name in ("run.json", "resolved_config.yaml"):
        (run / name).unlink()
    assert "resolved_config.yaml is missing" in page_of(str(run))


def test_files_of_another_structure_fail_nothing(run: Path) -> None:
    directory = RunDirectory(load_config(CONFIGS["dpo"], run / "resolved_config.yaml"), "dpo", only_read=True)

    def told() -> tuple[int, str]:
        """The number of sentences in the model card, and what the end of the run logs."""
        outcome = outcome_at(40, read_metrics(run / "metrics.jsonl"), run, "dpo", "rows")
        assert outcome.data is None
        assert outcome.results["loss"] < 1
        logged: list[str] = []
        log_findings(directory, "finished", 40, logged.append)
        return len(outcome.sentences), logged[0]

    for data in ([], {"version": 0}, {"version": DATA_VERSION, "train": {"answer_cut": 3}, "eval": None}):
        (run / "data.json").write_text(json.dumps(data))
        assert told()[0] == 3
        assert "data.json is damaged" in page_of(str(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {10**30}, "learning_rate": 1}}\n')  # more than int64 holds
    num_sentences, line = told()
    assert (num_sentences, line.partition(":")[0]) == (3, "note")
    assert "There is no verdict" in page_of(str(run))
    # A key that load_config would refuse.
    (run / "resolved_config.yaml").write_text("max_grad_norm: [1]\n")
    assert told()[0] == 0
    assert "There is no verdict" in page_of(str(run))


def test_runs_are_compared_under_different_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name / "dpo")
    text = page_of(str(tmp_path / "a/dpo"), str(tmp_path / "b/dpo"), "--output", str(tmp_path / "both.html"))
    assert "Comparison of 2 runs" in text
    assert "a/dpo" in text
    assert "b/dpo" in text


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model").mkdir()
    for path, phrases in {
        tmp_path / "absent": ["does not exist", "output_dir of a run"],
        run / "metrics.jsonl": ["is a file"],
        run / "model": ["part of a run", str(run)],
        tmp_path: ["Runs are in it", str(run)],
    }.items():
        assert main(["report", str(path)]) == 2
        message = capsys.readouterr().err
        for phrase in phrases:
            assert phrase in message
    assert main(["report", str(run), "--output", str(tmp_path / "page.pdf")]) == 2
    assert "ends in .html" in capsys.readouterr().err
    with pytest.raises(ValueError, match="given twice"):
        write_report([run, run], tmp_path / "page.html")
    with pytest.raises(ValueError, match="at most 8 runs"):
        write_report([run] * 9, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
