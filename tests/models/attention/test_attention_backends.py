"""Every attention backend against the plain path; refused settings, and the kernels in compiled programs."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdpo.models.attention import (
    ATTENTION_RESIDUALS,
    causal_attention,
    check_attention,
    choose_attention,
    compiled_attention,
    sharded_causal_attention,
)

Arrays = tuple[np.ndarray, ...]
GPU = {"platform": "gpu"}


def inputs(n: int, t: int, h: int, g: int, k: int, lengths: list[int]) -> tuple[Arrays, np.ndarray]:
    """Returns query, key, value, a cotangent that is zero on padding (all float64), and lengths."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.normal(size=(n, t, heads, k)) for heads in (h, g, g, h))
    sizes = np.array(lengths, np.int32)
    real = np.arange(t) < sizes[:, None]
    return (2 * query, key, value, cotangent * real[..., None, None]), sizes


def run(arrays: Arrays, lengths: np.ndarray, dtype: str, **options: Any) -> list[np.ndarray]:
    """Returns the outputs at real positions and the gradients of query, key and value, in float64."""

    @jax.jit
    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        def attend(*operands: Any) -> Any:
            return causal_attention(*operands, lengths=lengths, **options)

        output, pullback = jax.vjp(attend, query, key, value)
        real = jnp.arange(output.shape[1]) < lengths[:, None]
        return jnp.where(real[..., None, None], output, 0), *pullback(cotangent)

    results = step(*(jnp.asarray(x, dtype) for x in arrays), lengths)
    assert all(x.dtype == dtype for x in results)
    return [np.asarray(x, np.float64) for x in results]


def exact(arrays: Arrays, lengths: np.ndarray, **options: Any) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return run(arrays, lengths, "float64", backend="xla", **options)


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> None:
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, wanted, strict=True)]
    assert max(errors) < tolerance, errors


