"""What the logical rules in context say of the mesh in context."""

from __future__ import annotations

from flax import linen as nn


def mesh_axes(logical_name: str) -> tuple[str, ...]:
    """Mesh axes that the rules in context split a logical axis over."""
    axes = nn.logical_to_mesh_axes((logical_name,))[0]
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
