"""Looks up mesh axes by the logical rules in context."""

from __future__ import annotations

from flax import linen as nn


def mesh_axes(logical_name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which the rules in context split a logical axis."""
    axes = nn.logical_to_mesh_axes((logical_name,))[0]
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
