"""The three runs through the real trainer: their files, their refusals, and that frequency decides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jdpo.cli.commands.runs.quickstart import main, read_settings
from jdpo.quickstart.experiment import PRETRAIN, Workplace, prepare, probed_steps, run_all
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.results import all_results
from jdpo.quickstart.samples import ASKED

TINY = {
    "countries": 6,
    "hidden_size": 64,
    "num_layers": 2,
    "pretrain_steps": 80,
    "pretrain_batch_size": 64,
    "steps": 4,
    "batch_size": 8,
    "probes": 2,
}


def words(folder: Path, **values: object) -> list[str]:
    return [f"--{key}={value}" for key, value in {"output_dir": folder, **TINY, **values}.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete quickstart from the command line."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    assert main("quickstart", words(folder)) == 0
    return folder


def learnt(report: dict) -> np.ndarray:
    return np.array([report["frequencies"]["groups"][group]["learnt"] for group in ("well_known", "mistaken")])


@pytest.mark.ci
def test_frequencies_decide_what_is_learnt(finished: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    place = Workplace(tmp_path / "other")
    settings = Settings(**TINY | {"frequencies": (1, 2, 7), "steps": 1})
    prepare(place, settings)
    other = all_results(settings, run_all(place, settings, print).measurements)
    np.testing.assert_allclose(learnt(report), [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], atol=0.1)
    np.testing.assert_allclose(learnt(other), [[0.1, 0.2, 0.7], [0.2, 0.1, 0.7]], atol=0.1)


@pytest.mark.ci
def test_the_report_holds_settings_numbers_samples_and_sentences(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["settings"]["frequencies"] == [6, 3, 1]
    assert report["curves"]["dpo"]["step"] == [0, 2, 4]
    assert report["stages"]["dpo"]["ireland"]["odds"] > report["stages"]["before"]["ireland"]["odds"]
    for sampled in report["samples"]:
        assert {name: sum(answers.values()) for name, answers in sampled["answers"].items()} == {
            "pretrain": ASKED,
            "standard": ASKED,
            "dpo": ASKED,
        }
    text = (finished / "report.md").read_text()
    assert all(sentence in text for sentences in report["findings"].values() for sentence in sentences)


@pytest.mark.ci
def test_both_corrections_start_from_the_same_model(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    before = report["stages"]["before"]["ireland"]["right"]
    starts = [report["curves"][name]["ireland"]["right"][0] for name in ("standard", "dpo")]
    assert starts == pytest.approx([before, before], abs=1e-4)


@pytest.mark.ci
def test_again_is_the_same_report_without_training(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "report.json").read_bytes()
    weights = finished / "runs" / "dpo" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (finished / "report.json").unlink()
    assert main("quickstart", words(finished)) == 0
    assert (finished / "report.json").read_bytes() == before
    assert weights.stat().st_mtime_ns == written
    assert "What frequency taught" in capsys.readouterr().out


@pytest.mark.ci
def test_a_run_whose_measurements_were_deleted_is_run_again(finished: Path) -> None:
    before = (finished / "report.json").read_bytes()
    (finished / "probes" / "dpo.jsonl").unlink()
    assert main("quickstart", words(finished)) == 0
    assert (finished / "report.json").read_bytes() == before


@pytest.mark.ci
def test_other_settings_in_the_same_folder_are_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"frequencies \[6, 3, 1\] \(now \[5, 4, 1\]\).*another --output_dir"):
        main("quickstart", words(finished, frequencies="5,4,1"))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex and is not a quickstart"):
        main("quickstart", words(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_preparation_cut_short_starts_over(tmp_path: Path) -> None:
    place, settings = Workplace(tmp_path / "out"), Settings(**TINY)
    prepare(place, settings)
    corpus = place.corpus.read_bytes()
    place.settings.unlink()
    place.corpus.write_text("{torn")
    prepare(place, settings)
    assert place.corpus.read_bytes() == corpus
    assert json.loads(place.settings.read_text())["countries"] == 6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--frequencies=6,3", "three positive whole numbers"),
        ("--frequencies=6,3,0", "three positive whole numbers"),
        ("--frequencies=many", "three whole numbers"),
        ("--countries=3", "choose from 6 to 48"),
        ("--steps=0", "steps is 0"),
        ("--steps=some", "steps is 'some': a whole number is expected"),
        ("--frequency=6,3,1", "unknown key 'frequency'; did you mean 'frequencies'"),
    ],
)
def test_bad_settings_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings([word])


def test_help_names_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("quickstart", ["--help"]) == 0
    text = capsys.readouterr().out
    assert "(default: 6,3,1)" in text
    for key in Settings.__dataclass_fields__:
        assert f"--{key} " in text


def test_first_and_last_step_are_always_probed() -> None:
    assert probed_steps(7, 3) == [0, 2, 4, 6, 7]
    assert probed_steps(1, 20) == [0, 1]


@pytest.mark.full
def test_a_killed_quickstart_ends_with_the_same_report(finished: Path, tmp_path: Path) -> None:
    expected = json.loads((finished / "report.json").read_text())
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "jdpo.cli.main", "quickstart", *words(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for name, lines in ((PRETRAIN, 2), ("standard", 1), ("dpo", 2)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        probes = Workplace(folder).probes(name)
        deadline = time.monotonic() + 300
        while not (probes.exists() and len(probes.read_text().splitlines()) >= lines):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0
    assert json.loads((folder / "report.json").read_text()) == expected
