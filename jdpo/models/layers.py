"""The pieces of a decoder: projections, norms, MLP.

Axes: n sequences, t positions, d model, h heads, k head width, f MLP width, v vocabulary.
Parameters are cast to the compute dtype where they are used; norms and rotations run in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.model_config import Activation, ModelConfig, NormKind
from jdpo.models.xielu import XIELU

# As `initializer_range` of most families, for models that start from random weights.
INIT_STDDEV = 0.02

ADAPTERS, SCALES = "adapters", "scales"
"""Optional collections next to "params": adapters of frozen kernels, and the units of int8 kernels."""

PROJECTION = "projection"
"""Name of the output of a projection or an expert's map, with its adapter and bias added, and of x A of an adapter."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `jnp.einsum(equation, x, kernel)` with a gradient for the kernel that keeps the cotangent's layout.

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
        # x before the cotangent, so that the result is in the kernel's layout without a transpose.
        jnp.einsum(f"{of_x},{result}->{of_kernel}", x, cotangent),
    )


project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Computes `jnp.einsum(equation, left, right)`, summed and returned in float32 or wider.

    JAX's own gradient would multiply the wide cotangent, in float32, which takes several times as long. Rounded first,
    it is multiplied in the operands' dtype, as in kernels of attention.
    """
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _wide_product_forward(
    equation: str, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return wide_product(equation, left, right), (left, right)


def _wide_product_backward(
    equation: str, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (left, right), (operands, result) = residuals, equation.split("->")
    of_left, of_right = operands.split(",")
    cotangent = cotangent.astype(left.dtype)
    return (
        wide_product(f"{result},{of_right}->{of_left}", cotangent, right).astype(left.dtype),
        wide_product(f"{of_left},{result}->{of_right}", left, cotangent).astype(right.dtype),
    )


wide_product.defvjp(_wide_product_forward, _wide_product_backward)


class Projection(nn.Module):
    """A linear map as an einsum, with an optional bias over the output axes.

    If the collection SCALES has a "kernel" [*outputs], the kernel is int8 in these units. If ADAPTERS has
    "a" [*inputs, rank] and "b" [rank, *outputs], (x a) b is added; a times b is never computed.

    Attributes:
      equation: e.g. "ntd,dhk->nthk".
      num_inputs: number of leading axes of the kernel that are contracted; the others are the output axes.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
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
        # Named for the policy "dots": the sum with the adapter's part, of which the backward pass needs no other. The
        # bias is added again there, which costs nothing.
        y = checkpoint_name(y, PROJECTION)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[self.num_inputs :])
            bias = self.param("bias", zeros, self.shape[self.num_inputs :], self.param_dtype)
            y = y + bias.astype(self.compute_dtype)
        return y


def low_rank(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes (x a) b for a [.., *inputs, rank] and b [.., rank, *outputs]; `equation` is that of x and their kernel.

    >>> x, a, b = jnp.ones((1, 2, 3)), jnp.ones((3, 1)), jnp.ones((1, 2, 2))
    >>> low_rank("ntd,dhk->nthk", x, a, b).shape
    (1, 2, 2, 2)
    """
    operands, result = equation.split("->")
    of_x, of_kernel = operands.split(",")
    # An axis that is neither contracted nor new, such as that of experts, belongs to both factors.
    shared = "".join(axis for axis in of_kernel if axis in of_x and axis in result)
    inputs = "".join(axis for axis in of_kernel if axis in of_x and axis not in result)
    outputs = "".join(axis for axis in of_kernel if axis not in of_x)
    # R is the rank: upper case, so that it cannot be an axis of the equation.
    narrow = "".join(axis for axis in of_x if axis not in inputs) + "R"
    # Kept as well under the policy "dots": the gradient of b needs it, and it is far smaller than x.
    x_narrow = checkpoint_name(project(f"{of_x},{shared}{inputs}R->{narrow}", x, a), PROJECTION)
    return project(f"{narrow},{shared}R{outputs}->{result}", x_narrow, b)


class Norm(nn.Module):
    """Normalizes x over its last axes, in float32 or wider, and scales it.

    rms         x / rms(x), rounded to x's dtype, times scale: the order of operations in transformers' Llama
    rms_wide    x / rms(x) times scale, then rounded: that of its OLMo 2
    rms_offset  x / rms(x) times (1 + scale), then rounded: that of its Gemma
    layer       (x - mean) / std times scale plus bias, then rounded: torch.nn.LayerNorm
    layer_no_bias  the same without a bias: that of Cohere's models

    Attributes:
      axes: logical names of the axes normalized over, which are those of scale and bias.
    """

    kind: NormKind
    epsilon: float
    axes: tuple[str, ...]
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        # Gemma's checkpoints store the distance from 1, for which 0 is neutral.
        scale = self._param("scale", zeros if self.kind == "rms_offset" else ones, x)
        # OLMo 2 normalizes queries over heads and head width together, so there can be two axes.
        dims = tuple(range(-len(self.axes), 0))
        # In float32: in bfloat16 the mean of squares would lose most of its digits.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind in ("layer", "layer_no_bias"):
            # Centered first: E[x^2] - E[x]^2 would cancel.
            wide = wide - jnp.mean(wide, axis=dims, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=dims, keepdims=True) + self.epsilon)
        if self.kind == "rms":
            return normed.astype(x.dtype) * scale.astype(x.dtype)
        scale = scale.astype(wide.dtype)
        if self.kind == "layer":
            bias = self._param("bias", zeros, x)
            return (normed * scale + bias.astype(wide.dtype)).astype(x.dtype)
        return (normed * (1 + scale if self.kind == "rms_offset" else scale)).astype(x.dtype)

    def _param(self, name: str, init: Any, x: jax.Array) -> jax.Array:
        shape = x.shape[-len(self.axes) :]
        return self.param(name, nn.with_logical_partitioning(init, self.axes), shape, self.param_dtype)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    # Flax's default is the tanh approximation; torch's, and so Hugging Face's "gelu", is exact.
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
"""Activations without parameters: all except xielu."""


class MLP(nn.Module):
    """The MLP down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    config: ModelConfig
    compute_dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_ntd: jax.Array) -> jax.Array:
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        bias = config.mlp_bias
        # The one activation that is not in the table has parameters.
        activation = ACTIVATIONS.get(config.activation) or XIELU(self.param_dtype, name="xielu")

        def widen(name: str) -> jax.Array:
            shape, axes = (config.d_model, config.d_ff), ("embed", "mlp")
            return Projection("ntd,df->ntf", shape, axes, *dtypes, use_bias=bias, name=name)(x_ntd)

        hidden_ntf = activation(widen("gate")) * widen("up") if config.gated_mlp else activation(widen("up"))
        # Split along the width like the kernels, so that devices communicate only after "down".
        hidden_ntf = nn.with_logical_constraint(hidden_ntf, ("batch", "act_length", "act_mlp"))
        shape, axes = (config.d_ff, config.d_model), ("mlp", "embed")
        return Projection("ntf,fd->ntd", shape, axes, *dtypes, use_bias=bias, name="down")(hidden_ntf)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor, rounded once: a factor such as 0.22 would otherwise be rounded to x's dtype first."""
    if factor == 1.0:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)
