"""Steps planned from config.json alone, compiled for eight CPU devices, and for a TPU and a GPU where that works."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from aot import layers, lengths_of, measured_before, read_config, use_code  # noqa: E402
from aot_programs import PROGRAMS, command, table  # noqa: E402

from jdpo.config import CONFIGS, load_config  # noqa: E402
from jdpo.planning.compile_only import missing_package  # noqa: E402
from jdpo.planning.hlo.hlo_text import parse  # noqa: E402
from jdpo.planning.machines import machine_of  # noqa: E402
from jdpo.planning.planned_step import PlannedStep, plan_step  # noqa: E402
from jdpo.planning.roofline import Roofline, Speeds  # noqa: E402
from jdpo.training.fit.estimates import estimate_step  # noqa: E402

SHAPES = ROOT / "benchmarks" / "shapes"


def planned(
    tmp_path: Path, *words: str, lengths: Any = (16, 24, 24), command: str = "dpo", memory: float = math.inf
) -> PlannedStep:
    """The step of a Llama with two layers whose folder holds nothing except config.json."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 128}
            | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu"}
            | sizes
        )
    )
    usual = ["compute_dtype=float32", "max_length=64", "global_batch_size=8", "remat=none", "reference=cached"]
    if command == "sft":
        usual.remove("reference=cached")
    keys = [f"model_name_or_path={tmp_path}", "datasets=x", "output_dir=x", *usual, *words]
    config = load_config(CONFIGS[command], None, keys)
    rows = lengths if isinstance(lengths, list) else [lengths]
    return plan_step(config, jax.devices(), rows, num_layers=2, platform="cpu", memory=memory)


def roofline_of(step: PlannedStep) -> Roofline:
    program = step.assembly.lower_step(step.batch).compile()
    return Roofline(
        parse(program.as_text()),
        speeds=Speeds({"float32": 1e12, "bfloat16": 1e12}, 1e11),
        num_devices=8,
        link_seconds=lambda collective: collective.wire_bytes / 1e9,
    )


def test_executed_flops_and_collectives_of_a_compiled_step(tmp_path: Path) -> None:
    step = planned(tmp_path)
    assert step.tokens_per_device == 64
    roofline = roofline_of(step)
    flops = sum(each.times * sum(each.cost.flops.values()) for each in roofline.executed())
    # The program of one device, with the turns of the loops over layers and chunks of the head.
    assert 8 * flops == pytest.approx(step.assembly.flops(step.batch).executed, rel=0.02)
    assert roofline.loops_counted_once == []
    kinds = {each.collective.kind for each in roofline.communications()}
    assert "all-gather" in kinds
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
    gathered = [each for each in roofline.communications() if each.collective.kind == "all-gather"]
    assert all(each.collective.groups.size == 8 for each in gathered)
    # The weights of the layers are split over all devices: each is gathered, in a loop over the layers or before it.
    weights = sum(each.times * each.collective.num_bytes for each in gathered)
    assert weights >= 4 * 2 * (16 * 32 * 3)
    assert roofline.seconds().total > 0


def test_supervised_rows_and_adapters_are_planned_as_well(tmp_path: Path) -> None:
    step = planned(tmp_path, command="sft", lengths=(64,))
    assert step.batch.tokens.shape == (1, 8, 64)
    step = planned(tmp_path, "lora.r=2", "reference=live")
    assert step.assembly.frozen.base is not None
    assert step.assembly.flops(step.batch).logical > 0


def test_what_is_left_open_is_what_a_run_compiles_first(tmp_path: Path) -> None:
    words = ("remat=auto", "global_batch_size=64")
    roomy = planned(tmp_path, *words)
    assert (roomy.remat, roomy.tokens_per_device) == ("attention", 8 * 64)
    # Of three layers, as the model has them, and not of the two that are compiled.
    policies = ("attention", "full")
    whole = plan_step(roomy.assembly.setup.config, jax.devices(), [(16, 24, 24)], platform="cpu")
    estimate = estimate_step(whole.assembly, policies, whole.batch)
    tight = planned(tmp_path, *words, memory=estimate.num_bytes("attention", 400))
    # Six of a device's eight pairs fit; two micro-batches then have four each.
    assert (tight.remat, tight.tokens_per_device) == ("attention", 4 * 64)
    assert tight.batch.tokens.shape[0] == 2
    # What the config gives stays.
    assert planned(tmp_path, *words, "max_tokens_per_device=128").tokens_per_device == 128
    assert planned(tmp_path, *words, "micro_batch_size=1").batch.tokens.shape == (8, 8, 64)


