"""The size of the head's chunks by kind of device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdpo.chips import chip_of
from jdpo.losses.linear_chunks import HeadSettings, default_chunk, row_token_logps
from jdpo.training.step.head_chunks import head_chunk_tokens, max_kept_logits

LLAMA, GEMMA = 128256, 262144


@pytest.mark.parametrize("kind", ["TPU v5p", "NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_reading_the_head_gradient_takes_no_longer_than_the_product(kind: str) -> None:
    chip, tokens = chip_of(kind), head_chunk_tokens(kind, jnp.bfloat16, GEMMA)
    assert chip is not None
    peak = chip.peak("bfloat16")
    assert peak is not None
    seconds_per_weight = 2 * tokens / peak, 8 / chip.hbm_bandwidth
    assert 1 <= seconds_per_weight[0] / seconds_per_weight[1] < 1.25


def test_logits_of_a_chunk_take_a_small_part_of_the_memory() -> None:
    assert head_chunk_tokens("TPU v5 lite", jnp.bfloat16, LLAMA) == 1024
    assert head_chunk_tokens("TPU v5 lite", jnp.bfloat16, GEMMA) == 384
    for kind in ("TPU v5 lite", "TPU v6 lite", "NVIDIA H200"):
        chip = chip_of(kind)
        assert chip is not None
        assert 4 * GEMMA * head_chunk_tokens(kind, jnp.bfloat16, GEMMA) < chip.hbm_bytes / 30


def test_small_chunks_on_cpu_and_a_fixed_size_on_unknown_chips() -> None:
    assert head_chunk_tokens(jax.devices("cpu")[0].device_kind, jnp.bfloat16, LLAMA) == 256
    assert head_chunk_tokens("some new chip", jnp.bfloat16, LLAMA) == 1024
    assert head_chunk_tokens("NVIDIA A100-SXM4-80GB", jnp.bfloat16, LLAMA) == 1024  # its bandwidth is not in the table


def test_logits_are_kept_on_cpus_alone() -> None:
    def are_kept(kind: str, tokens: int) -> bool:
        return tokens * LLAMA <= max_kept_logits(kind)

    assert are_kept("cpu", 512)
    assert not are_kept("cpu", 1024)
    assert not are_kept("NVIDIA H200", 1)
    assert not are_kept("TPU v6 lite", 1)


@pytest.mark.parametrize(("positions", "rows", "chunk"), [(6144, 1, 896), (6144, 2, 448), (1000, 1, 500)])
def test_chunks_have_the_minimum_or_half_of_all_positions(positions: int, rows: int, chunk: int) -> None:
    assert default_chunk(rows, positions, LLAMA, skips=True, min_tokens=896) == chunk


def test_the_program_has_logits_of_one_chunk() -> None:
    def arrays(**options: Any) -> str:
        shapes = [((1, 4096, 8), jnp.bfloat16), ((8, 50_000), jnp.bfloat16), ((1, 4096), jnp.int32), ((1,), jnp.int32)]
        abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

        def total(hidden: Any, head: Any, targets: Any, lengths: Any) -> Any:
            return row_token_logps(HeadSettings(None, None, False), hidden, head, targets, lengths, **options)[0].sum()

        return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(*abstract))

    assert "f32[1,256,50000]" in arrays()
    assert "f32[1,1024,50000]" in arrays(min_tokens=1024)
    assert "f32[1,256,50000]" not in arrays(min_tokens=1024)
