"""Matrix products of rows that are sorted by expert, each with its own expert's kernel.

Axes: r rows, e experts, d inputs, f outputs, b rows of a block.

"ragged" is `jax.lax.ragged_dot`, which is efficient on TPU. Elsewhere XLA would multiply every row with every expert,
so "blocks" loops over the blocks in use, each with the kernel of its expert. Gradients of kernels are summed block by
block with both: for the gradient of ragged_dot, XLA multiplies with every expert on TPU too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any

MOST_BLOCK = 512
_BLOCKS = {"cpu": (16, 8), "tpu": (128, 4)}
_OTHER_BLOCKS = 128, 1
"""The smallest number of rows per block and the average number of blocks per expert, by platform."""


class Grouping(NamedTuple):
    """Settings of grouped products; hashable.

    Attributes:
      backend: "ragged" or "blocks".
      block: number of rows of a block, all of one expert.
      gather_axes: manual mesh axes over which the kernels are split, if any. Gathered kernels are dropped after the
        product and gathered again for the backward pass.
      gather_dim: the dim of the kernels that is split.
    """

    backend: str
    block: int
    gather_axes: tuple[str, ...] = ()
    gather_dim: int = 1


def choose_grouping(num_rows: int, num_experts: int, platform: str) -> Grouping:
    """Chooses the settings for about `num_rows` rows in use.

    The last block of an expert costs as much as a full one, and starting a block takes time, although little on CPU. On
    GPU, where every block starts several programs, an expert has one or two blocks on average.
    """
    least, of_average = _BLOCKS.get(platform, _OTHER_BLOCKS)
    rows = max(num_rows // (num_experts * of_average), 1)
    block = min(max(1 << (rows.bit_length() - 1), least), MOST_BLOCK)
    return Grouping("ragged" if platform == "tpu" else "blocks", block)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(grouping: Grouping, x_rd: Array, kernel_edf: Array, sizes_e: Array) -> Array:
    """Returns [r, f]: each row times its expert's kernel, in the operands' dtype, accumulated in float32 or wider.

    Args:
      x_rd: rows sorted by expert; finite, and 0 where they only pad a block.
      kernel_edf: [e, d, f]; its gradient is summed in float32 or wider.
      sizes_e: int [e], rows of each expert, multiples of `grouping.block`. Results after them are arbitrary
        and have no gradient.
    """
    return _forward(grouping, x_rd, kernel_edf, sizes_e)[0]


def _forward(grouping: Grouping, x_rd: Array, kernel_edf: Array, sizes_e: Array) -> tuple[Array, Any]:
    return _multiply(grouping, x_rd, _gathered(grouping, kernel_edf), sizes_e), (x_rd, kernel_edf, sizes_e)


def _backward(grouping: Grouping, residuals: Any, g_rf: Array) -> tuple[Array, Array, None]:
    x_rd, kernel_edf, sizes_e = residuals
    of_rows = _multiply(grouping, g_rf, _gathered(grouping, kernel_edf), sizes_e, transposed=True)
    of_kernel = _outer(grouping, x_rd, g_rf, sizes_e)
    if grouping.gather_axes:
        # The reverse of the gather: a sum over the devices, of which each keeps its own part. Still in the wide dtype.
        of_kernel = jax.lax.psum_scatter(
            of_kernel, grouping.gather_axes, scatter_dimension=grouping.gather_dim, tiled=True
        )
    return of_rows, of_kernel.astype(kernel_edf.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _gathered(grouping: Grouping, kernel_edf: Array) -> Array:
    if not grouping.gather_axes:
        return kernel_edf
    return jax.lax.all_gather(kernel_edf, grouping.gather_axes, axis=grouping.gather_dim, tiled=True)


def _wide(*arrays: Array) -> Any:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _multiply(grouping: Grouping, x_rd: Array, kernel_edf: Array, sizes_e: Array, *, transposed: bool = False) -> Array:
    """Returns [r, f]; with `transposed`, x is [r, f], the result is [r, d], and each kernel is transposed."""
    if grouping.backend == "ragged":
        if transposed:
            kernel_edf = jnp.swapaxes(kernel_edf, 1, 2)
        dtype = _wide(x_rd, kernel_edf)
        return jax.lax.ragged_dot(x_rd, kernel_edf, sizes_e, preferred_element_type=dtype).astype(x_rd.dtype)

    def multiply(start: Array, expert: Array, y_rf: Array) -> Array:
        x_bd = jax.lax.dynamic_slice_in_dim(x_rd, start, grouping.block)
        kernel_df = jax.lax.dynamic_index_in_dim(kernel_edf, expert, keepdims=False)
        # A block has one expert, so it is one ordinary product. It reads the kernel in place either way: of kernels
        # transposed before the loop XLA keeps a second copy, for all layers at once where they are frozen.
        equation = "bf,df->bd" if transposed else "bd,df->bf"
        y_bf = jnp.einsum(equation, x_bd, kernel_df, preferred_element_type=_wide(x_bd, kernel_df)).astype(y_rf.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y_rf, y_bf, start, axis=0)

    empty = jnp.zeros((x_rd.shape[0], kernel_edf.shape[1 if transposed else 2]), x_rd.dtype)
    return _over_blocks(grouping, multiply, empty, x_rd.shape[0], sizes_e)


def _outer(grouping: Grouping, x_rd: Array, g_rf: Array, sizes_e: Array) -> Array:
    """Returns the sum of x g^T over the rows of each expert, [e, d, f], in float32 or wider."""
    dtype = _wide(x_rd, g_rf)

    def add(start: Array, expert: Array, total_edf: Array) -> Array:
        x_bd, g_bf = (jax.lax.dynamic_slice_in_dim(rows, start, grouping.block) for rows in (x_rd, g_rf))
        own_df = jax.lax.dynamic_index_in_dim(total_edf, expert, keepdims=False)
        own_df += jnp.einsum("bd,bf->df", x_bd, g_bf, preferred_element_type=dtype)
        return jax.lax.dynamic_update_index_in_dim(total_edf, own_df, expert, axis=0)

    empty = jnp.zeros((sizes_e.shape[0], x_rd.shape[1], g_rf.shape[1]), dtype)
    return _over_blocks(grouping, add, empty, x_rd.shape[0], sizes_e)


def _over_blocks(grouping: Grouping, body: Any, initial: Array, num_rows: int, sizes_e: Array) -> Array:
    """Runs `body` (first row, expert, result so far) over the blocks in use."""
    # The expert of a block is the number of experts that end at or before it.
    ends = jnp.cumsum(sizes_e) // grouping.block
    expert_of_block = (jnp.arange(num_rows // grouping.block)[:, None] >= ends).sum(-1)

    def step(index: Array, result: Array) -> Array:
        return body(index * grouping.block, expert_of_block[index], result)

    # The bound is known at run time only: blocks after the last one in use cost nothing.
    return jax.lax.fori_loop(0, ends[-1], step, initial)
