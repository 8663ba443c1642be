"""Tile sizes of attention: passed from the model to the backend, and refused if it takes none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.devices import Target, compiling_for
from jdpo.models.families import read_model_config
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.self_attention import AttentionSettings, attend_over_mesh
from jdpo.models.transformer import Transformer, abstract_params, most_sequences_per_row, padded_row_length
from jdpo.training.setup.model_setup import make_model
from tests.conftest import small_llama

CONFIG = small_llama(vocab_size=8, num_layers=1, d_model=16, head_dim=64, d_ff=16)
LENGTH = 512


def jaxpr(**settings: Any) -> str:
    """Returns the jaxpr for one packed sequence of LENGTH tokens."""
    model = Transformer(CONFIG, **settings)
    tokens, places = np.zeros((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None]
    sequences = packed_sequences(places[:, None], np.full((1, 1, 1), LENGTH, np.int32), places, places[:, None])

    def hidden(params: Any) -> Any:
        return model.apply({"params": params}, tokens, places, sequences, method="packed_hidden_and_head")[0]

    return str(jax.make_jaxpr(hidden)(abstract_params(model)))


@pytest.mark.parametrize("key", ["attention_block_q", "attention_block_kv"])
def test_blockwise_works_in_tiles_of_the_size_asked_for(key: str) -> None:
    for size in (32, 128):
        # One sequence with 2 key heads: every tile holds queries of 2 heads per key head, and keys.
        queries, keys = f"f32[{LENGTH // size},2,64,{2 * size}]", f"f32[{LENGTH // size},2,{size},64]"
        text = jaxpr(attention="blockwise", **{key: size})
        assert queries in text
        assert keys in text


@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 256), (256, 512)])
def test_splash_works_in_tiles_of_the_sizes_asked_for(block_q: int, block_kv: int) -> None:
    text = jaxpr(attention="splash", attention_block_q=block_q, attention_block_kv=block_kv)
    assert f"grid=({CONFIG.num_heads}, {LENGTH // block_q}, {LENGTH // block_kv})" in text
    assert f"f32[{block_q},{block_kv}]" in text  # the scores of a tile


def test_auto_with_tiles_takes_a_backend_that_has_them_however_short_the_sequences() -> None:
    x, lengths, config = jnp.ones((1, 32, 2, 8)), jnp.array([32]), dataclasses.replace(CONFIG, head_dim=8)

    def text(settings: AttentionSettings) -> str:
        return str(jax.make_jaxpr(lambda x: attend_over_mesh(settings, config, config.layers[0], x, x, x, lengths))(x))

    assert "while" not in text(AttentionSettings())  # the plain path
    assert "f32[2,2,8,16]" in text(AttentionSettings(block_q=16))


@pytest.fixture
def model_of(toy_model: Path) -> Callable[..., Transformer]:
    """Returns the model of a run with these command-line words."""

    def make(*words: str) -> Transformer:
        own = [f"model_name_or_path={toy_model}", "datasets=rows", "output_dir=o", "compute_dtype=float32"]
        tokenizer = load_tokenizer(toy_model, chat_template=None)
        return make_model(load_config(DPOConfig, None, [*own, *words]), read_model_config(toy_model), tokenizer)

    return make


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention=xla", "attention_block_q=64"], r"'xla' needs no block_q \(found 64\); blockwise can run this$"),
        (["attention_block_kv=24"], r"multiple of 16 \(found 24\).*\(attention: auto takes blockwise here\)"),
        (["attention_block_q=16", "attention_block_kv=32"], r"to be equal \(found 16 and 32\).*auto takes blockwise"),
        (["attention_block_q=16", "packing=false"], "attention_block_q 16 is for packed rows; set packing to true"),
        (["attention=blockwise", "packing=false"], "attention 'blockwise' is for packed rows"),
        (["attention=cudnn", "attention_block_q=128"], r"no block_q \(found 128\) and .* and an NVIDIA GPU"),
    ],
)
def test_tiles_that_the_backend_cannot_take_are_refused(
    model_of: Callable[..., Transformer], words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(*words)


def test_settings_reach_the_model(model_of: Callable[..., Transformer]) -> None:
    model = model_of("attention_block_q=32", "attention_block_kv=32")
    assert (model.attention, model.attention_block_q, model.attention_block_kv) == ("auto", 32, 32)
    assert model_of("packing=false").attention_block_q is None


@pytest.mark.parametrize(
    ("machine", "settings", "expected"),
    [
        (Target("cpu"), {}, None),
        (Target("tpu"), {}, None),
        # A model of float32 runs in tiles on GPUs, where only short rows hold several sequences.
        (Target("gpu", "9.0"), {}, 1),
        (Target("gpu", "9.0"), {"attention": "xla"}, None),
        (Target("gpu", "8.0"), {"attention": "cudnn", "compute_dtype": jnp.bfloat16}, 1),
    ],
)
def test_the_backend_decides_how_many_sequences_a_row_holds(
    machine: Target, settings: dict[str, Any], expected: int | None
) -> None:
    with compiling_for(machine):
        assert most_sequences_per_row(Transformer(CONFIG, **settings), 4096) == expected


def test_rows_on_tpu_fill_the_tiles() -> None:
    model = Transformer(CONFIG)
    with compiling_for(Target("tpu")):
        # Plain attention up to 128 places, then splash, whose tiles are multiples of 128.
        assert [padded_row_length(model, length) for length in (64, 192, 640, 1024)] == [64, 256, 768, 1024]
    with compiling_for(Target("cpu")):
        assert padded_row_length(model, 640) == 640
