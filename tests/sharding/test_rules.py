"""Logical names onto mesh axes, and the shardings of a whole training state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.config import MeshConfig
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import (
    check_host_memory,
    fetch,
    micro_batch_sharding,
    offloaded,
    place,
    replicated,
    state_shardings,
)
from jdpo.sharding.rules import param_shardings, partition_spec, undivided_dims

EMBED = ("fsdp", "expert")


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


def test_names_become_axes(mesh: Mesh) -> None:
    names = ("layers", "embed", "heads", "head_dim")
    assert partition_spec(names, (3, 8, 4, 16), mesh) == PartitionSpec(None, EMBED, "tensor", None)
    assert partition_spec(("batch", None), (8, 5), mesh) == PartitionSpec(("data", "fsdp", "expert"), None)


def test_a_dim_that_its_axis_does_not_divide_stays_whole_and_is_named(mesh: Mesh) -> None:
    assert partition_spec(("embed", "kv_heads", "head_dim"), (8, 1, 16), mesh) == PartitionSpec(EMBED, None, None)
    axes = {"key": {"kernel": ("embed", "kv_heads", "head_dim")}, "query": {"kernel": ("embed", "heads", "head_dim")}}
    shapes = {
        "key": {"kernel": jax.ShapeDtypeStruct((8, 1, 16), jnp.float32)},
        "query": {"kernel": jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)},
    }
    assert undivided_dims(axes, shapes, mesh) == ["['key']['kernel']: kv_heads=1 over tensor=2"]


def test_experts_are_split_by_number_and_all_other_weights_over_fsdp_and_expert_together() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    kernel = ("layers", "expert", "expert_embed", "expert_mlp")
    assert partition_spec(kernel, (3, 8, 8, 6), mesh) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert partition_spec(("embed", "mlp"), (8, 6), mesh) == PartitionSpec(EMBED, "tensor")
    assert partition_spec(("embed", "mlp"), (6, 6), mesh) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(("embed", "mlp"), (7, 6), mesh) == PartitionSpec(None, "tensor")


def test_a_name_without_a_rule_is_an_error(mesh: Mesh) -> None:
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",), (8,), mesh)


def test_moments_are_split_as_their_weights_and_counts_are_replicated(mesh: Mesh) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32), "scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    shardings = param_shardings({"kernel": ("embed", "mlp"), "scale": ("norm",)}, params, mesh)
    adamw = optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda _: True, tree))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = jax.eval_shape(optimizer.init, params)
    found = state_shardings(state, params, shardings, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    (adam,) = [node for node in jax.tree.leaves(found, is_leaf=_is_adam) if _is_adam(node)]
    assert adam.mu == adam.nu == shardings
    assert adam.mu["kernel"] == NamedSharding(mesh, PartitionSpec(EMBED, "tensor"))
    assert adam.count == replicated(mesh)


def test_rows_and_columns_of_adafactor_are_replicated(mesh: Mesh) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((256, 128), jnp.float32), "scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    shardings = param_shardings({"kernel": ("embed", "mlp"), "scale": ("embed",)}, params, mesh)
    state = jax.eval_shape(optax.scale_by_factored_rms().init, params)
    found = state_shardings(state, params, shardings, mesh)
    assert found.v_row["kernel"] == found.v_col["kernel"] == found.v["kernel"] == replicated(mesh)
    assert found.v["scale"] == shardings["scale"] != replicated(mesh)


def test_offloaded_states_leave_their_scalars_on_the_device(mesh: Mesh) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    shardings = param_shardings({"kernel": ("embed", "mlp")}, params, mesh)
    state = jax.eval_shape(optax.scale_by_adam().init, params)
    found = offloaded(state_shardings(state, params, shardings, mesh), state)
    assert found.mu["kernel"] == shardings["kernel"].with_memory_kind("pinned_host")
    assert found.count == replicated(mesh)


def test_a_platform_without_host_memory_is_refused_with_what_it_has() -> None:
    check_host_memory(jax.devices()[0], "remat: offload", "")
    kinds = [SimpleNamespace(kind=kind) for kind in ("device", "unpinned_host")]
    alone: Any = SimpleNamespace(platform="metal", device_kind="Apple M2", addressable_memories=lambda: kinds)
    with pytest.raises(ValueError, match=r"^remat: offload needs .* Apple M2 \(metal\) has device"):
        check_host_memory(alone, "remat: offload", "Set remat to full")


def _is_adam(node: object) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_a_placed_batch_is_split_by_row_and_comes_back_equal(mesh: Mesh) -> None:
    batch = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    placed = place(batch, micro_batch_sharding(mesh))
    # 4 batch shards of 2 rows each, every one on the 2 devices of a tensor group.
    assert sorted((shard.index[1].start, shard.data.shape) for shard in placed.addressable_shards) == [
        (start, (2, 2, 3)) for start in (0, 0, 2, 2, 4, 4, 6, 6)
    ]
    np.testing.assert_array_equal(fetch(placed), batch)
