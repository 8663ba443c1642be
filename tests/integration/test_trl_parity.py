"""`jdpo dpo` against what TRL's DPOTrainer logged on the same model and rows (tests/golden/trl_dpo)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jdpo.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trl_dpo"

TOLERANCES = {"loss": 3e-5, "grad_norm": 3e-5, "logps/chosen": 1e-6, "logps/rejected": 1e-6}
"""Tighter than the benchmark's 1e-3: TRL in float32 and in float64 differ here by 1e-5, in log-probs by 2e-7."""


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The benchmark's own rules of comparison, so that test and benchmark agree."""
    spec = importlib.util.spec_from_file_location("trl_parity", ROOT / "benchmarks" / "trl_parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """TRL's trace and its settings."""
    trace: dict[str, Any] = json.loads((GOLDEN / "trace.json").read_text(encoding="utf-8"))
    return trace


@pytest.fixture(scope="module")
def metrics(
    golden: dict[str, Any], parity: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """The steps logged by `jdpo dpo` on the golden model and rows, on a mesh that splits along every axis."""
    out = tmp_path_factory.mktemp("trl_parity")
    settings = golden["settings"]
    arguments = {
        "model_name_or_path": GOLDEN / "model",
        "datasets": GOLDEN / "rows.jsonl",
        "output_dir": out / "run",
        "cache_dir": out / "cache",
        "max_length": settings["max_length"],
        "global_batch_size": settings["batch"],
        "max_steps": settings["steps"],
        "shuffle": "false",
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "beta": settings["beta"],
        "compute_dtype": "float32",
        "logging_steps": 1,
        **{f"mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")},
    }
    assert main(["dpo", *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))]) == 0
    return parity.read_metrics(out / "run" / "metrics.jsonl")


def test_rows_are_trls_token_for_token(golden: dict[str, Any], parity: ModuleType, tmp_path: Path) -> None:
    """Keeps, splits and cuts the same rows as TRL's collator fed to its model."""
    found = parity.tokenized_rows(GOLDEN / "rows.jsonl", GOLDEN / "model", tmp_path, golden["settings"]["max_length"])
    assert len(found) == 46
    parity.compare_tokens(GOLDEN / "tokens.jsonl", found)


def test_every_metric_of_every_step_is_trls(
    golden: dict[str, Any], metrics: list[dict[str, float]], parity: ModuleType
) -> None:
    """Compares loss and gradient norm to 3e-5 over ten AdamW steps, log-probs to 1e-6, all else to 1e-3."""
    differences = parity.compare(golden["steps"], metrics, beta=golden["settings"]["beta"])
    too_far = {
        (step["step"], name): value
        for step, row in zip(golden["steps"], differences, strict=True)
        for name, value in row.items()
        if not value <= TOLERANCES.get(name, parity.TOLERANCE)
    }
    assert not too_far


def test_the_golden_trace_leaves_its_start(golden: dict[str, Any], parity: ModuleType) -> None:
    """Any two trainers agree at ln 2, so the trace must leave it for the comparison to mean anything."""
    assert len(golden["steps"]) == 10
    assert parity.moved(golden["steps"]) >= parity.MIN_MOVE


@pytest.mark.torch
def test_the_golden_folder_is_what_the_installed_trl_does(
    golden: dict[str, Any], parity: ModuleType, tmp_path: Path
) -> None:
    """Runs the generator with the installed TRL, which must give the committed rows, tokens and trace."""
    subprocess.run([sys.executable, ROOT / "scripts" / "make_golden_trl.py", "--out", tmp_path], check=True)
    for name in ("rows.jsonl", "tokens.jsonl", "model/config.json", "model/chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    today = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert today["settings"] == golden["settings"]
    differences = parity.compare(golden["steps"], today["steps"], beta=golden["settings"]["beta"])
    assert parity.largest(differences) <= parity.TOLERANCE


def test_a_reference_off_by_a_little_is_seen(golden: dict[str, Any], parity: ModuleType) -> None:
    """Changes one metric by 0.2 % at one step, and a first reward beyond rounding; the comparison must notice."""
    for name, change in (
        ("loss", 1.002),
        ("grad_norm", 0.998),
        ("logps/chosen", 1.002),
        ("rewards/margins", 1.002),
    ):
        found = [dict(step) for step in golden["steps"]]
        found[6][name] *= change
        assert parity.largest(parity.compare(golden["steps"], found, beta=0.1)) > parity.TOLERANCE
    found = [dict(step) for step in golden["steps"]]
    found[0]["rewards/chosen"] = 1e-4
    assert parity.largest(parity.compare(golden["steps"], found, beta=0.1)) > parity.TOLERANCE
