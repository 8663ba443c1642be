"""Embedding rows of new tokens: the mean at which they start, and how they enter the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params
from jdpo.models.weights.embedding_rows import NOISE_SCALE, row_norms, started_rows, untrained_rows
from jdpo.models.weights.loading import load_params
from jdpo.models.weights.resize import resize_embeddings

GOLDEN = Path(__file__).parents[2] / "golden" / "logits"
ALL = np.ones(40, bool)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2"])
def test_old_rows_stay_and_new_rows_are_near_the_mean(case: str) -> None:
    model = Transformer(read_model_config(GOLDEN / case))
    params = load_params(GOLDEN / case, model)
    ids = np.array([7, 40, 41, 42])
    rows = started_rows(GOLDEN / case, model.config, ids, ALL, 0)
    grown, new_model = resize_embeddings(params, model, 43, rows)
    assert new_model == model.clone(config=dataclasses.replace(model.config, vocab_size=43))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, abstract_params(new_model))
    tables = [(params["embed"]["embedding"], grown["embed"]["embedding"])]
    if not model.config.tie_embeddings:
        tables.append((params["lm_head"]["kernel"].T, grown["lm_head"]["kernel"].T))
    for old, new in tables:
        kept = np.delete(np.arange(40), 7)
        np.testing.assert_array_equal(new[kept], old[kept])
        distance = np.abs(new[ids] - old.mean(0)) / old.std(0)
        assert (distance < 5 * NOISE_SCALE).all()
        assert (distance.max(1) > 0).all()
        assert len(np.unique(new[ids], axis=0)) == 4
    again = started_rows(GOLDEN / case, model.config, ids, ALL, 0)
    np.testing.assert_array_equal(again.embedding, rows.embedding)
    other = started_rows(GOLDEN / case, model.config, ids, ALL, 1)
    assert (other.embedding != rows.embedding).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_mean_leaves_out_rows_that_were_never_trained(make_folder: Callable[..., Any], dtype: Any) -> None:
    folder = make_folder("llama", dtype)
    is_token = np.arange(40) < 36  # the last four rows are spare
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        table = folder.tensors[name]
        table[36:] = 100  # must not count in the mean
        table[5 + number] = 0
        table[10 + number] = table[20 + number]
        table[12] = table[20 + number] * np.asarray(1.5, dtype)  # a multiple of a row is not a copy of it
    folder.write()
    rows = started_rows(folder.path, read_model_config(folder.path), np.array([36, 39]), is_token, 0)
    assert rows.num_trained == 33
    for number, (name, found) in enumerate(
        [("model.embed_tokens.weight", rows.embedding), ("lm_head.weight", rows.head)]
    ):
        trained = np.delete(np.arange(36), [5 + number, 10 + number, 20 + number])
        wide = folder.tensors[name][trained].astype(np.float64)
        assert found is not None
        noise = (found - wide.mean(0)) / (NOISE_SCALE * wide.std(0))
        assert np.abs(noise).max() < 4
        assert 0.5 < noise.std() < 1.5


def test_a_model_without_trained_rows_starts_new_ones_at_the_mean_of_all(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("qwen2")  # tied: no head
    folder.tensors["model.embed_tokens.weight"][:] = 0.25
    folder.write()
    rows = started_rows(folder.path, read_model_config(folder.path), np.array([39]), np.arange(40) < 39, 0)
    assert rows.head is None
    np.testing.assert_allclose(rows.embedding, 0.25)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_norms_are_those_of_the_embedding(case: str) -> None:
    config = read_model_config(GOLDEN / case)
    embedding = load_params(GOLDEN / case, config)["embed"]["embedding"]
    np.testing.assert_allclose(row_norms(GOLDEN / case, config), np.linalg.norm(embedding, axis=1), rtol=1e-6)


def test_zero_and_tiny_rows_of_tokens_are_untrained_and_spare_rows_are_not_asked_about() -> None:
    norms = np.array([1.0, 3.0, 0.0, 0.0099, 0.0101, 0.0, 1e9])
    is_token = np.array([True, True, True, True, True, False, False])
    # The median of the tokens' nonzero norms is 0.50505; 1 % of it is 0.0050505.
    assert np.flatnonzero(untrained_rows(norms, is_token)).tolist() == [2]
    assert np.flatnonzero(untrained_rows(norms * np.array([100, 100, 1, 1, 1, 1, 1]), is_token)).tolist() == [2, 3, 4]
    assert untrained_rows(np.zeros(3), np.ones(3, bool)).all()


def test_no_rows_change_nothing_and_shrinking_is_refused() -> None:
    model = Transformer(read_model_config(GOLDEN / "qwen3"))
    params = load_params(GOLDEN / "qwen3", model)
    rows = started_rows(GOLDEN / "qwen3", model.config, np.zeros(0, int), ALL, 0)
    same, same_model = resize_embeddings(params, model, 40, rows)
    assert same is params
    assert same_model == model
    with pytest.raises(ValueError, match="has 40 rows and cannot shrink to 39"):
        resize_embeddings(params, model, 39, rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_tables_change_in_place_bitwise_and_an_axis_that_no_longer_divides_is_replicated(dtype: Any) -> None:
    model = Transformer(read_model_config(GOLDEN / "llama"), param_dtype=dtype)
    params = load_params(GOLDEN / "llama", model, dtype=dtype)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    table = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    head = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    sharded = {
        **params,
        "embed": {"embedding": jax.device_put(params["embed"]["embedding"], table)},
        "lm_head": {"kernel": jax.device_put(params["lm_head"]["kernel"], head)},
    }
    split, whole = PartitionSpec("tensor", "fsdp"), PartitionSpec(None, "fsdp")
    for new_size, spec in [(40, split), (44, split), (43, whole)]:
        ids = np.array([3, 38, *range(40, new_size)])
        rows = started_rows(GOLDEN / "llama", model.config, ids, ALL, 0)
        expected, _ = resize_embeddings(params, model, new_size, rows)
        changed, _ = resize_embeddings(sharded, model, new_size, rows)
        assert changed["embed"]["embedding"].sharding == NamedSharding(mesh, spec)
        assert changed["embed"]["embedding"].dtype == dtype
        jax.tree.map(np.testing.assert_array_equal, changed, expected)
