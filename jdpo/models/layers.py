"""The pieces of a decoder: projections, RMSNorm, rotary embedding, gated MLP.

Axes: n sequences, t positions, d model, h heads, k head width, f MLP width, v vocabulary.
Parameters are cast to the compute dtype where they are used; norms and rotations run in float32 at least.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jdpo.models.config import RopeConfig

INIT_STDDEV = 0.02

ADAPTERS, SCALES = "adapters", "scales"
"""Collections that may stand beside "params": what is added to frozen kernels, and the unit of int8 ones."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, kernel)`, whose gradient for the kernel keeps the cotangent's layout.

    JAX's own rule contracts the cotangent with x and transposes the result. XLA's CPU backend then writes a transposed
    copy of the wide cotangent, which takes longer than the product itself.
    """
    return jnp.einsum(equation, x, kernel)


def _project_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _project_backward(
    equation: str, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (operands, result) = residuals, equation.split("->")
    of_x, of_kernel = operands.split(",")
    return (
        jnp.einsum(f"{result},{of_kernel}->{of_x}", cotangent, kernel),
        jnp.einsum(f"{of_x},{result}->{of_kernel}", x, cotangent),
    )


project.defvjp(_project_forward, _project_backward)


class Projection(nn.Module):
    """One linear map as an einsum, with a bias over the output axes on demand.

    Where the collection SCALES has a "kernel" [*outputs], the kernel is int8 and counts in these units. Where ADAPTERS
    has "a" [*inputs, rank] and "b" [rank, *outputs], (x a) b is added; a times b is never made.

    Attributes:
      equation: e.g. "ntd,dhk->nthk".
      num_inputs: how many leading axes of the kernel are contracted; the rest are the output axes.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    compute_dtype: Any
    param_dtype: Any
    num_inputs: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), self.axes)
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        y = project(self.equation, x, kernel.astype(self.compute_dtype))
        if self.has_variable(SCALES, "kernel"):  # after the product, in which int8 is exact in every compute dtype
            y = (y * self.get_variable(SCALES, "kernel")).astype(self.compute_dtype)
        if self.has_variable(ADAPTERS, "a"):
            a, b = (self.get_variable(ADAPTERS, name).astype(self.compute_dtype) for name in ("a", "b"))
            y = y + low_rank(self.equation, x, a, b)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[self.num_inputs :])
            bias = self.param("bias", zeros, self.shape[self.num_inputs :], self.param_dtype)
            y = y + bias.astype(self.compute_dtype)
        return y


def low_rank(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x a) b: `equation` is that of x and the kernel that a [.., *inputs, rank] and b [.., rank, *outputs] adapt.

    >>> x, a, b = jnp.ones((1, 2, 3)), jnp.ones((3, 1)), jnp.ones((1, 2, 2))
    >>> low_rank("ntd,dhk->nthk", x, a, b).shape
    (1, 2, 2, 2)
    """
    operands, result = equation.split("->")
    of_x, of_kernel = operands.split(",")
    shared = "".join(axis for axis in of_kernel if axis in of_x and axis in result)
    inputs = "".join(axis for axis in of_kernel if axis in of_x and axis not in result)
    outputs = "".join(axis for axis in of_kernel if axis not in of_x)
    narrow = "".join(axis for axis in of_x if axis not in inputs) + "R"
    x_narrow = project(f"{of_x},{shared}{inputs}R->{narrow}", x, a)
    return project(f"{narrow},{shared}R{outputs}->{result}", x_narrow, b)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, rounded to x's dtype, then scaled: the order of transformers' RMSNorm."""

    epsilon: float
    axis_name: str
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    d_model: int
    d_ff: int
    compute_dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_ntd: jax.Array) -> jax.Array:
        def widen(name: str) -> jax.Array:
            shape, axes = (self.d_model, self.d_ff), ("embed", "mlp")
            projection = Projection("ntd,df->ntf", shape, axes, self.compute_dtype, self.param_dtype, name=name)
            return projection(x_ntd)

        hidden_ntf = nn.silu(widen("gate")) * widen("up")
        hidden_ntf = nn.with_logical_constraint(hidden_ntf, ("batch", "act_length", "act_mlp"))
        shape, axes = (self.d_ff, self.d_model), ("mlp", "embed")
        down = Projection("ntf,fd->ntd", shape, axes, self.compute_dtype, self.param_dtype, name="down")
        return down(hidden_ntf)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position for each rotated pair, float64 [head_dim // 2]; as transformers' modeling_rope_utils."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    assert rope.kind == "llama3", rope.kind
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    # Slow waves (few turns within the original length) are stretched by `factor`, fast ones kept, others blended.
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def rope_tables(positions_nt: jax.Array, rope: RopeConfig, head_dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [n, t, 1, head_dim // 2] of each position, ready to broadcast over heads."""
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim), dtype)
    angles = positions_nt[:, :, None, None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_nthk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + k/2) of each head, the half-split layout of Hugging Face checkpoints."""
    first, second = jnp.split(x_nthk.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_nthk.dtype)
