"""The frozen base of LoRA: its dtypes, and kernels in int8.

An int8 kernel is round(w / s) with s = max |w| / 127 over the inputs of each output channel, so the error is at most
s / 2. Embedding, head, norms and biases are not quantized.

Axes: *lead, *in, *out of a kernel as in `jdpo.models.lora.adapters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.models.lora.sites import KERNEL, Path, Site, tree_of
from jdpo.models.transformer import Params, Transformer, abstract_params, logical_axes

LEVELS = 127
"""Largest magnitude of a quantized weight. -128 is not used, so that rounding is symmetric."""


class Base(NamedTuple):
    """The frozen weights; `scales` as in `Weights`, empty if no kernel is int8."""

    params: Params
    scales: Params


class BaseDtype(NamedTuple):
    """The dtypes of a base.

    Attributes:
      rest: dtype of all weights that are not quantized.
      int8: True if the layers' projections are quantized to int8.
    """

    rest: Any
    int8: bool = False

    @property
    def name(self) -> str:
        """The name in messages and cache keys."""
        return f"int8, else {jnp.dtype(self.rest).name}" if self.int8 else str(jnp.dtype(self.rest).name)


def quantize(kernel: jax.Array, site: Site) -> tuple[jax.Array, jax.Array]:
    """Returns a kernel [*lead, *in, *out] as int8, and the unit of each output channel, float32 [*lead, *out].

    The unit of a channel of zeros is 1.
    """
    dims = tuple(range(len(site.lead), len(site.lead) + len(site.inputs)))
    wide = kernel.astype(jnp.float32)
    # One unit per output channel: it can be applied after the product.
    most = jnp.max(jnp.abs(wide), axis=dims, keepdims=True)
    # A channel of zeros would be divided by zero.
    unit = jnp.where(most > 0, most / LEVELS, 1)
    return jnp.round(wide / unit).astype(jnp.int8), jnp.squeeze(unit, dims)


def as_float(kernel: jax.Array, unit: jax.Array | None, site: Site, dtype: Any) -> jax.Array:
    """Returns a kernel [*lead, *in, *out] of a site, or one layer of it, in a floating-point dtype.

    Args:
      unit: [*lead, *out] for an int8 kernel, else None.
    """
    if unit is None:
        return kernel.astype(dtype)
    num_lead = unit.ndim - len(site.outputs)
    inputs = range(num_lead, num_lead + len(site.inputs))
    return (kernel * jnp.expand_dims(unit, tuple(inputs))).astype(dtype)


def abstract_base(model: Transformer, sites: Sequence[Site], dtype: BaseDtype) -> Base:
    """Returns the shapes and dtypes of a base.

    Args:
      sites: all sites of the model, see `find_sites`.
    """
    # Only kernels of projections become int8; everything else has the dtype `rest`.
    params = abstract_params(model.clone(param_dtype=dtype.rest))
    if not dtype.int8:
        return Base(params, {})
    kernels = {(*site.path, KERNEL) for site in sites}
    scales = {(*site.path, KERNEL): jax.ShapeDtypeStruct((*site.lead, *site.outputs), jnp.float32) for site in sites}

    def of_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_kernel = tuple(key.key for key in path) in kernels
        return jax.ShapeDtypeStruct(leaf.shape, jnp.int8) if is_kernel else leaf

    return Base(jax.tree_util.tree_map_with_path(of_leaf, params), tree_of(scales))


def base_axes(model: Transformer, sites: Sequence[Site], dtype: BaseDtype) -> Base:
    """Returns the logical axis names of every leaf of `abstract_base`."""
    scales: dict[Path, Any] = {}
    if dtype.int8:
        scales = {(*site.path, KERNEL): (*site.lead_axes, *site.output_axes) for site in sites}
    # Units are split like the outputs of their kernel, so that scaling needs no communication.
    return Base(logical_axes(model), tree_of(scales))
