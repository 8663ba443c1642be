"""Gradients of kernels on meshes: their values, and how the devices sum them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdpo.config import MeshConfig
from jdpo.models.layers import project
from jdpo.sharding.axes import BATCH_AXES
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.rules import partition_spec


@pytest.mark.parametrize(
    ("sizes", "d", "num_scatters"),
    [
        # One axis: XLA chooses, and on CPU it takes an all-reduce.
        ({"fsdp": 8}, 16, 0),
        ({"fsdp": 4, "expert": 2}, 16, 2),
        ({"data": 2, "fsdp": 2, "expert": 2}, 16, 2),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, 16, 2),
        # 6 is divided by the first axis alone.
        ({"fsdp": 2, "expert": 4}, 6, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("equation", "embed_dim"), [("ntd,df->ntf", 0), ("ntf,fd->ntd", 1)])
def test_a_kernel_over_two_axes_is_reduced_over_one_after_the_other(
    sizes: dict[str, int], d: int, num_scatters: int, equation: str, embed_dim: int
) -> None:
    mesh, rng = make_mesh(MeshConfig(**{"data": 1, **sizes})), np.random.default_rng()
    shapes = ((8, 3, d), (d, 4)) if embed_dim == 0 else ((8, 3, 4), (4, d))
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    names = ("embed", "mlp") if embed_dim == 0 else ("mlp", "embed")
    split = NamedSharding(mesh, partition_spec(names, kernel.shape, mesh))
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def loss(kernel: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(project(equation, x, kernel, embed_dim)))

    program = OnMesh(mesh, jax.jit(jax.grad(loss), in_shardings=(split, rows), out_shardings=split))
    found = program(jax.device_put(kernel, split), jax.device_put(x, rows))
    expected = jax.grad(lambda kernel: jnp.sum(jnp.sin(jnp.einsum(equation, x, kernel))))(kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    counted = Counter(re.findall(r" (all-reduce|reduce-scatter)\(", program.lower(kernel, x).compile().as_text()))
    assert counted["reduce-scatter"] == num_scatters, counted
    if num_scatters and "data" not in sizes:
        assert not counted["all-reduce"], counted
