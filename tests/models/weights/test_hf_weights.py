from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.hf_names import leaves
from jdpo.models.weights.hub_models import resolve_folder
from jdpo.models.weights.loading import load_params
from jdpo.models.weights.safetensors_folder import TensorFiles, tensor_entries
from jdpo.models.weights.staging import Reader
from tests.models.hf_arrays import hf_arrays

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Any) -> Any:
    return load_params(folder.path, read_model_config(folder.path))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_comes_back_bitwise(make_folder: Callable[..., Any], family: str) -> None:
    folder = make_folder(family)
    config = read_model_config(folder.path)
    params = load_params(folder.path, config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(Transformer(config)))
    written = dict(hf_arrays(params, config))
    assert written.keys() == folder.tensors.keys()
    for name, values in folder.tensors.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)
        assert written[name].flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_half_precision_sources_are_exact_in_float32_params(make_folder: Callable[..., Any], dtype: Any) -> None:
    folder = make_folder("llama", dtype, num_shards=3, num_hidden_layers=1)
    config = read_model_config(folder.path)
    params = load_params(folder.path, config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    for name, values in hf_arrays(params, config):
        np.testing.assert_array_equal(values.astype(dtype), folder.tensors[name], err_msg=name)


def test_params_in_bfloat16_are_rounded_to_nearest(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_hidden_layers=1)
    config = read_model_config(folder.path)
    params = load_params(folder.path, config, dtype=jnp.bfloat16)
    for name, values in hf_arrays(params, config):
        np.testing.assert_array_equal(values, folder.tensors[name].astype(ml_dtypes.bfloat16), err_msg=name)


def test_repeating_and_remaining_layers_go_to_their_own_places(make_folder: Callable[..., Any]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    folder = make_folder("qwen3", num_hidden_layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=3)
    config = read_model_config(folder.path)
    params = load_params(folder.path, config)
    up = [folder.tensors[f"model.layers.{index}.mlp.up_proj.weight"].T for index in range(5)]
    np.testing.assert_array_equal(params["stack"]["layer_0"]["mlp"]["up"]["kernel"], np.stack([up[0], up[2]]))
    np.testing.assert_array_equal(params["stack"]["layer_1"]["mlp"]["up"]["kernel"], np.stack([up[1], up[3]]))
    np.testing.assert_array_equal(params["rest"]["layer_0"]["mlp"]["up"]["kernel"], up[4])
    for name, values in hf_arrays(params, config):
        np.testing.assert_array_equal(values, folder.tensors[name], err_msg=name)


def test_eight_devices_hold_the_same_as_one(make_folder: Callable[..., Any]) -> None:
    """Splits heads, MLP width, vocabulary and model dimension at once, including fused and transposed axes."""
    folder = make_folder("llama", ml_dtypes.bfloat16, num_shards=2)
    model = Transformer(read_model_config(folder.path))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    by_name = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*map(by_name.get, names))),
        logical_axes(model),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    sharded = load_params(folder.path, model, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
    query = sharded["stack"]["layer_0"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (2, 4, 2, 4)
    jax.tree.map(np.testing.assert_array_equal, sharded, load_params(folder.path, model))
    for name, values in hf_arrays(sharded, model.config):
        np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16), folder.tensors[name], err_msg=name)


def test_a_split_head_width_is_cut_right(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_hidden_layers=1)
    model = Transformer(read_model_config(folder.path))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*({"head_dim": "x"}.get(name) for name in names))),
        logical_axes(model),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(folder.path, model, shardings),
        load_params(folder.path, model),
    )


