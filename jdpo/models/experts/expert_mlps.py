"""The MLPs of experts, on one device or over a mesh. No token is dropped.

Axes: n sequences, t positions or tokens, k experts of a token, e experts, r rows, d model, f expert width, l rank.

On a mesh each device has some of the experts. It gathers the tokens of all devices along the expert axis, applies its
own experts to those that are routed to them, and returns to each device the sum for its tokens: an all-gather and a
reduce-scatter, whose sizes do not depend on the routing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jdpo.devices import target
from jdpo.models.experts.grouped_matmul import Grouping, choose_grouping, grouped_matmul
from jdpo.models.experts.routes import Routes, add_bias, make_routes, to_rows, to_tokens
from jdpo.models.layers import PROJECTION
from jdpo.models.mesh_axes import mesh_axes

Array = Any
Gate = Callable[[Array, Array], Array]
"""A function of the outputs of gate and up, finite at 0."""


class ExpertMap(NamedTuple):
    """One linear map of every expert; the arrays have the compute dtype.

    Attributes:
      kernel: [e, d, f].
      scale: [e, f], the unit of an int8 kernel's outputs, or None.
      a, b: [e, d, l] and [e, l, f], an adapter of which (x a) b is added, or None.
      bias: [e, f], or None.
    """

    kernel: Array
    scale: Array | None = None
    a: Array | None = None
    b: Array | None = None
    bias: Array | None = None


class ExpertMaps(NamedTuple):
    """The maps of an expert, of which the first two read its input and the third its gated width."""

    gate: ExpertMap
    up: ExpertMap
    down: ExpertMap


def mixture(
    x_ntd: Array,
    weights_ntk: Array,
    experts_ntk: Array,
    maps: ExpertMaps,
    gated: Gate,
) -> Array:
    """Returns the weighted sum over each token's experts, down(gated(gate(x), up(x))), [n, t, d].

    With a mesh and logical rules in context every device computes with its own experts and its own part of their width.

    Args:
      weights_ntk: float32 or wider.
      experts_ntk: int; the experts of a token are distinct, and values outside of [0, e) mean none.
      gated: the elementwise function of an expert's gate and up.
    """
    layout = _Layout.of(x_ntd.shape[0], maps)
    body = partial(_mixture_here, layout=layout, gated=gated)
    if layout.mesh is None:
        return body(x_ntd, weights_ntk, experts_ntk, maps)
    by_sequence = PartitionSpec(layout.batch or None)
    over_mesh = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(by_sequence, by_sequence, by_sequence, layout.specs(maps)),
        out_specs=by_sequence,
        # Off, as in attention: loops over blocks start from zeros that are equal on all devices.
        check_vma=False,
    )
    out: Array = over_mesh(x_ntd, weights_ntk, experts_ntk, maps)
    return out


class _Layout(NamedTuple):
    """Mesh axes of sequences, experts, and kernels' inputs and width; empty where they do not divide evenly."""

    mesh: Any = None
    batch: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    @classmethod
    def of(cls, num_sequences: int, maps: ExpertMaps) -> _Layout:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return cls()
        sizes = dict(zip(("expert", "expert_embed", "expert_mlp"), maps.gate.kernel.shape, strict=True))

        def axes(name: str, size: int) -> tuple[str, ...]:
            # An axis of one device needs no communication.
            found = tuple(axis for axis in mesh_axes(name) if mesh.shape[axis] > 1)
            return found if size % math.prod(mesh.shape[axis] for axis in found) == 0 else ()

        return cls(mesh, axes("batch", num_sequences), *(axes(name, size) for name, size in sizes.items()))

    def specs(self, maps: ExpertMaps) -> ExpertMaps:
        """Returns the specs of the kernels as they are sharded; adapters are split only by experts and width."""
        expert, embed, width = (axes or None for axes in (self.expert, self.embed, self.width))

        def of_map(held: ExpertMap, d: Any, f: Any) -> ExpertMap:
            narrow_in, narrow_out = (width if axis == width else None for axis in (d, f))
            specs = ExpertMap(
                PartitionSpec(expert, d, f),
                PartitionSpec(expert, narrow_out),
                PartitionSpec(expert, narrow_in, None),
                PartitionSpec(expert, None, narrow_out),
                PartitionSpec(expert, narrow_out),
            )
            return ExpertMap(*(None if array is None else spec for array, spec in zip(held, specs, strict=True)))

        return ExpertMaps(
            of_map(maps.gate, embed, width), of_map(maps.up, embed, width), of_map(maps.down, width, embed)
        )


