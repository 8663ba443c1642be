"""cuDNN's fused attention, by its name: without it `jax.nn.dot_product_attention` takes the plain path silently."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"
"""What jaxprs call the forward kernel that leaves its log-sum-exp behind, for policies of `jax.checkpoint`."""


def cudnn_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    lengths_n: jax.Array,
    *,
    window: int | None,
    scale: float,
) -> jax.Array:
    """Grouped-query causal attention of right-padded sequences, [n, t, h, k], float16 or bfloat16, on NVIDIA GPUs.

    Lengths travel as such: a dense mask costs cuDNN its speed.
    """
    lengths_n = lengths_n.astype(jnp.int32)
    return jax.nn.dot_product_attention(
        query_nthk,
        key_ntgk,
        value_ntgk,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths_n,
        key_value_seq_lengths=lengths_n,
        # Keys to the left and to the right of a query, itself not counted.
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
