"""One DPO step of every family: packed equals padded, and eight devices equal one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.config import MeshConfig
from jdpo.data.batching.loader import collate_pairs
from jdpo.losses.settings import loss_settings
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes, make_apply_fn, make_routed_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.sharding.rules import param_shardings
from jdpo.training.step.objectives import PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import loss_and_grads
from tests.training.step.test_packed_logps import MOST, assert_equal_steps, on_mesh, packed, places_of, random_pairs

GOLDEN = Path(__file__).parents[2] / "golden" / "logits"
SHORT = ("apertus", "cohere2", "gemma2", "gpt2", "qwen3_5_text")
"""In the default suite: an activation with parameters; interleaved rotation, layers without rope, parallel branches
with one norm; soft caps and post-norms; learned positions; a delta rule."""
FAMILIES = [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.full)
    for name in sorted(path.name for path in GOLDEN.iterdir())
]
SIZES = [(3, 5, 2), (0, 4, 7), (9, 6, 1), (2, 12, 12)]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def model_of(name: str, **settings: Any) -> Transformer:
    return Transformer(read_model_config(GOLDEN / name), compute_dtype=jnp.float64, param_dtype=jnp.float64, **settings)


@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        pytest.param(MeshConfig(fsdp=1), "none", marks=pytest.mark.full),
        (MeshConfig(data=2, fsdp=2, tensor=2), "full"),
    ],
    ids=["one", "eight"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_padded_and_sharded_steps_are_equal(name: str, sizes: MeshConfig, remat: str) -> None:
    """Loads weights from their files onto the mesh, splitting fused tensors, with every layer rematerialized.

    Experts are split, too, and a step includes the router's load balancing loss.
    """
    model = model_of(name)
    is_sparse = model.config.moe is not None
    if is_sparse and sizes.data == 2:
        sizes = dataclasses.replace(sizes, data=1, expert=2)
    policy = load_params(GOLDEN / name, model, dtype=jnp.float64)
    noise = np.random.default_rng(1)
    reference = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * noise.normal(size=leaf.shape), policy)
    chosen = loss_settings("sigmoid", beta=0.3, use_weighting=True, rpo_alpha=0.5)[0]  # WPO needs capped logits too
    pairs = random_pairs(0, SIZES)

    coef = 0.2 if is_sparse else None
    padded = PreferenceObjective(make_routed_apply_fn(model) if is_sparse else make_apply_fn(model), chosen, coef)
    rows = collate_pairs(pairs, num_slots=len(pairs), length=2 * MOST, pad_token_id=0)
    rows = jax.tree.map(lambda array: jnp.asarray(array[None]), rows)
    expected = jax.jit(partial(loss_and_grads, padded))(policy, reference, rows, padded.init_state)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected.grads)) > 1e-4

    mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.expert * sizes.tensor])
    own = model.clone(remat=remat)
    shardings = param_shardings(logical_axes(own), abstract_params(own), mesh)
    weights = load_params(GOLDEN / name, own, shardings, dtype=jnp.float64)
    flat = PreferenceObjective(PackedLogps(own, mesh), chosen, coef)
    batch = packed(pairs, num_rows=4 if mesh.size > 1 else 1)
    found = on_mesh(
        mesh,
        jax.jit(partial(loss_and_grads, flat)),
        weights,
        jax.device_put(reference, shardings),
        place(batch, micro_batch_sharding(mesh)),
        flat.init_state,
    )
    assert_equal_steps(expected, found, places_of(batch), len(pairs), 1e-9)
