"""Jitted functions that are traced under a mesh."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jdpo.sharding.rules import LOGICAL_RULES


class OnMesh:
    """A jitted function that is called and lowered under the mesh and the logical rules.

    Without both, the sharding constraints inside of the model lower to nothing.
    """

    def __init__(self, mesh: Mesh, function: Any) -> None:
        self._mesh, self._function = mesh, function

    # jit traces at the first call, long after the function was made, so the mesh is set here.
    def __call__(self, *args: Any, **static: Any) -> Any:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return self._function(*args, **static)

    def lower(self, *args: Any, **static: Any) -> Any:
        """Lowers the function for arguments of these shapes; the result is ready to compile."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return self._function.lower(*args, **static)
