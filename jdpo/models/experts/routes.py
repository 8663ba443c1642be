"""Routes of tokens to experts, as rows sorted by expert, and the conversion of tokens to rows and back.

Axes: t tokens, k experts of a token, e experts, r rows, d model. A row is a token at one of its experts. The rows of an
expert are adjacent and start at a multiple of the block size, so that a block of rows has one expert:

    experts [t, k]     1 0 / 1 2 / - -      three tokens, the last without an expert
    sizes, block 2     2 2 2                one row of expert 0, two of expert 1, one of expert 2; whole blocks
    assignment [r]     1 -  0 2  3 -        the place of each row among (t k)
    place [t, k]       2 0 / 3 4 / - -      the inverse

Both directions, and both of their transposes, are gathers: no scatter-add, which is slow and unordered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any


class Routes(NamedTuple):
    """Rows sorted by expert.

    Attributes:
      assignment: int32 [r], the place of each row among (t k); t * k for unused rows.
      place: int32 [t, k], the row of each token and expert; r if there is none.
      expert: int32 [r], the expert of a row; the last expert after all rows in use.
      sizes: int32 [e], number of rows of each expert, in whole blocks.
    """

    assignment: Array
    place: Array
    expert: Array
    sizes: Array


def most_rows(num_tokens: int, experts_per_token: int, num_experts: int, block: int) -> int:
    """Returns a number of rows that suffices for any routing: a token has at most one row with each expert."""
    rows = num_tokens * min(experts_per_token, num_experts)
    padding = min(num_experts, rows) * (block - 1)
    return -(-(rows + padding) // block) * block


def make_routes(experts_tk: Array, num_experts: int, block: int) -> Routes:
    """Sorts tokens by expert, stably.

    Args:
      experts_tk: int [t, k], the distinct experts of each token; values outside of [0, num_experts) mean none.
      block: the rows of an expert are padded to a multiple of it.

    >>> routes = make_routes(jnp.array([[1, 0], [1, 2], [9, 9]]), 3, block=2)
    >>> routes.assignment.tolist()[:6], routes.place.tolist(), routes.sizes.tolist()
    ([1, 6, 0, 2, 3, 6], [[2, 0], [3, 4], [10, 10]], [2, 2, 2])
    """
    num_tokens, experts_per_token = experts_tk.shape
    num_rows = most_rows(num_tokens, experts_per_token, num_experts, block)
    flat = experts_tk.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    # Compared and summed, because a bincount would be a scatter-add.
    counts = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    sizes = -(-counts // block) * block
    # Where each expert begins, among the sorted assignments and among the rows, which are padded to whole blocks.
    first_sorted, first_row = jnp.cumsum(counts) - counts, jnp.cumsum(sizes) - sizes

    rows = jnp.arange(num_rows, dtype=jnp.int32)
    expert = jnp.minimum((rows[:, None] >= jnp.cumsum(sizes)).sum(-1, dtype=jnp.int32), num_experts - 1)
    nth = rows - first_row[expert]
    # Rows that only pad a block point past their expert's last assignment; the next line discards what they read.
    source = order[jnp.clip(first_sorted[expert] + nth, 0, flat.size - 1)]
    assignment = jnp.where(nth < counts[expert], source, flat.size)

    # The inverse permutation: where each assignment went.
    rank = jnp.argsort(order).astype(jnp.int32)
    own = jnp.minimum(flat, num_experts - 1)
    place = jnp.where(flat < num_experts, first_row[own] + rank - first_sorted[own], num_rows)
    return Routes(assignment, place.reshape(experts_tk.shape), expert, sizes)


def _take(values: Array, index: Array) -> Array:
    """Returns values[index], with 0 where the index is one past the end."""
    inside = index < values.shape[0]
    taken = values.at[jnp.where(inside, index, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside.reshape(inside.shape + (1,) * (values.ndim - 1)), taken, 0)


def _token(routes: Routes) -> Array:
    """Returns the token of each row, t for unused rows."""
    num_tokens, experts_per_token = routes.place.shape
    return jnp.where(routes.assignment < routes.place.size, routes.assignment // experts_per_token, num_tokens)


@jax.custom_vjp
def to_rows(x_td: Array, routes: Routes) -> Array:
    """Gathers the token of each row, [r, d]; 0 in unused rows."""
    return _take(x_td, _token(routes))


def _to_rows_forward(x_td: Array, routes: Routes) -> tuple[Array, Routes]:
    return to_rows(x_td, routes), routes


def _to_rows_backward(routes: Routes, g_rd: Array) -> tuple[Array, None]:
    wide = jnp.promote_types(g_rd.dtype, jnp.float32)
    # The gradient of a token is the sum over its k rows, rounded once.
    return _take(g_rd, routes.place).sum(1, dtype=wide).astype(g_rd.dtype), None


@jax.custom_vjp
def to_tokens(y_rd: Array, weights_tk: Array, routes: Routes) -> Array:
    """Returns the weighted sum of each token's rows, [t, d], computed in the dtype of the weights."""
    return _weighted_sum(y_rd, weights_tk, routes)


def _weighted_sum(y_rd: Array, weights_tk: Array, routes: Routes) -> Array:
    return jnp.einsum("tkd,tk->td", _take(y_rd, routes.place).astype(weights_tk.dtype), weights_tk).astype(y_rd.dtype)


def _to_tokens_forward(y_rd: Array, weights_tk: Array, routes: Routes) -> tuple[Array, Any]:
    return _weighted_sum(y_rd, weights_tk, routes), (y_rd, weights_tk, routes)


def _to_tokens_backward(residuals: Any, g_td: Array) -> tuple[Array, Array, None]:
    y_rd, weights_tk, routes = residuals
    g_rd = _take(g_td, _token(routes)).astype(weights_tk.dtype)
    of_rows = g_rd * _take(weights_tk.reshape(-1), routes.assignment)[:, None]
    of_weights = (g_rd * y_rd).sum(-1)
    return of_rows.astype(y_rd.dtype), _take(of_weights, routes.place), None


@jax.custom_vjp
def add_bias(y_rf: Array, bias_ef: Array, routes: Routes) -> Array:
    """Returns y + bias of each row's expert, in the dtype of y."""
    return y_rf + bias_ef[routes.expert]


def _add_bias_forward(y_rf: Array, bias_ef: Array, routes: Routes) -> tuple[Array, Routes]:
    return add_bias(y_rf, bias_ef, routes), routes


def _add_bias_backward(routes: Routes, g_rf: Array) -> tuple[Array, Array, None]:
    wide = jnp.promote_types(g_rf.dtype, jnp.float32)
    # A product with zeros and ones sums the rows of each expert: the transpose of the gather would be a scatter-add.
    is_own_re = routes.expert[:, None] == jnp.arange(routes.sizes.shape[0])
    # After the rows in use gradients are arbitrary, and NaN times 0 is NaN.
    in_use = jnp.arange(g_rf.shape[0]) < routes.sizes.sum()
    kept_rf = jnp.where(in_use[:, None], g_rf, 0)
    of_bias = jnp.einsum("re,rf->ef", is_own_re.astype(g_rf.dtype), kept_rf, preferred_element_type=wide)
    return g_rf, of_bias.astype(g_rf.dtype), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)
to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)
add_bias.defvjp(_add_bias_forward, _add_bias_backward)