def test_missing_extra_and_misshapen_tensors_are_all_named(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama")
    del folder.tensors["model.norm.weight"]
    folder.tensors[Q_PROJ] = folder.tensors[Q_PROJ][:8]
    folder.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
    folder.tensors["lm_head.weight"] = folder.tensors["lm_head.weight"].astype(np.int8)
    folder.write()
    with pytest.raises(ValueError, match="the weights do not fit") as error:
        load(folder)
    message = str(error.value)
    assert "missing tensor model.norm.weight, expected shape (16,)" in message
    assert f"wrong shape of {Q_PROJ} in model.safetensors: expected (16, 16), found (8, 16)" in message
    assert "extra tensor model.layers.0.self_attn.q_norm.weight in model.safetensors, shape (4,)" in message
    assert "dtype I8 of lm_head.weight in model.safetensors" in message


def test_a_long_list_of_problems_is_cut_and_counted(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama")
    folder.tensors = {"model.norm.weight": folder.tensors["model.norm.weight"]}
    folder.write()
    with pytest.raises(ValueError, match=r"and 18 more\n"):
        load(folder)


@pytest.mark.parametrize(
    ("rename", "found", "advice"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod.lm_head.weight", "torch.compile writes `_orig_mod.`"),
        (
            lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
            "model.layers.1._orig_mod.input_layernorm.weight",
            "model._orig_mod.save_pretrained",
        ),
        (lambda name: f"module.{name}", "module.lm_head.weight", "DataParallel writes `module.`"),
        (lambda name: f"decoder.{name}", "decoder.lm_head.weight", "Rename the tensors"),
    ],
)
def test_names_that_a_wrapper_or_another_library_gave_are_listed_with_what_to_do(
    make_folder: Callable[..., Any], rename: Callable[[str], str], found: str, advice: str
) -> None:
    folder = make_folder("llama")
    folder.tensors = {rename(name): tensor for name, tensor in folder.tensors.items()}
    folder.write()
    with pytest.raises(ValueError, match="do not have the names of a llama model") as caught:
        load(folder)
    assert f"found {found}" in str(caught.value)
    assert "expected model.embed_tokens.weight" in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_pipe_instead_of_weights_is_refused_before_it_is_opened(make_folder: Callable[..., Any], name: str) -> None:
    folder = make_folder("llama", num_shards=2 if "-of-" in name else 1)
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    if name == "model.safetensors":
        with pytest.raises(ValueError, match=f"{name}: expected a file of the model, found a pipe"):
            load(folder)
    with pytest.raises(ValueError, match=f"{name}: expected a file of the model, found a pipe"):
        resolve_folder(str(folder.path))


def test_rotary_buffers_and_the_head_of_a_tied_model_are_ignored(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("qwen2")
    folder.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"]
    folder.write()
    assert "lm_head" not in load(folder)
    folder.tensors["lm_head.weight"] = folder.tensors["lm_head.weight"] + np.float32(1)
    folder.write()
    with pytest.raises(ValueError, match="hold different values"):
        load(folder)
    folder.tensors["lm_head.weight"] = np.ones((39, 16), np.float32)
    folder.write()
    with pytest.raises(ValueError, match=r"wrong shape of lm_head.weight in .*expected \(\d+, 16\)"):
        load(folder)
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].astype(np.int8)
    folder.write()
    with pytest.raises(ValueError, match=r"dtype I8 of lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_named_with_their_file(make_folder: Callable[..., Any], value: float) -> None:
    folder = make_folder("llama", num_shards=2)
    folder.tensors[Q_PROJ][3, 2] = value
    folder.write(2)
    with pytest.raises(ValueError, match=rf"tensor {Q_PROJ} in .*model-0000\d-of-00002.safetensors holds NaN or Inf"):
        load(folder)


def test_missing_truncated_and_pointer_shards(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_shards=2)
    shard = folder.path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for content, message in [
        (whole[:-5], f"is truncated: its header implies {len(whole)} bytes, the file has {len(whole) - 5}"),
        (whole + b"x", "has bytes after its last tensor"),
        (whole[:40], "is truncated within its header"),
        (whole[:3], "too few for a safetensors header"),
        (b"", "too few for a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html><html>Not found</html>", "is not a safetensors file"),
        (struct.pack("<Q", 4) + b"[12]", "damaged safetensors header"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "damaged safetensors header"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=shard.name) as error:
            load(folder)
        assert message in str(error.value)
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard {shard.name} is listed in model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", 3])
def test_an_index_may_not_point_out_of_its_folder(make_folder: Callable[..., Any], file_name: Any) -> None:
    folder = make_folder("llama", num_shards=2)
    index = folder.path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file_name}}))
    with pytest.raises(ValueError, match="expected a bare file name"):
        load(folder)


def test_broken_indexes(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_shards=2)
    index = folder.path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.other": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"tensor model.other should be in model-00001-of-00002.safetensors"):
        load(folder)
    for content in ("{", "{}", '{"weight_map": {}}', "[]", "[" * 100_000):
        index.write_text(content)
        with pytest.raises(ValueError, match="weight_map"):
            load(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"2 safetensors files .* but no model.safetensors.index.json"):
        load(folder)


def test_folders_without_weights(make_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_folder("llama")
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no .*safetensors file"):
        load(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_params(tmp_path / "nowhere", read_model_config(folder.path))


def test_one_tensor_in_two_files_is_refused(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_shards=2)
    first, second = sorted(folder.path.glob("*.safetensors"))
    name, values = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: values}, second)
    with pytest.raises(ValueError, match=rf"both {first.name} and {second.name} contain tensor {name}"):
        load(folder)


def test_links_are_followed_as_the_hubs_cache_needs_it(make_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_folder("llama", num_shards=2)
    expected = load(folder)
    (tmp_path / "blobs").mkdir()
    shards = sorted(folder.path.glob("*.safetensors"))
    for number, shard in enumerate(shards):
        blob = shard.rename(tmp_path / "blobs" / f"{number:064x}")
        shard.symlink_to(blob)
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    (tmp_path / "blobs" / f"{1:064x}").unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} is listed in .* broken symlink to "):
        load(folder)