SHAPES = {
    # Tiles of 16: windows that end within a tile, at its edge, one past it, and within the diagonal tile.
    "tiles": ((3, 96, 4, 2, 8, [96, 0, 50]), {"block_q": 16}),
    "window 33": ((3, 96, 4, 2, 8, [96, 0, 50]), {"block_q": 16, "window": 33}),
    "window 32": ((2, 96, 2, 1, 8, [96, 50]), {"block_kv": 16, "window": 32}),
    "window 7 and soft cap": ((2, 60, 4, 4, 8, [60, 17]), {"block_q": 16, "window": 7, "softcap": 3.0}),
    "soft cap": ((2, 40, 4, 1, 8, [40, 1]), {"block_q": 16, "softcap": 2.0, "scale": 0.5}),
    "one tile": ((4, 20, 6, 2, 10, [20, 3, 11, 20]), {}),
    "default tiles": ((2, 300, 3, 1, 16, [300, 170]), {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_blockwise_equals_the_plain_path_in_float64(name: str) -> None:
    shape, options = SHAPES[name]
    arrays, lengths = inputs(*shape)
    wanted = exact(arrays, lengths, **{x: y for x, y in options.items() if not x.startswith("block")})
    with jax.enable_x64(True):
        assert_near(run(arrays, lengths, "float64", backend="blockwise", **options), wanted, 1e-12)


@pytest.mark.parametrize("backend", ["xla", "blockwise", "cudnn", "splash"])
def test_a_window_that_hides_nothing_is_none(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    t = 128

    def program(window: int | None) -> str:
        def attend(query: Any, key: Any, value: Any) -> Any:
            lengths = np.array([t, 9], np.int32)
            return causal_attention(query, key, value, lengths=lengths, backend=backend, window=window, **tiles)

        tiles = {"block_q": 16} if backend == "blockwise" else {}
        x = jax.ShapeDtypeStruct((2, t, 2, 64), jnp.bfloat16)
        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(attend)(x, x, x)))

    assert program(t) == program(4096) == program(None)
    assert program(t - 1) != program(None)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_low_precision_stays_near_float64(backend: str, dtype: str, tolerance: float) -> None:
    arrays, lengths = inputs(2, 200, 4, 2, 16, [200, 77])
    arrays = tuple(np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays)
    assert_near(run(arrays, lengths, dtype, backend=backend), exact(arrays, lengths), tolerance)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_no_product_of_low_precision_has_wide_operands(backend: str) -> None:
    x = jax.ShapeDtypeStruct((1, 48, 2, 8), jnp.bfloat16)

    def loss(query: Any, key: Any, value: Any) -> Any:
        return causal_attention(query, key, value, lengths=np.array([40]), backend=backend).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    operands = re.findall(r"dot_general .*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
    assert operands
    assert set(operands) == {("bf16", "bf16")}


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_padding_changes_nothing_and_gets_no_gradient(backend: str) -> None:
    (query, key, value, cotangent), lengths = inputs(2, 40, 2, 1, 8, [40, 21])
    padding = np.arange(40) >= lengths[:, None]
    results = run((query, key, value, cotangent), lengths, "float32", backend=backend)
    dirty = (np.where(padding[..., None, None], 100.0, x) for x in (query, key, value))
    for clean, found in zip(results, run((*dirty, cotangent), lengths, "float32", backend=backend), strict=True):
        np.testing.assert_array_equal(found, clean)
        assert not found[padding].any()


def test_blockwise_skips_fully_masked_tiles() -> None:
    """Fills masked tiles with NaN: a weight of 0 times NaN is NaN, so without NaN no tile was computed."""
    arrays, lengths = inputs(1, 96, 2, 1, 8, [60])
    _, key, value, cotangent = arrays
    cotangent[0, :32] = 0
    for x in (key, value):
        x[0, 64:] = np.nan  # after the last tile with real queries
        x[0, :16] = np.nan  # out of sight of queries from 32 on
    output, d_query, d_key, d_value = run(arrays, lengths, "float32", backend="blockwise", block_q=16, window=16)
    assert np.isnan(output[0, :32]).all()
    assert np.isfinite(output[0, 32:]).all()
    assert np.isfinite(d_query[0, 32:]).all()
    assert np.isfinite(d_key[0, 32:]).all()
    assert np.isfinite(d_value[0, 32:]).all()


def test_blockwise_holds_no_scores_of_all_pairs() -> None:
    t = 4096
    shapes = [jax.ShapeDtypeStruct((1, t, heads, 8), jnp.float32) for heads in (2, 1, 1)]
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def loss(query: Any, key: Any, value: Any, lengths: Any, backend: str) -> Any:
        return causal_attention(query, key, value, lengths=lengths, backend=backend).sum()

    def largest(backend: str) -> int:
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames="backend")
        text = gradient.lower(*shapes, lengths, backend=backend).compile().as_text()
        sizes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)
        return max(int(np.prod([int(x) for x in size.split(",")])) for size in sizes)

    assert largest("blockwise") < t * t / 16
    assert largest("xla") >= t * t


def test_saved_by_name_the_forward_pass_runs_once() -> None:
    arrays, lengths = inputs(2, 40, 2, 1, 8, [40, 21])

    def num_loops(policy: Any) -> int:
        def loss(query: Any, key: Any, value: Any) -> Any:
            return causal_attention(query, key, value, lengths=lengths, backend="blockwise", block_q=16).sum()

        gradient = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
        return jax.jit(gradient).lower(*arrays[:3]).as_text().count("stablehlo.while")

    saved = num_loops(checkpoint_policies.save_only_these_names(ATTENTION_RESIDUALS))
    assert saved < num_loops(checkpoint_policies.nothing_saveable)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_a_mesh_gives_the_same_without_communication(backend: str) -> None:
    arrays, lengths = inputs(8, 40, 4, 2, 8, [40, 3, 7, 40, 12, 33, 0, 40])
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        def attend(*operands: Any) -> Any:
            options = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": backend}
            return sharded_causal_attention(*operands, lengths=lengths, **options)

        output, pullback = jax.vjp(attend, query, key, value)
        real = jnp.arange(output.shape[1]) < lengths[:, None]
        return jnp.where(real[..., None, None], output, 0), *pullback(cotangent)

    operands = [jax.device_put(jnp.asarray(x, jnp.float32), heads) for x in arrays]
    operands.append(jax.device_put(lengths, NamedSharding(mesh, PartitionSpec("data"))))
    compiled = jax.jit(step).lower(*operands).compile()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    assert_near([np.asarray(x, np.float64) for x in compiled(*operands)], exact(arrays, lengths), 2e-6)
    with pytest.raises(ValueError, match="1 key heads do not divide over the 2 devices"):
        sharded_causal_attention(
            *(x[:, :, :1] for x in operands[:3]),
            lengths=operands[4],
            mesh=mesh,
            batch_axes=("data",),
            head_axes=("tensor",),
            backend=backend,
        )


@pytest.mark.parametrize(
    ("length", "heads", "options"),
    [
        (200, (2, 1, 64), {}),
        (256, (2, 1, 64), {"window": 100, "softcap": 5.0, "block_q": 128, "block_kv": 128}),
        (256, (4, 2, 128), {"block_q": 128, "block_kv": 128}),
    ],
)
def test_splash_emulated_equals_the_plain_path(
    length: int, heads: tuple[int, int, int], options: dict[str, Any]
) -> None:
    arrays, lengths = inputs(1, length, *heads, [length - 30])
    found = run(arrays, lengths, "float32", backend="splash", interpret=True, **options)
    assert_near(found, exact(arrays, lengths, **{x: y for x, y in options.items() if not x.startswith("block")}), 2e-6)


@pytest.mark.parametrize(
    ("arguments", "gpu", "name"),
    [
        (("cpu", "float32", 64, 1024), None, "blockwise"),
        (("cpu", "float32", 64, 32), None, "xla"),
        (("gpu", "bfloat16", 128, 4096), "8.0", "cudnn"),
        (("cuda", "float16", 64, 16, None, 8), "9.0", "cudnn"),
        (("gpu", "float32", 64, 4096), "9.0", "blockwise"),
        (("gpu", "bfloat16", 100, 512), "9.0", "xla"),
        (("gpu", "bfloat16", 256, 4096, 50.0), "9.0", "blockwise"),
        # One of each generation: V100, T4, A100, L4, H100, B200.
        (("gpu", "float16", 64, 4096), "7.0", "blockwise"),
        (("gpu", "float16", 64, 512), "7.5", "xla"),
        (("gpu", "bfloat16", 256, 4096), "8.0", "blockwise"),
        (("gpu", "bfloat16", 136, 4096), "8.9", "blockwise"),
        (("gpu", "bfloat16", 256, 4096), "9.0", "cudnn"),
        (("gpu", "bfloat16", 256, 4096), "10.0", "cudnn"),
        (("gpu", "bfloat16", 128, 4096), "ROCm", "blockwise"),
        (("rocm", "bfloat16", 128, 512), "ROCm", "xla"),
        (("tpu", "bfloat16", 128, 4096, 50.0, 1024), None, "splash"),
        (("tpu", "float16", 128, 4096), None, "blockwise"),
        (("tpu", "bfloat16", 128, 64), None, "xla"),
    ],
)
def test_the_chosen_backend_supports_the_device(arguments: tuple[Any, ...], gpu: str | None, name: str) -> None:
    assert choose_attention(*arguments, compute_capability=gpu) == name
    platform, dtype, head_dim, _, softcap, window = (*arguments, None, None)[:6]
    limits = {"dtype": dtype, "head_dim": head_dim, "softcap": softcap, "window": window}
    check_attention(name, platform=platform, compute_capability=gpu, **limits)


@pytest.mark.parametrize(
    ("platform", "length", "name"),
    [("cpu", 16, "blockwise"), ("gpu", 16, "blockwise"), ("gpu", 4096, "blockwise"), ("tpu", 16, "splash")],
)
def test_auto_with_tile_sizes_chooses_a_backend_with_tiles(platform: str, length: int, name: str) -> None:
    assert choose_attention(platform, "bfloat16", 128, length, tiled=True, compute_capability="9.0") == name
    check_attention(name, dtype="bfloat16", head_dim=128, block_q=128, platform=platform, compute_capability="9.0")


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("flash", {}, "expected one of xla, blockwise, cudnn, splash, found 'flash'"),
        ("cudnn", {"dtype": "float32"}, r"float16 or bfloat16 \(found float32\); xla, blockwise, splash can run this"),
        ("cudnn", {"head_dim": 264}, r"multiple of 8 and at most 256 \(found 264\)"),
        ("cudnn", {"head_dim": 20}, r"multiple of 8 and at most 256 \(found 20\)"),
        ("cudnn", {"softcap": 30.0}, r"no softcap \(found 30.0\); xla, blockwise, splash can"),
        ("cudnn", {"platform": "tpu"}, r"an NVIDIA GPU \(found tpu\); xla, blockwise, splash can"),
        ("cudnn", {**GPU, "compute_capability": "ROCm"}, r"an NVIDIA GPU \(found ROCm\); xla, blockwise can run this"),
        ("cudnn", {**GPU, "compute_capability": "7.5"}, r"capability 8.0 or more \(found 7.5\); xla, blockwise can"),
        (
            "cudnn",
            {**GPU, "compute_capability": "8.9", "head_dim": 256},
            r"capability 9.0 or more for a head_dim of 256 \(found 8.9\); xla, blockwise can run this",
        ),
        ("cudnn", {"block_q": 128}, r"no block_q \(found 128\); blockwise, splash can"),
        ("xla", {"block_kv": 64}, r"no block_kv \(found 64\); blockwise can"),
        ("splash", {"platform": "cpu"}, r"a TPU \(found cpu\); xla, blockwise can"),
        ("splash", {"block_q": 192}, r"block_q to be a multiple of 128 \(found 192\); blockwise can"),
        ("splash", {"dtype": "float64"}, r"float32 or bfloat16 \(found float64\); xla, blockwise can"),
        ("blockwise", {"block_q": 128, "block_kv": 256}, r"to be equal \(found 128 and 256\); splash can"),
        ("blockwise", {"block_q": 100}, r"block_q to be a multiple of 16 \(found 100\); no backend can"),
        ("blockwise", {"window": 0}, r"a window of at least 1 \(found 0\); no backend can"),
        ("xla", {"softcap": 0.0}, r"a softcap above 0 \(found 0.0\); no backend can"),
    ],
)
def test_unsupported_settings_of_a_backend_are_refused_by_name(
    backend: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention(backend, **({"dtype": "bfloat16", "head_dim": 64} | options))


def test_a_refused_call_and_shapes_that_do_not_fit() -> None:
    x, lengths = jnp.zeros((2, 16, 3, 8)), jnp.array([16, 4])
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        causal_attention(x, x, x, lengths=lengths, backend="cudnn")
    with pytest.raises(ValueError, match="g a divisor of h"):
        causal_attention(x, x[:, :, :2], x[:, :, :2], lengths=lengths, backend="xla")
    with pytest.raises(ValueError, match=r"lengths \[n\]"):
        causal_attention(x, x, x, lengths=lengths[:1], backend="xla")


@pytest.mark.parametrize("length", [48, 160])
def test_the_compiled_program_holds_what_was_chosen(length: int) -> None:
    backend = choose_attention("cpu", "float32", 8, length)
    arrays, lengths = inputs(2, length, 2, 1, 8, [length, 9])

    def loss(query: Any, key: Any, value: Any) -> Any:
        return causal_attention(query, key, value, lengths=lengths, backend=backend).sum()

    assert compiled_attention(jax.jit(jax.grad(loss)).lower(*arrays[:3]).compile().as_text()) == {backend}


def test_a_kernel_counts_only_where_its_custom_call_is() -> None:
    scope = 'metadata={op_name="jit(step)/attention_cudnn/dot"}'
    assert compiled_attention(f"dot(a, b), {scope}") == frozenset()
    assert compiled_attention(f'custom_call_target="__cudnn$fmhaSoftmax", {scope}') == {"cudnn"}


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_lowers_to_its_kernels(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers for CUDA without a GPU; only the version of the installed cuDNN is supplied."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

    def loss(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        return causal_attention(query, key, value, lengths=lengths, backend="cudnn", window=window).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(re.findall(r"__cudnn\$\w+", text))
    for setting in (f"sliding_window_length: {window or 0},", "mask_type: PADDING_CAUSAL,", "fmha_scale: 0.125,"):
        assert text.replace(r"\22", "").count(setting) == 2


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash_compiles_for_tpu(topology: str, head_dim: int) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    shapes = [jax.ShapeDtypeStruct((4, 1024, h, head_dim), jnp.bfloat16, sharding=heads) for h in (8, 2, 2)]
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    options = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": "splash"}

    def loss(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        return sharded_causal_attention(query, key, value, lengths=lengths, **options).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, lengths).compile().as_text()
    assert compiled_attention(text) == {"splash"}
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, query gradient, key and value gradients
