"""Attention sinks in every backend, against a softmax over the scores and one more column."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdpo.models.attention import (
    LayerCache,
    VisibleSlots,
    cached_attention,
    causal_attention,
    check_attention,
    choose_attention,
    compiled_attention,
    segment_starts,
    sharded_causal_attention,
)
from jdpo.planning.compile_only import compile_only_devices
from jdpo.planning.machines import machine_of

Arrays = tuple[np.ndarray, ...]


def inputs(lengths: np.ndarray, t: int, h: int, g: int, k: int) -> Arrays:
    """Returns query, key, value, sinks, and a cotangent that is zero on padding, in float64."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.normal(size=(len(lengths), t, heads, k)) for heads in (h, g, g, h))
    # From a sink that takes almost nothing to one that takes almost everything.
    return query, key, value, np.linspace(-3.0, 4.0, h), cotangent * real_places(lengths, t)


def real_places(lengths: np.ndarray, t: int) -> np.ndarray:
    """Returns bool [n, t, 1, 1], False on padding."""
    return (np.arange(t) < lengths.sum(1)[:, None])[..., None, None]


def with_a_column(query: Any, key: Any, value: Any, sinks: Any, lengths: Any, window: int | None, softcap: Any) -> Any:
    """Computes attention as the definition has it: the sink is one more score, whose weight is dropped."""
    n, t, h, k = query.shape
    key, value = (jnp.repeat(x, h // key.shape[2], 2) for x in (key, value))
    scores = jnp.einsum("nthk,nshk->nhts", query, key) * k**-0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    starts, places = segment_starts(lengths, t), np.arange(t)
    visible = (places[:, None] >= places) & (starts[:, :, None] == starts[:, None, :])
    visible &= places[:, None] - places < (window or t)
    column = jnp.broadcast_to(sinks[:, None, None], (n, h, t, 1))
    scores = jnp.concatenate([jnp.where(visible[:, None], scores, -jnp.inf), column], -1)
    return jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(scores)[..., :-1], value)


def results(attend: Any, arrays: Arrays, lengths: np.ndarray, dtype: Any) -> list[np.ndarray]:
    """Returns the outputs at real places and the gradients of query, key, value and sinks, in float64."""

    @jax.jit
    def step(query: Any, key: Any, value: Any, sinks: Any, cotangent: Any) -> Any:
        output, pullback = jax.vjp(attend, query, key, value, sinks)
        return jnp.where(real_places(lengths, output.shape[1]), output, 0), *pullback(cotangent)

    # Sinks are as wide as the softmax.
    dtypes = [dtype, dtype, dtype, jnp.promote_types(dtype, jnp.float32), dtype]
    found = step(*(jnp.asarray(x, y) for x, y in zip(arrays, dtypes, strict=True)))
    assert [x.dtype for x in found] == [dtype, *dtypes[:4]]
    return [np.asarray(x, np.float64) for x in found]


def exact(arrays: Arrays, lengths: np.ndarray, window: int | None = None, softcap: float | None = None) -> Any:
    with jax.enable_x64(True):
        return results(lambda *x: with_a_column(*x, lengths, window, softcap), arrays, lengths, jnp.float64)


def found_by(backend: str, arrays: Arrays, lengths: np.ndarray, dtype: Any, **options: Any) -> list[np.ndarray]:
    def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return causal_attention(query, key, value, sinks=sinks, lengths=lengths, backend=backend, **options)

    return results(attend, arrays, lengths, dtype)


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> None:
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, wanted, strict=True)]
    assert max(errors) < tolerance, errors


CASES: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "rows of one sequence": ([[48], [0], [21]], {}),
    "several per row, a window and a soft cap": ([[20, 3, 25], [9, 0, 8]], {"window": 11, "softcap": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_and_blockwise_equal_the_definition_in_float64(name: str) -> None:
    lengths, options = np.array(CASES[name][0], np.int32), CASES[name][1]
    arrays = inputs(lengths, 48, 4, 2, 8)
    wanted = exact(arrays, lengths, **options)
    with jax.enable_x64(True):
        assert_near(found_by("xla", arrays, lengths, jnp.float64, **options), wanted, 1e-12)
        assert_near(found_by("blockwise", arrays, lengths, jnp.float64, block_q=16, **options), wanted, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), pytest.param(jnp.bfloat16, 1e-2, marks=pytest.mark.full)]
)
def test_splash_emulated_equals_the_definition(dtype: Any, tolerance: float) -> None:
    lengths = np.array([[70, 58], [100, 0]], np.int32)
    arrays = tuple(np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(lengths, 128, 2, 1, 64))
    found = found_by("splash", arrays, lengths, dtype, window=50, interpret=True)
    assert_near(found, exact(arrays, lengths, 50), tolerance)


