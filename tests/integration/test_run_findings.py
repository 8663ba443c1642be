"""A run ends with what it found out about itself; another run of its kind reads the same from its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from jdpo.config import DPOConfig, load_config, to_public_yaml
from jdpo.reports.findings import findings_of
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.logs.facts_of_run import read_facts
from jdpo.training.run import train
from jdpo.training.run_record import RunRecord
from tests.run_stops import SignalAt

STILL = "The policy has hardly moved from the reference [learnt_nothing]"


def test_a_run_that_learns_nothing_says_so_before_it_is_done(
    run_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = run_words(max_steps=2, learning_rate=1e-12, max_grad_norm=1e-3)
    train(load_config(DPOConfig, None, words))
    logged = capsys.readouterr().err.splitlines()
    assert f"error: {STILL}" in logged
    assert logged[-1].startswith("done: ")
    run = tmp_path / "run"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["grad_clipped"] for line in lines] == [1.0] * 2

    facts = read_facts(run)
    assert facts.batch_parts == len(jax.devices())
    assert (facts.status, facts.step, facts.num_steps, facts.exported_step) == ("finished", 2, 2, 2)
    assert (facts.num_rows, facts.num_eval_rows, facts.losses) == (20, None, ("sigmoid",))
    assert facts.start_loss == pytest.approx(0.6931, abs=1e-4)
    assert "learnt_nothing" in {finding.key for finding in findings_of(lines, facts)}
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "**Error: The policy has hardly moved from the reference.**" in card


@pytest.mark.ci
def test_a_stopped_run_says_what_it_found_so_far(
    run_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At least half of the steps are made, so that they can be judged.
    words = run_words(max_steps=4, learning_rate=1e-12)
    assert train(load_config(DPOConfig, None, words), callbacks=[SignalAt(3)]).interrupted
    logged = capsys.readouterr().err.splitlines()
    # Not an error, as the run can go on.
    assert f"warning: {STILL}" in logged
    assert logged[-1].startswith("stopped by a signal")
    assert read_facts(tmp_path / "run").status == "stopped"


def test_a_folder_of_an_older_version_has_facts_too(run_words: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    load = load_config(DPOConfig, None, run_words(num_train_epochs=2))
    run.mkdir()
    (run / "resolved_config.yaml").write_text(to_public_yaml(load), encoding="utf-8")
    record = RunRecord(command="dpo", jdpo="0.1.0")
    record.write(run / "run.json")
    (run / "metrics.jsonl").write_text('{"step": 3, "epoch": 1.0, "loss": 0.7, "learning_rate": 0.1}\n')
    facts = read_facts(run)
    assert (facts.num_steps, facts.num_rows, facts.timing, facts.data) == (6, None, {}, None)
    dataclasses.replace(record, finished=True, results={"step": 6, "exported_step": 3}).write(run / "run.json")
    assert (read_facts(run).num_steps, read_facts(run).exported_step) == (6, 3)
    (run / "data.json").write_text("{half", encoding="utf-8")
    assert read_facts(run).data is None
    (run / "run.json").write_text('{"command": "x"}')
    with pytest.raises(ValueError, match="not written by a run of jdpo"):
        read_facts(run)
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match="cannot read"):
        read_facts(run)
