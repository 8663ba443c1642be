"""Meshes over several slices, and what a step compiled for two slices sends from one to the other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.config import DPOConfig, MeshConfig, load_config
from jdpo.planning.compile_only import compile_only_devices, missing_package, on_nodes
from jdpo.planning.compiled_step import compile_step_for
from jdpo.planning.machines import machine_of
from jdpo.planning.measurement import measure
from jdpo.sharding.mesh import make_mesh, resolve_mesh_shape
from jdpo.sharding.slices import count_slices


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not here, as far as a mesh asks about it."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    process_index: int = 0


def nodes(num_nodes: int, per_node: int, platform: str = "gpu") -> Any:
    """GPUs of several nodes, in an order that is not that of the nodes."""
    devices = [Device(index, index // per_node, platform) for index in range(num_nodes * per_node)]
    return devices[1::2] + devices[::2]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (2, 4, 1, 1)),  # the config of every run that names no mesh, and of configs/llama_3_1_8b_tpu.yaml
        ({"data": 2}, (2, 4, 1, 1)),
        ({"data": 4}, (4, 2, 1, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"expert": 2, "tensor": -1, "fsdp": 1}, (2, 1, 2, 2)),
    ],
)
def test_data_goes_across_slices(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    assert resolve_mesh_shape(MeshConfig(**sizes), 8, num_slices=2) == shape


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": -1, "fsdp": 8}, {"data": 3}, {"data": 1, "fsdp": 2, "tensor": 4}, {"tensor": 8}]
)
def test_an_axis_that_would_leave_its_slice_is_refused_with_shapes_that_work(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="2 slices of 4") as error:
        resolve_mesh_shape(MeshConfig(**sizes), 8, num_slices=2)
    listed = str(error.value).split("tensor: ")[-1].split(", ")
    assert "2x4x1x1" in listed
    for shape in listed:
        data, fsdp, expert, tensor = map(int, shape.split("x"))
        assert (data % 2, data * fsdp * expert * tensor) == (0, 8)


def slices_of(mesh: Any) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def test_slices_of_devices_are_found_and_data_is_outermost_across_them() -> None:
    mesh = make_mesh(MeshConfig(data=4, fsdp=-1, tensor=2), nodes(2, 8))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 2}
    indices = slices_of(mesh)
    # The first half of data is slice 0, the second slice 1, whatever the other axes are.
    assert (indices[:2] == 0).all()
    assert (indices[2:] == 1).all()


def test_nodes_of_gpus_may_be_taken_together() -> None:
    mesh = make_mesh(MeshConfig(slices=1), nodes(4, 2))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (1, 8)
    assert slices_of(mesh).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    two = slices_of(make_mesh(MeshConfig(slices=2), nodes(4, 2)))
    assert [Counter(part.ravel().tolist()) for part in two] == [{0: 2, 1: 2}, {2: 2, 3: 2}]
    with pytest.raises(ValueError, match=r"mesh\.slices 3 does not divide"):
        count_slices(nodes(4, 3), 3)


def test_a_number_only_checks_the_slices_of_a_tpu() -> None:
    tpus = nodes(2, 4, "tpu")
    assert [count_slices(tpus, asked) for asked in (None, 2)] == [2, 2]
    for asked in (1, 4):
        with pytest.raises(ValueError, match=rf"mesh\.slices {asked}: the devices are in 2 slices of 4"):
            count_slices(tpus, asked)
    # As many devices as this process sees in all.
    assert len(tpus) == jax.device_count()
    with pytest.raises(ValueError, match=r"MEGASCALE_NUM_SLICES is 4, but .* 2 slices"):
        count_slices(tpus, environ={"MEGASCALE_NUM_SLICES": "4"})
    with pytest.raises(ValueError, match="slice 0 has 4, slice 1 has 3"):
        count_slices([device for device in tpus if device.id < 7])


def test_devices_without_slices_are_divided_into_runs_of_neighbours() -> None:
    mesh = make_mesh(MeshConfig(slices=2))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)
    assert [[device.id for device in part.ravel()] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"mesh\.slices 3 does not divide the 8 devices"):
        make_mesh(MeshConfig(slices=3))


# --- compiled for two slices that are not here


def skip_without_compiler(target: str) -> None:
    if missing := missing_package(machine_of(target)):
        pytest.skip(f"{missing} is not installed; benchmarks/README.md makes an environment that has it")


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("target", "per_slice"), [("2xv5e-16", 16), ("h100x16", 8)])
def test_each_part_of_a_gradient_crosses_slices_once_and_nothing_else_does(
    target: str, per_slice: int, micro_batches: int, tmp_path: Path
) -> None:
    skip_without_compiler(target)
    machine = machine_of(target)
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 32000}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    llama = {"model_type": "llama", "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(llama | sizes))
    words = {"model_name_or_path": tmp_path, "datasets": "x", "output_dir": "x", "compute_dtype": "bfloat16"}
    words |= {"max_length": 1024, "max_tokens_per_device": 1024, "global_batch_size": 2 * per_slice * micro_batches}
    words |= {"remat": "full", "reference": "cached"}
    config = load_config(DPOConfig, None, [f"{key}={value}" for key, value in words.items()])
    step = compile_step_for(machine, config, [(256, 384, 384)])
    setup = step.planned.assembly.setup
    assert (setup.mesh.shape["data"], setup.mesh.shape["fsdp"]) == (2, per_slice)
    assert step.planned.batch.tokens.shape[0] == micro_batches

    across = [row for row in measure(step)["collectives"] if row["across_slices"]]
    # A weight's gradient is divided over fsdp as the weight is; a norm's is whole on every device.
    weights = jax.tree.leaves(step.planned.assembly.state.params)
    own = sum(math.prod(weight.sharding.shard_shape(weight.shape)) for weight in weights)
    table = 32000 * 2048 / per_slice
    # Of one micro-batch all but the table of tokens in bfloat16, which is summed in float32 in any case.
    expected = 4 * own if micro_batches > 1 else 2 * own + 2 * table
    sums = sum(row["bytes"] for row in across if row["kind"] == "all-reduce")
    assert sums == pytest.approx(expected, rel=0.01)
    # Besides, values of the step and of its rows.
    assert sum(row["bytes"] for row in across if row["kind"] != "all-reduce") < 2**16


@pytest.mark.full
def test_data_goes_across_real_slices_and_nodes() -> None:
    skip_without_compiler("2xv5e-16")
    mesh = make_mesh(MeshConfig(), compile_only_devices(machine_of("2xv5e-16")))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "expert": 1, "tensor": 1}
    assert [set(part.ravel().tolist()) for part in slices_of(mesh)] == [{0}, {1}]
    # Within a slice, neighbours along fsdp are linked: chips whose coordinates differ by 1, or that close a ring.
    for part in mesh.devices:
        ring = [device.coords for device in part.ravel()]
        assert all(math.dist(here, there) == 1 for here, there in itertools.pairwise(ring))


def test_gpus_that_are_not_here_are_on_their_nodes() -> None:
    assert on_nodes(MeshConfig(), machine_of("h100x16")).slices == 2
    assert on_nodes(MeshConfig(slices=1), machine_of("h100x16")).slices == 1
    assert on_nodes(MeshConfig(), machine_of("h100x8")).slices is None
    assert on_nodes(MeshConfig(), machine_of("2xv5e-16")).slices is None
