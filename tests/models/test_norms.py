"""Norms and scales against values by hand, and in bfloat16 against the rounding of transformers' torch classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.layers import Norm, scaled

CLASSES = {
    "rms": ("llama", "LlamaRMSNorm"),
    "rms_wide": ("olmo2", "Olmo2RMSNorm"),
    "rms_offset": ("gemma2", "Gemma2RMSNorm"),
    "layer_no_bias": ("cohere2", "Cohere2LayerNorm"),
}


def run(kind: Any, x: Any, scale: Any, bias: Any = None, axes: tuple[str, ...] = ("norm",)) -> jax.Array:
    params = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
    return Norm(kind, 1e-6, axes, jnp.float32).apply({"params": params}, x)


def test_by_hand() -> None:
    """Uses (3, 4): its root mean square is 5 / sqrt 2; standardized it is (-1, 1)."""
    x, scale, unit = jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 2**0.5 / 5
    for kind in ("rms", "rms_wide"):
        np.testing.assert_allclose(run(kind, x, scale), [[3 * unit, 8 * unit]], rtol=1e-6)
    np.testing.assert_allclose(run("rms_offset", x, scale), [[6 * unit, 12 * unit]], rtol=1e-6)
    np.testing.assert_allclose(run("layer", x, scale, jnp.array([0.5, 0.0])), [[-0.5, 2.0]], rtol=1e-5)
    np.testing.assert_allclose(run("layer_no_bias", x, scale), [[-1.0, 2.0]], rtol=1e-5)


def test_a_norm_over_two_axes_is_that_of_both_together() -> None:
    x, scale = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, 6), (4, 6)))
    expected = run("rms", x.reshape(2, 3, 24), scale.reshape(24)).reshape(x.shape)
    np.testing.assert_allclose(run("rms", x, scale, axes=("heads", "head_dim")), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [*CLASSES, "layer"])
def test_a_fresh_norm_scales_by_one(kind: Any) -> None:
    made = Norm(kind, 1e-6, ("norm",), jnp.float32).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert {name: leaf.value.tolist() for name, leaf in made.items()} == {
        "scale": [0.0 if kind == "rms_offset" else 1.0] * 3,
        **({"bias": [0.0] * 3} if kind == "layer" else {}),
    }


def test_a_factor_is_not_itself_rounded() -> None:
    """Scales by 0.22, which would be 0.2197 in bfloat16, 0.12 % less."""
    x = jnp.arange(1, 200, dtype=jnp.bfloat16)
    expected = (np.float32(0.22) * np.asarray(x, np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(scaled(x, 0.22), expected)
    assert (scaled(x, 0.22) != x * jnp.bfloat16(0.22)).any()
    assert scaled(x, 1.0) is x


@pytest.mark.torch
@pytest.mark.parametrize("kind", [*CLASSES, "layer"])
def test_bfloat16_is_rounded_as_in_torch(kind: Any) -> None:
    import importlib

    import torch

    values = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    scale, bias = np.random.default_rng(1).normal(1, 0.3, (2, 48)).astype(np.float32)
    if kind == "layer":
        module = torch.nn.LayerNorm(48, eps=1e-6)
        module.bias.data = torch.tensor(bias)
    else:
        family, name = CLASSES[kind]
        module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(48, eps=1e-6)
    module.weight.data = torch.tensor(scale)
    with torch.no_grad():
        expected = module.to(torch.bfloat16)(torch.tensor(values).bfloat16()).float().numpy()
    x, narrow = jnp.asarray(values, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16)
    found = run(kind, x, narrow, jnp.asarray(bias, jnp.bfloat16) if kind == "layer" else None)
    assert found.dtype == jnp.bfloat16
    # Another order of summing 48 numbers may round the last bit of a few differently.
    apart = np.asarray(found, np.float32) != expected
    assert apart.mean() < 0.01
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-7)