def test_headers_that_contradict_their_tensors(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_hidden_layers=1)
    path = folder.path / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def write(**changes: Any) -> None:
        text = json.dumps({**header, "model.norm.weight": {**header["model.norm.weight"], **changes}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    begin, end = header["model.norm.weight"]["data_offsets"]
    for changes in ({"shape": [17]}, {"data_offsets": [begin + 4, end + 4]}, {"data_offsets": [end, begin]}):
        write(**changes)
        with pytest.raises(ValueError, match=r"model.safetensors: damaged safetensors header"):
            load(folder)
    path.write_bytes(struct.pack("<Q", len(content)) + content[8:])
    with pytest.raises(ValueError, match="is truncated within its header"):
        load(folder)


@pytest.mark.parametrize("slab_bytes", [1, 3000])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_filled_slab_by_slab_equal_leaves_filled_at_once(
    make_folder: Callable[..., Any], slab_bytes: int, source: Any, dtype: Any
) -> None:
    """Fills stacked leaves by one or several layers at a time, and tables by rows of the file."""
    folder = make_folder("llama", source, num_hidden_layers=5)
    config = read_model_config(folder.path)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(folder.path, config, dtype=dtype, slab_bytes=slab_bytes),
        load_params(folder.path, config, dtype=dtype),
    )


def test_slabs_of_leaves_that_are_split_over_devices(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", ml_dtypes.bfloat16, num_hidden_layers=5)
    model = Transformer(read_model_config(folder.path))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    by_name = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*map(by_name.get, names))),
        logical_axes(model),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    sharded = load_params(folder.path, model, shardings, slab_bytes=3000)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
    jax.tree.map(np.testing.assert_array_equal, sharded, load_params(folder.path, model))


def test_tensors_of_a_stack_may_have_different_dtypes(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", ml_dtypes.bfloat16)
    folder.tensors[Q_PROJ] = folder.tensors[Q_PROJ].astype(np.float16)
    folder.write()
    config = read_model_config(folder.path)
    for name, values in hf_arrays(load_params(folder.path, config, slab_bytes=1), config):
        np.testing.assert_array_equal(values, folder.tensors[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("slab_bytes", [1, 2**25])
def test_params_own_their_memory_so_that_a_step_can_take_it_over(
    make_folder: Callable[..., Any], slab_bytes: int
) -> None:
    folder = make_folder("llama")
    params = load_params(folder.path, read_model_config(folder.path), slab_bytes=slab_bytes)
    places = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), params)
    scaled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(params)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), scaled) == places


def test_a_transform_takes_each_leaf_before_the_next_is_whole(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama")
    expected = load(folder)
    seen = []

    def halve(path: tuple[str, ...], leaf: jax.Array) -> dict[str, jax.Array]:
        seen.append(path)
        return {"half": leaf / 2}

    halved = load_params(folder.path, read_model_config(folder.path), transform=halve)
    assert len(set(seen)) == len(seen) == len(jax.tree.leaves(expected))
    jax.tree.map(lambda leaf, found: np.testing.assert_array_equal(leaf / 2, found["half"]), expected, halved)


def test_only_what_the_shards_of_this_process_hold_is_read(make_folder: Callable[..., Any]) -> None:
    """Fills the rest of the table with NaN, which is an error if it is read."""
    folder = make_folder("llama", num_hidden_layers=1)
    config = read_model_config(folder.path)
    rows = config.vocab_size // 2
    folder.tensors["model.embed_tokens.weight"][rows:] = np.nan
    folder.write()
    _, pieces = leaves(config)["embed", "embedding"]
    half = np.empty((rows, config.d_model), np.float32)
    with TensorFiles(tensor_entries(folder.path)) as files, ThreadPoolExecutor(2) as pool:
        reader = Reader(files, pool)
        for read in reader.read(pieces, ((0, rows), (0, config.d_model)), half):
            read.result()
    assert not reader.faults
    np.testing.assert_array_equal(half, folder.tensors["model.embed_tokens.weight"][:rows])


def test_numbers_beyond_the_range_of_the_dtype(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama")
    folder.tensors[Q_PROJ][0, 0] = 1e6
    folder.write()
    with pytest.raises(ValueError, match=rf"tensor {Q_PROJ} in .* holds values that float16 cannot"):
        load_params(folder.path, read_model_config(folder.path), dtype=np.float16)


def test_no_thread_outlives_a_transform_that_raises(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama", num_hidden_layers=1)

    def transform(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        raise MemoryError("no memory for a unit")

    with pytest.raises(MemoryError, match="no memory for a unit"):
        load_params(folder.path, read_model_config(folder.path), transform=transform)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
