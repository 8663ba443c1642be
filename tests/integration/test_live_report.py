"""report.html and data.json of real runs: finished, stopped, failed at once, and one that cannot write its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.cli.main import main
from jdpo.reports.data_summary.run_data import is_run_data
from tests.html_page import HtmlPage

Words = Callable[..., list[str]]
Capture = pytest.CaptureFixture[str]


def text_of(page: Path) -> str:
    return HtmlPage(page.read_text(encoding="utf-8")).words


def test_a_run_leaves_its_page_and_the_summary_of_its_rows(uninterrupted: Path) -> None:
    text = text_of(uninterrupted / "report.html")
    assert "finished: 12 steps" in text
    assert "The run is finished" in text
    assert "training steps" in text  # where the time went
    data = json.loads((uninterrupted / "data.json").read_text(encoding="utf-8"))
    inputs = json.loads((uninterrupted / "run.json").read_text(encoding="utf-8"))["inputs"]
    assert data["train"]["digest"] == inputs["the training rows"]
    assert data["eval"]["digest"] == inputs["the evaluation rows"]
    assert data["train"]["rows_kept"] > data["eval"]["rows_kept"] > 0
    assert is_run_data(data)


def test_curves_begin_at_the_start(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:3]] == [0, 1, 3]
    assert lines[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert lines[1]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_a_stopped_run_says_so(stopped: Path) -> None:
    assert "stopped: step 9 of 12" in text_of(stopped / "report.html")


def test_a_run_that_fails_before_its_first_step_says_why(cut_words: Words, toy_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(toy_model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = cut_words(tmp_path / "run", model_name_or_path=broken)
    assert main(words) == 2
    text = text_of(tmp_path / "run" / "report.html")
    for phrase in ("failed: step 0 ValueError", "holds NaN or Inf", "No step is logged.", "Training rows"):
        assert phrase in text, phrase


def test_a_run_that_is_refused_says_why(cut_words: Words, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    assert main(cut_words(run, report_to="[tensorboard, nobody]")) == 2
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["ended"] == "failed"
    assert "nobody" in record["end_reason"]
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    assert "failed: step 0 ValueError" in text_of(tmp_path / "page.html")


def test_a_kill_before_the_last_page_is_mended_by_the_next_start(
    uninterrupted: Path, cut_words: Words, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    page = run / "report.html"
    words = cut_words(run)
    page.write_text(page.read_text().replace(": finished</title>", ": running</title>").replace("finished", "running"))
    assert main(words) == 0
    assert "finished: 12 steps" in text_of(page)
    written = page.stat().st_mtime_ns
    assert main(words) == 0
    assert page.stat().st_mtime_ns == written
    page.unlink()
    page.mkdir()
    capsys.readouterr()
    assert main(words) == 0  # a page that cannot be written is no reason to fail
    assert "the report of the run cannot be written" in "".join(capsys.readouterr())


@pytest.mark.ci
def test_a_run_whose_page_cannot_be_written_goes_on(copy: Path, cut_words: Words, capsys: Capture) -> None:
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()  # a page that cannot be written
    (copy / "report.html" / "in_the_way").touch()
    assert main(cut_words(copy)) == 0
    output = "".join(capsys.readouterr())
    assert output.count("the report of the run cannot be written") == 1
    record = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    assert record["finished"]
    assert "ended" not in record
    assert main(["report", str(copy), "--output", str(copy / "page.html")]) == 0
    assert "finished: 12 steps" in text_of(copy / "page.html")
