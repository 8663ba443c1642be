from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdpo.models.families import read_model_config
from jdpo.models.hf_weights import load_params
from jdpo.models.resize import resize_embeddings
from jdpo.models.transformer import Transformer, abstract_params

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2"])
def test_old_rows_stay_and_new_rows_lie_near_the_mean(case: str) -> None:
    model = Transformer(read_model_config(GOLDEN / case))
    params = load_params(GOLDEN / case, model)
    grown, new_model = resize_embeddings(params, model, 43, jax.random.key(0))
    assert new_model == model.clone(config=dataclasses.replace(model.config, vocab_size=43))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, abstract_params(new_model))
    tables = [(params["embed"]["embedding"], grown["embed"]["embedding"])]
    if not model.config.tie_embeddings:
        tables.append((params["lm_head"]["kernel"].T, grown["lm_head"]["kernel"].T))
    for old, new in tables:
        np.testing.assert_array_equal(new[:40], old)
        distance = np.abs(new[40:] - old.mean(0)) / old.std(0)
        assert (distance < 0.1).all()
        assert (distance.max(1) > 0).all()
        assert len(np.unique(new[40:], axis=0)) == 3
    again, _ = resize_embeddings(params, model, 43, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, grown, again)
    other, _ = resize_embeddings(params, model, 43, jax.random.key(1))
    assert (other["embed"]["embedding"][40:] != grown["embed"]["embedding"][40:]).any()


def test_the_same_size_changes_nothing_and_shrinking_is_refused() -> None:
    model = Transformer(read_model_config(GOLDEN / "qwen3"))
    params = load_params(GOLDEN / "qwen3", model)
    same, same_model = resize_embeddings(params, model, 40, jax.random.key(0))
    assert same is params
    assert same_model == model
    with pytest.raises(ValueError, match="has 40 rows and cannot shrink to 39"):
        resize_embeddings(params, model, 39, jax.random.key(0))


def test_sharded_tables_grow_in_place_and_an_axis_that_no_longer_divides_is_replicated() -> None:
    model = Transformer(read_model_config(GOLDEN / "llama"))
    params = load_params(GOLDEN / "llama", model)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    table = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    sharded = {**params, "embed": {"embedding": jax.device_put(params["embed"]["embedding"], table)}}
    for new_size, spec in [(44, PartitionSpec("tensor", "fsdp")), (43, PartitionSpec(None, "fsdp"))]:
        expected, _ = resize_embeddings(params, model, new_size, jax.random.key(0))
        grown, _ = resize_embeddings(sharded, model, new_size, jax.random.key(0))
        assert grown["embed"]["embedding"].sharding == NamedSharding(mesh, spec)
        np.testing.assert_allclose(grown["embed"]["embedding"], expected["embed"]["embedding"], atol=1e-6)