def test_without_room_for_anything_else_the_sink_takes_all() -> None:
    """A sink far above every score: the output is 0 and all gradients are finite."""
    lengths = np.array([[20], [7]], np.int32)
    query, key, value, sinks, cotangent = inputs(lengths, 20, 2, 1, 4)
    for backend in ("xla", "blockwise"):
        found = found_by(backend, (query, key, value, sinks + 1000, cotangent), lengths, jnp.float32)
        assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_a_mesh_sums_the_gradient_of_sinks_and_nothing_else(backend: str) -> None:
    lengths = np.array([[40], [3], [7], [40], [12], [33], [0], [40]], np.int32)
    arrays = inputs(lengths, 40, 4, 2, 8)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, of_sinks = (NamedSharding(mesh, PartitionSpec(*x)) for x in (("data", None, "tensor"), ("tensor",)))

    def step(query: Any, key: Any, value: Any, sinks: Any, cotangent: Any) -> Any:
        def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            options: Any = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": backend}
            return sharded_causal_attention(query, key, value, sinks=sinks, lengths=lengths, **options)

        output, pullback = jax.vjp(attend, query, key, value, sinks)
        return jnp.where(real_places(lengths, output.shape[1]), output, 0), *pullback(cotangent)

    shardings = (heads, heads, heads, of_sinks, heads)
    operands = [jax.device_put(jnp.asarray(x, jnp.float32), y) for x, y in zip(arrays, shardings, strict=True)]
    compiled = jax.jit(step).lower(*operands).compile()
    moved = re.findall(r"(\S+) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text())
    assert [x.split("{")[0] for x in moved] == ["f32[2]"]  # the sinks of a device's two heads
    assert_near([np.asarray(x, np.float64) for x in compiled(*operands)], exact(arrays, lengths), 2e-6)


def test_a_token_over_the_cache_equals_the_last_place_of_the_row() -> None:
    lengths = np.array([[9], [9]], np.int32)
    query, key, value, sinks, _ = map(jnp.asarray, inputs(lengths, 9, 4, 2, 8))
    whole = causal_attention(query, key, value, sinks=sinks, lengths=jnp.asarray(lengths), backend="xla")
    # Two prompts of six tokens with one answer each, of which the third token is next.
    prompt, tail = (tuple(x[:, part].swapaxes(1, 2) for x in (key, value)) for part in (slice(6), slice(6, 9)))
    cache = LayerCache(prompt[0].mT, prompt[1], tail[0].mT[:, None], tail[1][:, None])
    visible = VisibleSlots(jnp.ones((2, 1, 6), bool), jnp.ones((2, 1, 3), bool))
    found = cached_attention(query[:, 8:], cache, visible, sinks_h=sinks)
    np.testing.assert_allclose(found, whole[:, 8:], atol=1e-6)


def test_cudnn_has_no_sinks() -> None:
    assert choose_attention("gpu", "bfloat16", 64, 4096, compute_capability="9.0") == "cudnn"
    assert choose_attention("gpu", "bfloat16", 64, 4096, sinks=True, compute_capability="9.0") == "blockwise"
    assert choose_attention("tpu", "bfloat16", 64, 4096, sinks=True) == "splash"
    with pytest.raises(ValueError, match=r"no attention sinks .*; xla, blockwise, splash can run this"):
        check_attention("cudnn", dtype="bfloat16", head_dim=64, sinks=True)
    x = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"sinks \[h\], one for each of 2 query heads; found \(1,\)"):
        causal_attention(x, x, x, sinks=jnp.zeros(1), lengths=jnp.array([8]), backend="xla")


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
def test_splash_with_sinks_compiles_for_tpu() -> None:
    devices = compile_only_devices(machine_of("v5e-4"))
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows, of_sinks = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", None, "tensor"), ("data",), ("tensor",))
    )
    shapes = [jax.ShapeDtypeStruct((4, 600, h, 64), jnp.bfloat16, sharding=heads) for h in (16, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((16,), jnp.float32, sharding=of_sinks))
    options: Any = {"mesh": mesh, "batch_axes": ("data",), "head_axes": ("tensor",), "backend": "splash", "window": 128}

    def loss(query: Any, key: Any, value: Any, sinks: Any, lengths: Any) -> Any:
        attend = sharded_causal_attention(query, key, value, sinks=sinks, lengths=lengths, **options)
        return attend.astype(jnp.float32).sum()

    lengths = jax.ShapeDtypeStruct((4, 5), jnp.int32, sharding=rows)
    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*shapes, lengths).compile().as_text()
    assert compiled_attention(text) == {"splash"}
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, query gradient, key and value gradients