def _mixture_here(
    x_ntd: Array,
    weights_ntk: Array,
    experts_ntk: Array,
    maps: ExpertMaps,
    *,
    layout: _Layout,
    gated: Gate,
) -> Array:
    """Runs on one device, for its own tokens or, with an expert axis, for those of all devices along it."""
    tokens = [rearrange(array, "n t x -> (n t) x") for array in (x_ntd, weights_ntk, experts_ntk)]
    shared = tuple(
        axis for axis in layout.expert if axis in layout.batch
    )  # axes along which tokens and experts are split
    if shared:
        # Each device needs all tokens of its group, since any of them may be routed to its experts.
        tokens = [jax.lax.all_gather(array, shared, axis=0, tiled=True) for array in tokens]
    x_td, weights_tk, experts_tk = tokens
    num_experts = maps.gate.kernel.shape[0]
    if layout.expert:
        experts_tk = _own(experts_tk, jax.lax.axis_index(layout.expert) * num_experts, num_experts)
    y_td = _expert_mlps(x_td, weights_tk, experts_tk, maps, layout, gated)
    # Partial sums: of a part of the width, or of a part of the experts where these devices have the same tokens.
    if rest := tuple(axis for axis in (*layout.width, *layout.expert) if axis not in shared):
        y_td = jax.lax.psum(y_td, rest)
    if shared:
        # Sums over the experts of the group and leaves each device with its own tokens again.
        y_td = jax.lax.psum_scatter(y_td, shared, scatter_dimension=0, tiled=True)
    return rearrange(y_td, "(n t) d -> n t d", n=x_ntd.shape[0])


def _own(experts_tk: Array, first: Array, num_experts: int) -> Array:
    """Returns indices relative to this device's first expert; -1 for experts of other devices."""
    own = experts_tk - first
    return jnp.where((own >= 0) & (own < num_experts), own, -1)


def _expert_mlps(
    x_td: Array, weights_tk: Array, experts_tk: Array, maps: ExpertMaps, layout: _Layout, gated: Gate
) -> Array:
    num_experts = maps.gate.kernel.shape[0]
    num_devices = math.prod(layout.mesh.shape[axis] for axis in layout.expert) if layout.expert else 1
    # For an even load. An uneven one is computed as well, with blocks that fit it less well.
    grouping = choose_grouping(experts_tk.size // num_devices, num_experts, target().platform)
    routes = make_routes(experts_tk, num_experts, grouping.block)
    run = partial(_run, routes=routes, grouping=grouping, embed=layout.embed)
    x_rd = to_rows(x_td, routes)
    # The model dimension is split over fsdp: dim 1 of gate and up [e, d, f], dim 2 of down [e, f, d].
    hidden_rf = gated(run(x_rd, maps.gate, embed_dim=1), run(x_rd, maps.up, embed_dim=1))
    down = maps.down
    if down.bias is not None and layout.width:
        # Devices that share the width sum their results, so one of them adds the bias.
        down = down._replace(bias=jnp.where(jax.lax.axis_index(layout.width) == 0, down.bias, 0))
    return to_tokens(run(hidden_rf, down, embed_dim=2), weights_tk, routes)


def _run(
    x_rd: Array, held: ExpertMap, *, routes: Routes, grouping: Grouping, embed: tuple[str, ...], embed_dim: int
) -> Array:
    # Adapters are not split over fsdp, so they need no gather.
    whole = grouping
    if embed:
        grouping = grouping._replace(gather_axes=embed, gather_dim=embed_dim)
    y_rf = grouped_matmul(grouping, x_rd, held.kernel, routes.sizes)
    if held.scale is not None:
        # After the product, as in `Projection`: the compute dtype represents int8 exactly.
        y_rf = (y_rf * held.scale[routes.expert]).astype(x_rd.dtype)
    if held.a is not None:
        narrow_rl = checkpoint_name(grouped_matmul(whole, x_rd, held.a, routes.sizes), PROJECTION)
        y_rf = y_rf + grouped_matmul(whole, narrow_rl, held.b, routes.sizes)
    # Named for the policy "dots", as in `Projection`.
    y_rf = checkpoint_name(y_rf, PROJECTION)
    return y_rf if held.bias is None else add_bias(y_rf, held.bias, routes)
