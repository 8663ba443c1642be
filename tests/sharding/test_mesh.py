"""Meshes: what fits, and the errors for what does not."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from jdpo.config import MeshConfig
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.mesh import check_batch_size, make_mesh, resolve_mesh_shape


@pytest.mark.parametrize(
    ("data", "fsdp", "expert", "tensor", "shape"),
    [
        (1, -1, 1, 1, (1, 8, 1, 1)),
        (-1, 2, 1, 2, (2, 2, 1, 2)),
        (2, 2, 1, -1, (2, 2, 1, 2)),
        (8, 1, 1, 1, (8, 1, 1, 1)),
        (1, 2, -1, 2, (1, 2, 2, 2)),
    ],
)
def test_minus_one_takes_what_the_others_leave(
    data: int, fsdp: int, expert: int, tensor: int, shape: tuple[int, ...]
) -> None:
    assert resolve_mesh_shape(MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor), 8) == shape


def test_mesh_has_named_automatic_axes_over_all_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert num_batch_shards(mesh) == 4
    assert num_batch_shards(make_mesh(MeshConfig(data=2, fsdp=1, expert=4))) == 8


def test_a_mesh_that_does_not_fit_lists_those_that_do() -> None:
    with pytest.raises(ValueError, match="does not fit the 8 devices") as error:
        resolve_mesh_shape(MeshConfig(data=3), 8)
    listed = str(error.value).split("tensor: ")[-1].split(", ")
    assert {"1x1x1x8", "1x8x1x1", "8x1x1x1", "2x2x1x2"} <= set(listed)
    for shape in listed:
        data, fsdp, expert, tensor = map(int, shape.split("x"))
        assert data * fsdp * tensor == 8
        assert expert == 1
    with pytest.raises(ValueError, match=r"as data x fsdp x expert x tensor: 1x1x4x2, 1x2x4x1, 2x1x4x1$"):
        resolve_mesh_shape(MeshConfig(data=3, expert=4), 8)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_invalid_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="every axis must be at least 1"):
        resolve_mesh_shape(MeshConfig(**sizes), 8)


def test_too_few_devices_asked_for_are_refused_too() -> None:
    with pytest.raises(ValueError, match="does not fit the 8 device"):
        resolve_mesh_shape(MeshConfig(data=1, fsdp=4, tensor=1), 8)


def test_a_batch_that_does_not_split_names_sizes_that_do() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch_size(12, mesh)
    with pytest.raises(
        ValueError, match=r"global_batch_size 10 .*data x fsdp x expert = 2 x 2 x 1 = 4 shards.*such as 8, 12, 16"
    ):
        check_batch_size(10, mesh)
    with pytest.raises(ValueError, match="such as 4, 8,"):
        check_batch_size(3, mesh)
