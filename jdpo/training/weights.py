"""Weights onto the mesh: the policy's start, and the frozen reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.models.hf_weights import load_params, resize_embeddings
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.sharding.rules import param_shardings
from jdpo.training.setup import Setup

Params = Any


def load_start(setup: Setup) -> Params:
    """The policy's start on the mesh, in the master dtype, the vocabulary grown where tokens were added."""
    return _load_grown(setup, setup.model_folder)


def _load_grown(setup: Setup, folder: Path) -> Params:
    source_model = setup.model.clone(config=setup.source_config)
    axes, shapes = logical_axes(source_model), abstract_params(source_model)
    params = load_params(folder, source_model, param_shardings(axes, shapes, setup.mesh), dtype=setup.model.param_dtype)
    if setup.model.config.vocab_size == setup.source_config.vocab_size:
        return params
    key = jax.random.key(setup.config.seed)
    grown, model = resize_embeddings(params, source_model, setup.model.config.vocab_size, key)
    assert model == setup.model, (model, setup.model)
    return jax.device_put(grown, setup.shardings)


def load_reference(setup: Setup, start: Params | None, *, moves: bool = False) -> Params:
    """The reference, in the compute dtype: the model casts weights to it at use, so nothing is lost.

    Args:
      start: the policy's start where it is at hand, so that it is not read twice; it is copied, never aliased.
      moves: whether the reference moves in training.
    """
    if setup.reference_folder is not None:
        start = _load_grown(setup, setup.reference_folder)
    elif start is None:
        start = load_start(setup)
    dtype = reference_dtype(setup.model, moves=moves)
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: jnp.copy(leaf).astype(dtype), tree), out_shardings=setup.shardings
    )
    return copy(start)


def reference_dtype(model: Transformer, *, moves: bool) -> Any:
    """Of the reference's weights: one that moves in small steps keeps the master dtype, in which they do not vanish."""
    return model.param_dtype if moves else model.compute_dtype
