"""Estimates of a step without compiling it, against figures by hand and programs compiled for an H200."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.devices import Target, compiling_for
from jdpo.models.families import read_model_config
from jdpo.models.model_config import DeltaConfig, LayerKind, MoEConfig
from jdpo.planning.planned_step import plan_step
from jdpo.training.fit.estimates import (
    CPU,
    StepEstimate,
    batch_bytes,
    estimate_step,
    kept_bytes,
    speeds_of,
    tokens_at_once,
)

SHAPES = Path(__file__).resolve().parents[3] / "benchmarks" / "shapes"


def test_bytes_per_token_are_those_of_the_table_in_the_docs() -> None:
    llama = read_model_config(SHAPES / "Llama-3.1-8B")
    kept = {
        remat: kept_bytes(llama, remat, itemsize=2, places=1.5) / 2**10
        for remat in ("offload", "full", "attention", "dots", "none")
    }
    assert kept == pytest.approx(
        {"offload": 0, "full": 256, "attention": 646, "dots": 3.0 * 2**10, "none": 8140}, rel=0.02
    )
    # Heads and the MLP's width are split over mesh.tensor; the residual stream is not.
    split = kept_bytes(llama, "dots", itemsize=2, places=1.5, tensor=2) / 2**10
    assert split == pytest.approx((3.0 * 2**10 + 2 * 256) / 2, rel=0.02)


def test_of_experts_only_those_that_a_token_goes_through_count() -> None:
    llama = read_model_config(SHAPES / "Llama-3.2-1B")
    moe = MoEConfig(num_experts=64, experts_per_token=2, d_ff=llama.d_ff // 2, normalize=True, aux_loss_coef=0.0)
    layers = tuple(dataclasses.replace(kind, mlp="experts") for kind in llama.layers)
    sparse = dataclasses.replace(llama, layers=layers, moe=moe)
    dense, of_experts = (kept_bytes(config, "dots", itemsize=2, places=1.0) for config in (llama, sparse))
    assert dense == of_experts


def test_a_delta_net_keeps_its_projections_under_dots_and_nothing_before() -> None:
    llama = read_model_config(SHAPES / "Llama-3.2-1B")
    delta = DeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=8, value_head_dim=16, conv_width=4)
    layers = (LayerKind(rope=None, mixer="delta"), *llama.layers[1:])
    hybrid = dataclasses.replace(llama, layers=layers, delta=delta)

    def less(remat: str, tensor: int = 1) -> float:
        """What the model with a DeltaNet in one layer keeps less than that with attention in all."""
        kept = [kept_bytes(config, remat, itemsize=2, places=1.5, tensor=tensor) for config in (llama, hybrid)]
        return kept[0] - kept[1]

    heads, width = llama.num_heads, llama.head_dim
    of_attention = 1.5 * heads * (2 * width + 4)
    assert less("full") == less("offload") == 0
    assert less("attention") == of_attention
    projections = 2 * (heads + 2 * llama.num_kv_heads) * width
    assert less("dots") == of_attention + projections - 2 * (2 * 2 * 8 + 2 * 6 * (16 + 1))
    assert less("dots", tensor=2) == less("dots") / 2


def estimated(shape: str, **settings: object) -> tuple[StepEstimate, int, list[float]]:
    """Estimates the step of a model for one H200, 8 pairs of 256 + 384 + 384 tokens at once."""
    words = {
        "model_name_or_path": SHAPES / shape,
        "datasets": "none",
        "output_dir": "none",
        "compute_dtype": "bfloat16",
        "max_length": 1024,
        "global_batch_size": 8,
        "max_tokens_per_device": 8192,
        **settings,
    }
    config = load_config(DPOConfig, None, [f"{key}={value}" for key, value in words.items()])
    with compiling_for(Target("gpu", "9.0")):
        planned = plan_step(config, jax.devices()[:1], [(256, 384, 384)], platform="gpu")
        policies = ("none", "dots", "attention", "full")
        estimate = estimate_step(planned.assembly, policies, planned.batch)
        tokens = tokens_at_once(planned.assembly, planned.batch)
        growing = [batch_bytes(planned.assembly, remat, planned.batch) for remat in policies]
    return estimate, tokens, growing


def test_memory_is_that_of_programs_compiled_for_an_h200() -> None:
    """Checks Qwen2.5-1.5B against the peaks in benchmarks/results/2026-11-30-remat.md, in GiB."""
    estimate, tokens, growing = estimated("Qwen2.5-1.5B")
    assert tokens == 8192
    peaks = {remat: estimate.num_bytes(remat, tokens) / 2**30 for remat in estimate.bytes_per_token}
    assert peaks == pytest.approx({"none": 56.8, "dots": 34.2, "attention": 25.4, "full": 24.6}, rel=0.08)
    assert growing == sorted(growing, reverse=True)
    # float32 weights and two moments, and a gradient of four bytes, of 1.54 B parameters.
    assert estimate.fixed_bytes == pytest.approx(1.544e9 * 16, rel=0.01)


def test_dots_is_fastest_and_more_tokens_at_once_save_what_each_micro_batch_costs() -> None:
    estimate, tokens, _ = estimated("Qwen2.5-1.5B")
    seconds = {remat: estimate.seconds(remat, tokens) for remat in estimate.seconds_per_token}
    assert min(seconds, key=lambda remat: seconds[remat]) == "dots"
    assert seconds["full"] > seconds["attention"] > 1.05 * seconds["dots"]
    # What `auto` once preferred, and what it takes now.
    assert estimate.seconds("none", 4096) > 1.15 * estimate.seconds("dots", 32768)
    assert estimate.seconds("dots", 512) > estimate.seconds("attention", 8192)


def test_frozen_weights_have_no_gradient() -> None:
    lora, _, _ = estimated("Llama-3.1-8B", lora="{r: 16, alpha: 32, target_modules: all-linear}")
    full, _, _ = estimated("Llama-3.1-8B")
    assert lora.fixed_bytes == pytest.approx(8.03e9 * 2, rel=0.1), "the base in bfloat16, and little else"
    assert lora.seconds_per_token["dots"] < full.seconds_per_token["dots"]
    assert lora.seconds_per_micro_batch < full.seconds_per_micro_batch / 2
    assert lora.wire_seconds == full.wire_seconds == 0, "on one device"


def test_speeds_are_by_data_sheet_or_of_a_chip_alike() -> None:
    assert speeds_of("TPU v5p", "tpu", 32).memory == 2765e9
    assert speeds_of("a new GPU", "gpu", 1) == speeds_of("NVIDIA H200", "gpu", 1)
    assert speeds_of("NVIDIA H200", "gpu", 16).wire < speeds_of("NVIDIA H200", "gpu", 8).wire
    assert speeds_of("cpu", "cpu", 8) == CPU


@pytest.mark.parametrize(
    ("kind", "platform"), [("Tesla V100-SXM2-16GB", "gpu"), ("NVIDIA A100-SXM4-80GB", "gpu"), ("TPU v4", "tpu")]
)
def test_a_chip_with_figures_missing_has_the_speeds_of_a_chip_alike(kind: str, platform: str) -> None:
    assert all(map(math.isfinite, speeds_of(kind, platform, 8)))