@pytest.mark.parametrize(
    ("words", "lengths", "key"),
    [
        ((), (16, 24), "prompt, chosen and rejected"),
        ((), (16, 24, 60), "max_length 64"),
        (("global_batch_size=9",), (16, 24, 24), "global_batch_size 9"),
        (("packing=false",), (16, 24, 24), "packing"),
        (("mesh.tensor=3",), (16, 24, 24), "mesh"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, words: tuple[str, ...], lengths: tuple[int, ...], key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        planned(tmp_path, *words, lengths=lengths)


@pytest.mark.parametrize("folder", sorted(SHAPES.iterdir()), ids=lambda folder: folder.name)
def test_every_shape_is_read(folder: Path) -> None:
    from jdpo.models.families import read_model_config

    assert read_model_config(folder).num_layers >= 16


def test_every_shipped_config_with_a_hub_model_has_a_shape() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        name = path.read_text(encoding="utf-8").split("\nmodel_name_or_path: ")[-1].split("\n")[0]
        if name.startswith("runs/") or path.stem == "iterate":
            continue
        config = read_config(path, [], None)
        assert (Path(config.model_name_or_path) / "config.json").exists(), path


# --- compiled for devices that are not here


def aot(*words: str) -> tuple[int, Any, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot.py"), *words], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


SETTINGS = ("--lengths", "256,384,384", "--layers", "2", "max_length=1024", "max_tokens_per_device=2048")


@pytest.mark.full
@pytest.mark.parametrize(
    ("target", "rows", "kernel"), [("v5e-8", 16, "splash_mha_fwd_residuals"), ("h200x1", 2, "__cudnn$fmhaSoftmax")]
)
def test_two_layers_compile_for_a_tpu_and_a_gpu(tmp_path: Path, target: str, rows: int, kernel: str) -> None:
    _skip_without_compiler(target)
    words = [str(ROOT / "configs" / "llama_3_2_1b.yaml"), "--on", target, *SETTINGS, f"global_batch_size={rows}"]
    code, found, error = aot(*words)
    assert code == 0, error
    assert kernel in found["kernels"]
    assert set(found["executed_flops"]) == {"bfloat16"}
    assert found["loops_counted_once"] == []
    assert 0.05 < found["mfu_bound"] < 1
    # The same program is no worse than itself, and worse than one that had another kernel and less memory.
    before = tmp_path / "before.json"
    before.write_text(json.dumps(found))
    assert aot(*words, "--against", str(before))[0] == 0
    before.write_text(json.dumps(found | {"peak_bytes": found["peak_bytes"] // 2}))
    code, _, error = aot(*words, "--against", str(before))
    assert (code, "peak memory" in error) == (1, True)


BASELINES = sorted((ROOT / "benchmarks" / "results" / "aot" / "two_layers").glob("*.json"))
"""Outputs of `python benchmarks/aot_programs.py --layers 2 --out benchmarks/results/aot/two_layers`."""


@pytest.mark.full
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_no_program_became_worse(baseline: Path) -> None:
    _skip_without_compiler(PROGRAMS[baseline.stem].target)
    words = [*command(baseline.stem, layers=2), "--against", str(baseline)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _skip_without_compiler(target: str) -> None:
    missing = missing_package(machine_of(target))
    if missing:
        pytest.skip(f"{missing} is not installed; benchmarks/README.md makes an environment that has it")


def test_the_table_of_measured_programs(tmp_path: Path) -> None:
    found = {
        "remat": "full",
        "tokens_per_device": 4096,
        "peak_bytes": 8 * 2**30,
        "share_of_memory": 0.5,
        "executed_flops": {"bfloat16": 2e14},
        "memory_traffic_bytes": 300 * 2**30,
        "wire_bytes": 60 * 2**30,
        "collectives": [
            {"wire_bytes": 20 * 2**30, "compute_meanwhile": True},
            {"wire_bytes": 40 * 2**30, "compute_meanwhile": False},
        ],
        "time_ms": {"total": 1727.4},
        "mfu_bound": 0.5395,
    }
    (tmp_path / "8b-v5e-64.json").write_text(json.dumps(found))
    figures = "8.00 (50 %) | 0.200 | 300 | 60.0 | 40.0 | 1727 | 53.9 %"
    assert f"| 8B full, v5e-64 | full | 4,096 | {figures} |" in table(tmp_path)
    both = table(tmp_path, tmp_path)
    assert [both.count(side) for side in ("| before |", "| now |")] == [1, 1]


def test_lengths_are_required() -> None:
    with pytest.raises(ValueError, match="--lengths is required"):
        lengths_of(None)
    with pytest.raises(ValueError, match="512,300,300"):
        lengths_of("512 300")
    assert lengths_of("512,300,300") == [(512, 300, 300)]


def test_lengths_may_be_those_of_real_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,rejected\n16,24,24\n8,2,40\n", encoding="utf-8")
    assert lengths_of(str(file)) == [(16, 24, 24), (8, 2, 40)]
    step = planned(tmp_path, lengths=lengths_of(str(file)))
    # Both sequences of a row of the second kind are shorter than those of the first, and share attention rows.
    assert sorted(set(step.batch.lengths[step.batch.lengths > 0].tolist())) == [10, 40, 48]
    file.write_text("prompt,chosen,rejected\n16,24\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected 3 numbers"):
        lengths_of(str(file))
    with pytest.raises(ValueError, match=r"missing\.csv"):
        lengths_of(str(tmp_path / "missing.csv"))


def test_files_and_numbers_are_checked_before_anything_is_compiled(tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    for text in ('{"peak_bytes": ', "[1]", '{"peak_bytes": 1}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--against .*before\.json"):
            measured_before(file)
    with pytest.raises(ValueError, match="root of a checkout"):
        use_code(tmp_path)
    assert layers("2") == 2
    for text in ("0", "-2", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            layers(text)


def test_a_model_without_a_shape_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"has no Mistral-7B: give one of .*Llama-3\.1-8B"):
        read_config(ROOT / "configs" / "llama_3_2_1b.yaml", ["model_name_or_path=mistralai/Mistral-7B"], None)
