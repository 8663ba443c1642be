"""Looks up rows of a table, on one device or over a mesh, with a gradient that is summed in float32.

Axes: n sequences, t positions, v rows of the table, d model, g tokens of all devices of a group, c columns on a device.

On a mesh the table is split along d over axes that split the sequences too. Its devices form groups along these axes.
A device looks up the tokens of its whole group in its own columns; then all devices exchange columns for whole rows of
their own tokens. The gradient goes the same way back and is summed where it belongs. So tokens move, and neither the
table nor its gradient: a table is hundreds of times larger than the states of a device's tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jdpo.models.mesh_axes import automatic_mesh, mesh_axes, num_devices, weight_axes

Array = jax.Array


def lookup(table: Array, tokens: Array, names: tuple[str, str], dtype: Any) -> Array:
    """Returns `table[tokens]` in `dtype`; the table's gradient is summed in float32 and rounded once.

    Summed in bfloat16, the gradient of a frequent token would stop changing as soon as the contribution of one position
    is below 0.4 % of the sum.

    Args:
      table: float [v, d].
      tokens: int [n, t], ids in [0, v).
      names: logical names of v and d, which tell how a mesh splits the table.
      dtype: of the result, to which rows are rounded.

    Returns:
      [n, t, d].
    """
    layout = _Layout.of(table, tokens, names, dtype)
    if layout is not None:
        return _exchanged_lookup(layout, table, tokens)
    # Gathered over fsdp like every weight: XLA looks rows up in a table split along d by moving the whole batch.
    table = nn.with_logical_constraint(table, (names[0], None))
    if table.dtype == jnp.bfloat16:
        return _narrow_lookup(table.shape[0], table, tokens).astype(dtype)
    return jnp.take(table, tokens, axis=0).astype(dtype)


# --- a whole table


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_lookup(num_rows: int, table: Array, tokens: Array) -> Array:
    return jnp.take(table, tokens, axis=0)


def _narrow_forward(num_rows: int, table: Array, tokens: Array) -> tuple[Array, Array]:
    return jnp.take(table, tokens, axis=0), tokens


def _narrow_backward(num_rows: int, tokens: Array, cotangent: Array) -> tuple[Array, None]:
    # [v, d] in float32, rounded only after the contributions of all positions are in.
    return _summed(num_rows, tokens, cotangent, cotangent.dtype).astype(cotangent.dtype), None


_narrow_lookup.defvjp(_narrow_forward, _narrow_backward)


def _summed(num_rows: int, tokens: Array, cotangent: Array, table_dtype: Any) -> Array:
    """Returns the sums [v, d] of the cotangents of each row, in float32 or wider; other ids are left out."""
    wide = jnp.promote_types(jnp.promote_types(cotangent.dtype, table_dtype), jnp.float32)
    zeros = jnp.zeros((num_rows, cotangent.shape[-1]), wide)
    return zeros.at[tokens].add(cotangent.astype(wide))


# --- a table split over a mesh


class _Layout(NamedTuple):
    """How a mesh splits a table and its tokens; hashable.

    Attributes:
      batch: axes that split the sequences.
      rows, columns: axes that split v and d.
      rest: axes of `batch` that are not in `columns`: their devices have the same columns and other tokens.
      table: shape and dtype.
      dtype: of the result.
    """

    mesh: Any
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    rest: tuple[str, ...]
    table: jax.ShapeDtypeStruct
    dtype: Any

    @classmethod
    def of(cls, table: Array, tokens: Array, names: tuple[str, str], dtype: Any) -> _Layout | None:
        """Returns None where the table is not split along d, or where moving it costs less than moving tokens."""
        mesh = automatic_mesh()
        if mesh is None:
            return None
        rows, columns = (weight_axes(mesh, name, size) for name, size in zip(names, table.shape, strict=True))
        batch = tuple(axis for axis in mesh_axes("batch") if mesh.shape[axis] > 1)
        num_shards = num_devices(mesh, batch)
        if not columns or not set(columns) <= set(batch) or tokens.shape[0] % num_shards:
            return None
        dtype = jnp.dtype(dtype)
        # Per dim of d: what a device sends for its tokens, and the part of the table that it would be sent.
        own_tokens, own_rows = tokens.size // num_shards, table.shape[0] // num_devices(mesh, rows)
        if own_tokens * dtype.itemsize > own_rows * table.dtype.itemsize:
            return None
        rest = tuple(axis for axis in batch if axis not in columns)
        return cls(mesh, batch, rows, columns, rest, jax.ShapeDtypeStruct(table.shape, table.dtype), dtype)

    @property
    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """The specs of table and tokens."""
        return PartitionSpec(self.rows or None, self.columns), PartitionSpec(self.batch)

    def over_mesh(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        # Off, as in attention: psum over `rows` of results that differ in nothing is not what it tracks.
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged_lookup(layout: _Layout, table: Array, tokens: Array) -> Array:
    table_spec, by_sequence = layout.specs

    def on_device(table_vc: Array, tokens_nt: Array) -> Array:
        ids_g = _own_rows(layout, _of_group(layout, tokens_nt), table_vc.shape[0])
        x_gc = jnp.take(table_vc, ids_g, axis=0).astype(layout.dtype)
        if layout.rows:
            # One of the devices has the row, and the others add zeros: exact in every dtype.
            is_own_g = ids_g < table_vc.shape[0]
            x_gc = jax.lax.psum(jnp.where(is_own_g[:, None], x_gc, 0), layout.rows)
        x_td = jax.lax.all_to_all(x_gc, layout.columns, split_axis=0, concat_axis=1, tiled=True)
        return x_td.reshape(*tokens_nt.shape, -1)

    return layout.over_mesh(on_device, (table_spec, by_sequence), by_sequence)(table, tokens)


def _exchanged_forward(layout: _Layout, table: Array, tokens: Array) -> tuple[Array, Array]:
    return _exchanged_lookup(layout, table, tokens), tokens


def _exchanged_backward(layout: _Layout, tokens: Array, cotangent: Array) -> tuple[Array, None]:
    table_spec, by_sequence = layout.specs
    num_rows = layout.table.shape[0] // num_devices(layout.mesh, layout.rows)

    def on_device(tokens_nt: Array, cotangent_ntd: Array) -> Array:
        # In the dtype of activations: the exchange adds nothing up.
        cotangent_td = cotangent_ntd.reshape(tokens_nt.size, -1)
        cotangent_gc = jax.lax.all_to_all(cotangent_td, layout.columns, split_axis=1, concat_axis=0, tiled=True)
        ids_g = _own_rows(layout, _of_group(layout, tokens_nt), num_rows)
        sum_vc = _summed(num_rows, ids_g, cotangent_gc, layout.table.dtype)
        if layout.rest:
            # Sums, not the tokens of these devices: a GPU adds in no fixed order, and devices with equal columns must
            # get equal bits.
            sum_vc = jax.lax.psum(sum_vc, layout.rest)
        return sum_vc.astype(layout.table.dtype)

    return layout.over_mesh(on_device, (by_sequence, by_sequence), table_spec)(tokens, cotangent), None


_exchanged_lookup.defvjp(_exchanged_forward, _exchanged_backward)


def _of_group(layout: _Layout, tokens_nt: Array) -> Array:
    """Returns the token ids [g] of all devices of this device's group, in the order of their columns."""
    ids: Array = jax.lax.all_gather(tokens_nt.reshape(-1), layout.columns, axis=0, tiled=True)
    return ids


def _own_rows(layout: _Layout, ids: Array, num_rows: int) -> Array:
    """Returns ids relative to this device's first row; `num_rows` for rows of other devices."""
    if not layout.rows:
        return ids
    own = ids - jax.lax.axis_index(layout.rows) * num_rows
    return jnp.where((own >= 0) & (own < num_rows), own, num_rows)
