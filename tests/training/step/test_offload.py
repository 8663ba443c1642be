"""Optimizer state in host memory: equal numbers, and fewer moments on the device at once."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdpo.config import MeshConfig, OptimizerConfig, SFTConfig
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import offloaded, replicated, state_shardings
from jdpo.training.step.optimizer import make_optimizer
from jdpo.training.step.rounding import apply_updates
from jdpo.types import HOST_MEMORY

SHAPES = {"a": {"kernel": (16, 8)}, "b": {"kernel": (8, 4), "bias": (4,)}, "c": {"scale": (8,)}}


def optimizer_of(name: str, offload: bool) -> Any:
    rule = OptimizerConfig(name=name, weight_decay=0.1, momentum=0.9 if name == "sgd" else None)
    config = SFTConfig(
        model_name_or_path="m",
        output_dir="o",
        datasets="d",
        learning_rate=1e-2,
        optimizer=rule,
        offload_optimizer=offload,
    )
    return make_optimizer(config, 10)


def tree(dtype: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )


def trained(name: str, *, offload: bool) -> tuple[Any, Any]:
    """Returns weights and optimizer state after three updates over eight devices."""
    optimizer, mesh = optimizer_of(name, offload), make_mesh(MeshConfig(data=2, fsdp=4))
    dtype = jnp.bfloat16 if name == "adamw_bf16" else jnp.float32
    params = tree(dtype, 0)
    split = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec("fsdp")), params)
    abstract = jax.eval_shape(optimizer.init, params)
    shardings = state_shardings(abstract, params, split, mesh)
    if offload:
        shardings = offloaded(shardings, abstract)

    def update(params: Any, state: Any, grads: Any, key: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params, key=key)
        return apply_updates(params, updates, key), state

    step = jax.jit(
        update,
        in_shardings=(split, shardings, split, replicated(mesh)),
        out_shardings=(split, shardings),
        donate_argnums=(0, 1),
    )
    params = jax.device_put(params, split)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    for number in range(3):
        params, state = step(params, state, jax.device_put(tree(dtype, number + 1), split), jax.random.key(number))
    return params, state


@pytest.mark.parametrize(
    "name",
    ["adamw", "adamw_bf16", *(pytest.param(name, marks=pytest.mark.full) for name in ("adafactor", "lion", "sgd"))],
)
def test_states_in_host_memory_give_the_same_weights(name: str) -> None:
    params, state = trained(name, offload=False)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.memory_kind == "device"
    found, found_state = trained(name, offload=True)
    assert jax.tree.structure(found_state) == jax.tree.structure(state)
    for leaf in jax.tree.leaves(found_state):
        assert leaf.sharding.memory_kind == (HOST_MEMORY if leaf.ndim else "device")
    # The two programs may contract float32 sums differently, which may change a rounding.
    close = {"rtol": 2e-2, "atol": 2e-2} if name == "adamw_bf16" else {"rtol": 2e-6, "atol": 1e-7}
    pairs = zip(*map(jax.tree.leaves, ((params, state), (found, found_state))), strict=True)
    for expected, value in pairs:
        assert value.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(value, np.float32), np.asarray(expected, np.float32), **close)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
def test_on_tpu_moments_take_no_memory_of_the_device_between_steps() -> None:
    """Compiles for Llama 8B over four chips: arguments in host memory are updated in place."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = Mesh(np.array(devices[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes: dict[str, tuple[int, ...]] = {"embed": (128256, 4096), "head": (4096, 128256)}
    shapes |= dict.fromkeys(("gate", "up"), (32, 4096, 14336)) | {"down": (32, 14336, 4096)}
    shapes |= dict.fromkeys(("key", "value"), (32, 4096, 8, 128))
    shapes |= {"query": (32, 4096, 32, 128), "output": (32, 32, 128, 4096)}
    params = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    split = {
        name: {"kernel": NamedSharding(mesh, PartitionSpec(*("fsdp" if size == 4096 else None for size in shape)))}
        for name, shape in shapes.items()
    }
    optimizer = optimizer_of("adamw", offload=True)
    state = jax.eval_shape(optimizer.init, params)
    kept = offloaded(state_shardings(state, params, split, mesh), state)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params, key=jax.random.key(0))
        return apply_updates(params, updates, jax.random.key(1)), state

    placed = {"in_shardings": (split, kept, split), "out_shardings": (split, kept)}
    compiled = jax.jit(update, **placed, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes.values()) / 4
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == 2 * weights
    assert memory.argument_size_in_bytes == pytest.approx(2 * weights, rel=1e-6), "weights and gradients"
    assert memory.alias_size_in_bytes == pytest.approx(weights, rel=1e-6), "weights"
