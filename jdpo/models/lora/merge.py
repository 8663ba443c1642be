"""Merges adapters into the kernels of their base, W + scale A B, one leaf at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.models.lora.adapters import Adapters, Lora
from jdpo.models.lora.base_weights import Base, as_float
from jdpo.models.lora.sites import EXPERT_AXIS, KERNEL, Site, get_at, tree_of
from jdpo.models.transformer import Params


def merge(
    lora: Lora,
    base: Base,
    adapters: Adapters,
    *,
    sites: Sequence[Site],
    dtype: Any,
    shardings: Params | None = None,
    gives_up: bool = False,
) -> Params:
    """Returns the params of the base with the adapters added to its kernels.

    Args:
      sites: all sites of the model: int8 kernels without an adapter are dequantized too.
      dtype: dtype of the result; sums are computed in float32 or wider.
      shardings: shardings of the result; None leaves them to XLA.
      gives_up: delete each leaf of the base as soon as its merged one exists, or overwrite it if the dtype is the same.
        Then the memory is that of one set of weights and one leaf of another dtype, or one layer in float32.
    """
    places, found = {(*site.path, KERNEL): site for site in sites}, {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(base.params):
        path = tuple(key.key for key in key_path)
        site = places.get(path)
        unit = get_at(base.scales, path) if site is not None and base.scales else None
        program = jax.jit(
            partial(_merged, site=site, scale=lora.scale, dtype=jnp.dtype(dtype)),
            # XLA can write a result over a donated array only if both have the same size.
            donate_argnums=0 if gives_up and leaf.dtype == dtype else (),
            out_shardings=None if shardings is None else get_at(shardings, path),
        )
        found[path] = program(leaf, unit, _pair(lora, site, adapters))
        if gives_up:
            # Otherwise the next leaves would be allocated before this one is free.
            jax.block_until_ready(found[path])
            # A leaf that was donated is deleted already.
            if not leaf.is_deleted():
                leaf.delete()
    return tree_of(found)


def _pair(lora: Lora, site: Site | None, adapters: Adapters) -> tuple[jax.Array, jax.Array] | None:
    """Returns A and B of a site, [*lead, inputs, r] and [*lead, r, outputs], or None if it is not adapted."""
    if site is None or site not in lora.sites:
        return None
    a, b = get_at(adapters, (*site.leader, "a")), get_at(adapters, (*site.path, "b"))
    return a.reshape(*site.lead, math.prod(site.inputs), lora.r), b.reshape(*site.lead, lora.r, math.prod(site.outputs))


def _merged(kernel: jax.Array, unit: Any, pair: Any, *, site: Site | None, scale: float, dtype: Any) -> jax.Array:
    if site is None or (unit is None and pair is None):
        return kernel.astype(dtype)
    if not site.lead or site.lead_axes[0] == EXPERT_AXIS:  # experts may be on several devices
        return _merged_layer(kernel, unit, pair, site=site, scale=scale, dtype=dtype)
    # Layer by layer, so that only one layer is in float32 at a time.
    in_place = kernel.dtype == dtype

    def write(layer: Any, merged: jax.Array) -> jax.Array:
        leaves = (merged if in_place else kernel, unit, pair)
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), leaves)
        new = _merged_layer(*one, site=site, scale=scale, dtype=dtype)
        return jax.lax.dynamic_update_index_in_dim(merged, new, layer, axis=0)

    # In place, layer i is read from the result itself: it is not written before its own turn.
    start = kernel if in_place else jnp.zeros(kernel.shape, dtype)
    return jax.lax.fori_loop(0, kernel.shape[0], write, start)


def _merged_layer(kernel: jax.Array, unit: Any, pair: Any, *, site: Site, scale: float, dtype: Any) -> jax.Array:
    wide = jnp.promote_types(dtype, jnp.float32)
    numbers = as_float(kernel, unit, site, wide)
    if pair is not None:
        a, b = (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in pair)
        # On TPUs a float32 product is computed in bfloat16 by default.
        numbers = numbers + (jnp.matmul(a, b, precision="highest") * scale).reshape(kernel.shape)
    return numbers.astype(dtype)
