"""Attention sinks: a learned score of each head that takes part in the softmax and has no value.

A query whose keys all score low gives most of its weight to the sink, so that it can attend to nothing (gpt-oss,
arXiv 2508.10925; StreamingLLM, arXiv 2309.17453). The sink is a score as it stands: no scale, soft cap or mask applies.

Axes: n sequences, t queries, h heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax_with_sinks(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Returns exp(scores) / (sum exp(scores) + exp(sinks)) over the last axis; the plain softmax without sinks.

    Args:
      scores: [..., s], in float32 or wider.
      sinks: as scores, but 1 wide, or anything that broadcasts to it.

    >>> softmax_with_sinks(jnp.zeros((1, 3)), jnp.zeros((1, 1))).tolist()
    [[0.25, 0.25, 0.25]]
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(scores.dtype)
    # The result is the same for every finite `top`, so no gradient flows through it.
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def sinks_gradient(sinks_h: jax.Array, lse_nth: jax.Array, delta_nth: jax.Array) -> jax.Array:
    """Returns the gradient of the sinks, [h], from what the backward pass of tiled attention has.

    The output depends on a sink through the sum of weights only, so the gradient is minus the sink's weight times
    `delta`, summed over the queries.

    Args:
      lse_nth: log-sum-exp of the scores and the sink.
      delta_nth: sum_k output * d_output.
    """
    # A sink is one of the scores in the sum. Only tiles that no loop visited have a smaller number in its place.
    weights_nth = jnp.exp(jnp.minimum(sinks_h.astype(lse_nth.dtype) - lse_nth, 0))
    return -(weights_nth * delta_nth).sum((0, 1)).astype(sinks_h.dtype)
