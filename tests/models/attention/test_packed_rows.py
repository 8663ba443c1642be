"""Several sequences in a row of attention, against one sequence per row."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
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
    compiled_attention,
    segment_starts,
    sequences_per_row,
    sharded_causal_attention,
)
from jdpo.models.attention.work import causal_pairs, computed_pairs
from jdpo.planning.compile_only import compile_only_devices
from jdpo.planning.machines import machine_of

Arrays = list[np.ndarray]


def random_rows(rng: np.random.Generator, n: int, t: int, u: int) -> np.ndarray:
    """Returns lengths [n, u]; the first row is full, the second has empty sequences, and the last is empty."""
    totals = [t, *rng.integers(1, t + 1, n - 2), 0]
    ends = np.array([[*np.sort(rng.integers(0, total + 1, u - 1)), total] for total in totals])
    ends[1, : u // 2] = ends[1, u // 2]
    return np.diff(ends, axis=1, prepend=0).astype(np.int32)


def inputs(lengths: np.ndarray, t: int, h: int, g: int, k: int) -> Arrays:
    """Returns query, key, value, and a cotangent that is zero on padding, [n, t, ., k] in float64."""
    rng = np.random.default_rng(1)
    *operands, cotangent = (rng.normal(size=(len(lengths), t, heads, k)) for heads in (h, g, g, h))
    return [*operands, cotangent * (np.arange(t) < lengths.sum(1)[:, None])[..., None, None]]


def run(arrays: Arrays, lengths: np.ndarray, dtype: str, **options: Any) -> Arrays:
    """Returns the outputs at real places and the gradients of query, key and value."""

    @jax.jit
    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        output, pullback = jax.vjp(lambda *x: causal_attention(*x, lengths=lengths, **options), query, key, value)
        real = jnp.arange(output.shape[1]) < lengths.reshape(len(lengths), -1).sum(1)[:, None]
        return jnp.where(real[..., None, None], output, 0), *pullback(cotangent)

    return [np.asarray(x, np.float64) for x in step(*(jnp.asarray(x, dtype) for x in arrays), lengths)]


def alone(arrays: Arrays, lengths: np.ndarray, **options: Any) -> Arrays:
    """Runs the plain path in float64 with every sequence in a row of its own, and joins the results."""
    ends = lengths.cumsum(1)
    places = [(row, ends[row, i] - lengths[row, i], ends[row, i]) for row, i in np.ndindex(*lengths.shape)]
    apart = [np.zeros((len(places), *x.shape[1:])) for x in arrays]
    for x, own in zip(arrays, apart, strict=True):
        for index, (row, start, end) in enumerate(places):
            own[index, : end - start] = x[row, start:end]
    with jax.enable_x64(True):
        found = run(apart, lengths.reshape(-1), "float64", backend="xla", **options)
    joined = [np.zeros_like(x) for x in (arrays[0], *arrays[:3])]
    for x, own in zip(joined, found, strict=True):
        for index, (row, start, end) in enumerate(places):
            x[row, start:end] = own[index, : end - start]
    return joined


def assert_near(found: Arrays, wanted: Arrays, tolerance: float) -> None:
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, wanted, strict=True)]
    assert max(errors) < tolerance, errors


# Rows, places, sequences of a row; heads, key heads, width; options. Windows and soft caps are of the model.
CASES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]] = {
    "tiles": ((4, 96, 5), (4, 2, 8), {}),
    "window and soft cap": ((4, 90, 7), (4, 1, 8), {"window": 21, "softcap": 3.0, "scale": 0.5}),
    "default tiles": ((3, 60, 4), (2, 1, 4), {"block_q": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_a_row_do_not_see_each_other(name: str) -> None:
    (n, t, u), heads, options = CASES[name]
    lengths = random_rows(np.random.default_rng(len(name)), n, t, u)
    arrays = inputs(lengths, t, *heads)
    tiles = {"block_q": options.get("block_q", 16)}
    plain = {name: setting for name, setting in options.items() if name != "block_q"}
    wanted = alone(arrays, lengths, **plain)
    with jax.enable_x64(True):
        assert_near(run(arrays, lengths, "float64", backend="xla", **plain), wanted, 1e-12)
        assert_near(run(arrays, lengths, "float64", backend="blockwise", **plain, **tiles), wanted, 1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 50, "softcap": 5.0, "block_q": 128, "block_kv": 256}])
def test_splash_emulated_hides_other_sequences(options: dict[str, Any]) -> None:
    lengths = np.array([[70, 0, 60, 30]], np.int32)
    arrays = inputs(lengths, 200, 2, 1, 64)
    wanted = alone(arrays, lengths, **{name: x for name, x in options.items() if not name.startswith("block")})
    assert_near(run(arrays, lengths, "float32", backend="splash", interpret=True, **options), wanted, 2e-6)


@pytest.mark.parametrize("backend", ["xla", "blockwise", "splash", "cudnn"])
def test_one_sequence_per_row_is_the_program_without_segments(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)

    def program(lengths: list[Any]) -> str:
        sizes = np.array(lengths, np.int32)
        traced = jax.make_jaxpr(lambda *operands: causal_attention(*operands, lengths=sizes, backend=backend))(x, x, x)
        return re.sub(r"0x[0-9a-f]+", "", str(traced))

    assert program([128, 9]) == program([[128], [9]])


def test_blockwise_computes_no_tile_before_the_sequence_of_its_queries() -> None:
    """Fills keys with NaN: a weight of 0 times NaN is NaN, so without NaN no tile of them was computed."""
    lengths = np.array([[40, 24, 16, 0]], np.int32)
    query, key, value, cotangent = inputs(lengths, 96, 2, 1, 8)
    cotangent[0, :48] = 0
    for x in (key, value):
        x[0, :32] = np.nan  # the second sequence starts in the third tile of 16
        x[0, 80:] = np.nan  # after the last real place
    output, *gradients = run([query, key, value, cotangent], lengths, "float32", backend="blockwise", block_q=16)
    assert np.isnan(output[0, :32]).all()
    for x in (output, *gradients):
        assert np.isfinite(x[0, 48:]).all()


@pytest.mark.parametrize("window", [None, 5, 24])
def test_computed_pairs_of_packed_rows_are_those_of_tiles_that_a_query_needs(window: int | None) -> None:
    lengths = random_rows(np.random.default_rng(3), 6, 80, 4)
    starts, places, tile = segment_starts(lengths, 80), np.arange(80), 16
    real = places < lengths.sum(1)[:, None]
    seen = (starts[:, :, None] == starts[:, None, :]) & (places[:, None] >= places) & real[:, :, None]
    if window is not None:
        seen &= places[:, None] - places < window
    tiles = seen.reshape(6, 5, tile, 5, tile).any((2, 4)).sum()
    options = {"num_heads": 2, "window": window}
    assert computed_pairs("blockwise", lengths, 80, block_q=tile, **options) == tiles * tile**2
    assert seen.sum() == causal_pairs((places - starts)[real], window)
    assert computed_pairs("xla", lengths, 80, **options) == 6 * 80**2
    # Away from CPUs all rows are one group, with the tiles that any of them needs.
    together = computed_pairs("blockwise", lengths, 80, block_q=tile, on_cpu=False, **options)
    assert tiles * tile**2 < together <= 6 * 15 * tile**2


def test_a_mesh_splits_rows_of_several_sequences() -> None:
    lengths = random_rows(np.random.default_rng(5), 4, 40, 3)
    arrays = inputs(lengths, 40, 4, 2, 8)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    options = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": "blockwise", "block_q": 16}

    @jax.jit
    def attend(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        segments = segment_starts(lengths, 40)
        return sharded_causal_attention(query, key, value, lengths=lengths, segments=segments, **options)

    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    operands = [jax.device_put(jnp.asarray(x, jnp.float32), split) for x in arrays[:3]]
    output = np.asarray(attend(*operands, jax.device_put(lengths, NamedSharding(mesh, PartitionSpec("data")))))
    real = np.arange(40) < lengths.sum(1)[:, None]
    np.testing.assert_allclose(output[real], alone(arrays, lengths)[0][real], atol=1e-5)


def test_the_most_sequences_of_a_row() -> None:
    found = {name: sequences_per_row(name, "cpu") for name in ("xla", "blockwise")}
    assert found == {"xla": None, "blockwise": None}
    assert sequences_per_row("splash", "tpu") is None
    assert sequences_per_row("cudnn", "gpu") == 1
    assert sequences_per_row("blockwise", "cuda") == sequences_per_row("blockwise", "tpu") == 1


def test_shapes_of_lengths_and_segments_are_checked() -> None:
    x = jnp.zeros((2, 16, 2, 8))
    for arrays in ({"lengths": jnp.zeros((2, 3, 1))}, {"lengths": jnp.zeros((3, 2))}):
        with pytest.raises(ValueError, match=r"lengths \[n\] or \[n, u\]"):
            causal_attention(x, x, x, backend="xla", **arrays)
    half = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"'cudnn' takes one sequence per row, found lengths \(2, 3\)"):
        causal_attention(half, half, half, backend="cudnn", lengths=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"segments \[n, t\]"):
        causal_attention(x, x, x, backend="xla", lengths=jnp.zeros((2, 3)), segments=jnp.zeros((2, 15)))


@pytest.mark.parametrize(
    ("backend", "platform", "loop"), [("blockwise", "cpu", "stablehlo.while"), ("splash", "tpu", "@tpu_custom_call")]
)
def test_saved_by_name_the_forward_pass_of_packed_rows_runs_once(backend: str, platform: str, loop: str) -> None:
    lengths, x = np.array([[100, 28], [0, 9]], np.int32), jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.float32)

    def num_loops(policy: Any) -> int:
        def loss(query: Any, key: Any, value: Any) -> Any:
            return causal_attention(query, key, value, lengths=lengths, backend=backend).sum()

        traced = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy))).trace(x, x, x)
        return traced.lower(lowering_platforms=(platform,)).as_text().count(loop)

    saved = num_loops(checkpoint_policies.save_only_these_names(ATTENTION_RESIDUALS))
    assert 0 < saved < num_loops(checkpoint_policies.nothing_saveable)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
@pytest.mark.parametrize("options", [{}, {"window": 300, "softcap": 30.0}])
def test_splash_with_segments_compiles_for_tpu(options: dict[str, Any]) -> None:
    devices = compile_only_devices(machine_of("v5e-4"))
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", None, "tensor"), ("data",)))
    shapes = [jax.ShapeDtypeStruct((4, 600, h, 128), jnp.bfloat16, sharding=heads) for h in (8, 2, 2)]
    over_mesh = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": "splash"}

    def loss(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        segments = segment_starts(lengths, 600)
        attend = partial(sharded_causal_attention, lengths=lengths, segments=segments, **over_mesh, **options)
        return attend(query, key, value).astype(jnp.float32).sum()

    lengths = jax.ShapeDtypeStruct((4, 5), jnp.int32, sharding=rows)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, lengths).compile().as_text()
    assert compiled_attention(text) == {"splash"}
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, query gradient, key and value gradients
