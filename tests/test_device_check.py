"""The check of an accelerator, on the CPU at toy sizes; and its bookkeeping of failures, time and results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/device_check"
sys.path[:0] = [str(SCRIPT), str(SCRIPT.parents[1] / "benchmarks")]

from check_summary import failures, summary  # noqa: E402
from parity_part import BARS, differences  # noqa: E402
from part_process import environment, run_process  # noqa: E402
from part_table import PARTS  # noqa: E402
from part_worker import check_platform  # noqa: E402

from jdpo.chips import GPU_POOL  # noqa: E402
from jdpo.cli.gpu_pool import OWN_SETTINGS, VARIABLE  # noqa: E402

BY_NAME = {part.name: part for part in PARTS}
STEP = {"loss": 0.5, "logps/chosen": -10.0, "logps/rejected": -20.0}


def run_script(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    # One CPU device: collectives of eight fake ones end the process where a machine is too busy to run them all.
    environment = {name: value for name, value in os.environ.items() if name not in ("OUT", "XLA_FLAGS")}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# --- the whole script


@pytest.mark.ci
def test_the_whole_check_on_the_cpu_with_a_part_that_fails(tmp_path: Path) -> None:
    done = run_script("--tiny", "--on", "cpu", "--out", tmp_path, "--budget", "3000", "--lora_model", tmp_path / "none")
    results = {part.name: json.loads((tmp_path / f"{part.name}.json").read_text()) for part in PARTS}
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: lora" in done.stdout.splitlines()[-1], done.stdout
    # The part that failed is recorded with its error, and kept none of the others from running.
    lora = results.pop("lora")
    assert lora["status"] == "failed"
    assert "expected a folder with a config.json" in lora["reason"]
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(results, "done")
    assert all(passed for result in results.values() for passed in result.get("checks", {}).values())
    assert set(results["parity"]["checks"]) == {f"{dtype} {what}" for dtype, bars in BARS.items() for what in bars}
    assert results["resume"]["stopped_at"] == 4
    assert results["resume"]["losses"]["resumed"] == results["resume"]["losses"]["uninterrupted"]
    cases = results["full"]["cases"]
    assert [case["rows"] for case in cases] == ["512/300/300", "hh", "512/300/300"]
    assert results["full"]["checks"] == {
        "kernels 512/300/300": True,
        "kernels hh": True,
        "hh runs": True,
        "512/300/300 runs": True,
    }
    for case in [*cases, *results["compare"]["cases"]]:
        seconds = case["step_seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert case["reckoned_bytes"] > 0
        assert case["attention"] == case["attention_expected"] == ["blockwise"]
        assert 0 <= case["padding"] < 1
    page = (tmp_path / "summary.md").read_text()
    assert "| lora | failed: " in page
    assert "## full: tiny" in page
    assert "chunks of 1,024" in page


def test_no_part_is_started_when_the_budget_is_used_up(tmp_path: Path) -> None:
    done = run_script("--tiny", "--on", "cpu", "--out", tmp_path, "--budget", "0", "--parts", "parity", "full")
    assert done.returncode == 1
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["full.json", "machine.json", "parity.json"]
    assert json.loads((tmp_path / "parity.json").read_text())["status"] == "not started"
    assert "| parity | not started: 0 s of the budget were left |" in (tmp_path / "summary.md").read_text()


def test_a_cpu_does_not_pass_for_the_gpu_that_is_missing(tmp_path: Path) -> None:
    done = run_script("--tiny", "--on", "gpu", "--out", tmp_path, "--parts", "machine")
    assert done.returncode == 1
    assert "failed: machine" in done.stdout
    # JAX may refuse to start without a GPU, or take the CPU.
    assert json.loads((tmp_path / "machine.json").read_text())["status"] == "failed"
    with pytest.raises(ValueError, match="an accelerator"):
        check_platform(None, tiny=False)
    check_platform(None, tiny=True)
    check_platform("cpu", tiny=False)


def test_a_users_own_share_of_a_gpus_memory_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert environment("gpu")[VARIABLE] == str(GPU_POOL)
    # JAX does not start with both names of the variable.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert VARIABLE not in environment("gpu")


# --- processes


def test_a_process_that_takes_too_long_is_ended_with_its_own_processes(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    slow = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    log = tmp_path / "log"
    assert run_process(["-c", slow], log=log, seconds=1.0, environment=environment("cpu"), in_group=True) is None
    assert run_process(["-c", "import time; time.sleep(1)"], log=log, seconds=9, environment={}) == 0
    assert not alive.exists()


def test_progress_is_passed_on_and_everything_is_logged(tmp_path: Path) -> None:
    said: list[str] = []
    words = ["-c", "import sys; print('> half'); print('quiet'); sys.exit('broken')"]
    assert run_process(words, log=tmp_path / "log", seconds=30, environment=environment("cpu"), say=said.append) == 1
    assert said == ["  half"]
    assert {"> half", "quiet", "broken"} == set((tmp_path / "log").read_text().splitlines())


def test_a_platform_is_asked_for_by_the_name_that_jax_takes() -> None:
    assert environment("gpu")["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment("tpu", XLA_FLAGS="--x")["XLA_FLAGS"] == "--x"
    assert environment(None).get("JAX_PLATFORMS") == os.environ.get("JAX_PLATFORMS")


# --- results


def test_differences_are_relative_and_those_of_the_first_step_are_apart() -> None:
    later = STEP | {"loss": 0.55, "logps/chosen": -10.1}
    assert differences([STEP, later], [STEP, STEP]) == pytest.approx({"first": 0, "loss": 0.1, "logps": 0.01})
    assert differences([STEP | {"logps/rejected": -21.0}], [STEP])["first"] == pytest.approx(0.05)


@pytest.mark.parametrize("found", [[], [STEP | {"loss": float("nan"), "logps/chosen": float("nan")}]])
def test_a_missing_step_and_what_is_no_number_are_infinitely_far(found: list[dict[str, Any]]) -> None:
    apart = differences(found, [STEP])
    assert apart["loss"] == apart["logps"] == float("inf")


def test_what_counts_as_a_failure() -> None:
    done: dict[str, Any] = {"status": "done"}
    parts = [BY_NAME[name] for name in ("machine", "parity", "compare")]

    def failed(**changes: dict[str, Any]) -> list[str]:
        results = {"machine": done, "parity": {**done, "checks": {"float32": True}}, "compare": done}
        return failures(parts, results | changes)

    assert failed() == []
    assert failed(parity={**done, "checks": {"float32": False}}) == ["parity"]
    assert failed(parity={"status": "stopped", "reason": "after 9 s"}) == ["parity"]
    # A variant that was left out is no failure.
    assert failed(compare={"status": "not started", "reason": "no time"}) == []


def test_the_summary_shows_what_a_case_failed_of_and_escapes_tables() -> None:
    results = {
        "machine": {"status": "done", "device_kind": "TPU v5 lite", "num_devices": 8, "matmul_tflops": 180.0},
        "full": {
            "status": "failed",
            "reason": "a | b",
            "model": "Qwen2.5-1.5B",
            "cases": [{"rows": "hh", "variant": "", "error": "too | little"}],
            "checks": {"kernels hh": False},
        },
    }
    page = summary([BY_NAME["machine"], BY_NAME["full"], BY_NAME["lora"]], results, command="--on tpu")
    assert page.startswith("# Device check: 8 x TPU v5 lite\n")
    assert "| full | failed: a / b | kernels hh: FAILED |" in page
    assert "| hh |  | failed: too / little |" in page
    assert "| lora | not started | |" in page
