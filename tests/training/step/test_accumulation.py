"""Sums of gradients over micro-batches, over copies of the weights as well."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdpo.config import MeshConfig
from jdpo.models.mesh_axes import constrain_weight, mesh_axes
from jdpo.sharding.axes import BATCH_AXES
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.on_mesh import OnMesh
from jdpo.training.step.accumulation import accumulate

RNG = np.random.default_rng(0)
WEIGHT, ROWS = RNG.normal(size=(16, 4)), RNG.normal(size=(3, 8, 16))  # [d, f], [k, m, d]


def grads_of(params: Any, micro: Any) -> tuple[Any, Any]:
    def loss(params: Any) -> Any:
        # As a model does: its weight is split over fsdp, and its rows over the batch axes.
        weight = constrain_weight(params["weight"], ("embed", "mlp"))
        outputs = jnp.tanh(jnp.asarray(micro) @ weight)
        outputs = jax.lax.with_sharding_constraint(outputs, PartitionSpec(mesh_axes("batch"), None))
        return jnp.square(outputs).sum(), outputs[:, 0]

    (value, of_rows), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, (value[None], of_rows)


def compiled(mesh: Any, rows: Any, weight: Any) -> tuple[Any, Any, Any]:
    split = {"weight": NamedSharding(mesh, PartitionSpec("fsdp", None))}
    by_row = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def run(params: Any, rows: Any) -> Any:
        grads, (values, of_rows) = accumulate(grads_of, params, rows)
        return grads, values.sum(), of_rows

    function = OnMesh(mesh, jax.jit(run, in_shardings=(split, by_row), out_shardings=(split, None, None)))
    params = jax.device_put({"weight": weight}, split)
    return function, params, jax.device_put(rows, by_row)


@pytest.mark.parametrize("sizes", [{"slices": 2}, {"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_sum_over_copies_is_that_of_one_device(sizes: dict[str, int]) -> None:
    with jax.enable_x64(True):
        (expected, values), of_rows = (
            jax.value_and_grad(lambda weight: (jnp.square(jnp.tanh(ROWS @ weight)).sum(), None), has_aux=True)(WEIGHT),
            np.tanh(ROWS @ WEIGHT)[..., 0],
        )
        function, *arguments = compiled(make_mesh(MeshConfig(**sizes)), ROWS, WEIGHT)
        grads, value, found = function(*arguments)
        np.testing.assert_allclose(grads["weight"], values, rtol=1e-12)
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        np.testing.assert_allclose(found, of_rows, rtol=1e-12)


def test_parts_of_gradients_cross_slices_once_after_the_last_micro_batch() -> None:
    mesh = make_mesh(MeshConfig(slices=2))
    function, *arguments = compiled(mesh, ROWS.astype(np.float32), WEIGHT.astype(np.float32))
    program = function.lower(*arguments).compile().as_text()
    entry = program[program.index("\nENTRY ") :]
    # Devices 0 to 3 are one slice: a group with 0 and 4 goes across.
    across = [line for line in program.splitlines() if re.search(r"all-(reduce|gather|to-all)\S*\(.*{[\d,]*0,4", line)]
    assert len(across) == 1, across
    assert across[0] in entry.splitlines(), "after the loop over micro-batches"
    assert "f32[4,4]" in across[0].split("=")[1].split("all-reduce")[0], "a part, after the sum within a slice"
