"""cuDNN's fused attention, requested by name: otherwise JAX may silently use the plain path."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"
"""Name in jaxprs of the forward kernel that returns its log-sum-exp, for policies of `jax.checkpoint`."""


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

    Lengths are passed as such, since a dense mask makes cuDNN slow.
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
        # Numbers of keys to the left and right of a query, not counting its own.
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
