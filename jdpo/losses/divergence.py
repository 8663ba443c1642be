"""Kullback-Leibler divergences between the next-token distributions of two models, without the logits of all tokens.

Axes: r rows, k positions of a row, d model, v vocabulary, c positions of a row in one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.losses.linear_chunks import HeadSettings, default_chunk, head_logits, kept, over_chunks, varying_alike

Array = jax.Array


class ModelHead(NamedTuple):
    """Hidden states of one model with its LM head.

    Attributes:
      hidden: float [r, k, d], the states before the head.
      head: float [d, v], without a bias.
      settings: scale and soft cap of the logits.
    """

    hidden: Array
    head: Array
    settings: HeadSettings = HeadSettings(None, None, False)


def token_divergences(
    first: ModelHead, second: ModelHead, lengths: Array | None = None, *, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """Computes KL(first || second) and KL(second || first) of the next token at each position.

    Both are exact sums over the vocabulary, not estimates from sampled tokens. The two models may differ in width and
    depth, but not in their vocabulary. Logits exist for one chunk of positions at a time.

    Args:
      lengths: int [r], the number of leading positions of each row that count; the others give 0, and chunks after the
        longest row are not computed. None: all count.
      chunk_size: positions of each row per chunk; by default as many as have logits of 48 MiB, of both models together.

    Returns:
      two arrays [r, k] in nats, float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that do not match.

    >>> import jax.numpy as jnp
    >>> fair, biased = (jnp.log(jnp.array([[p, 1 - p]])) for p in (0.5, 0.25))
    >>> one = jnp.ones((1, 1, 1))
    >>> [kl.round(4).item() for kl in token_divergences(ModelHead(one, fair), ModelHead(one, biased))]
    [0.143..., 0.130...]
    """
    rows, positions = first.hidden.shape[:2]
    _check(first, second, lengths)
    # Twice the vocabulary: the logits of both models exist at the same time.
    chunk = chunk_size or default_chunk(rows, positions, 2 * first.head.shape[1], skips=lengths is not None)
    counts = [] if lengths is None else [lengths.astype(jnp.int32)]
    hidden_first, hidden_second, head_first, head_second, *counts = varying_alike(
        first.hidden, second.hidden, first.head, second.head, *counts
    )

    def body(total: None, counted_rc: Any, *hidden_rcd: Array) -> tuple[None, tuple[Array, ...]]:
        log_p, log_q = (
            jax.nn.log_softmax(head_logits(model.settings, kept(hidden, counted_rc), head), axis=-1)  # [r, c, v]
            for model, head, hidden in zip((first, second), (head_first, head_second), hidden_rcd, strict=True)
        )
        # A difference of logs, not a log of a quotient: probabilities may underflow.
        ratio = log_p - log_q
        # An impossible token (a logit of -inf) adds nothing to the sum over the distribution where it is impossible.
        forward = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * ratio, 0).sum(-1)
        backward = jnp.where(log_q > -jnp.inf, jnp.exp(log_q) * -ratio, 0).sum(-1)
        return total, tuple(kept(x, counted_rc) for x in (forward, backward))

    arrays = (hidden_first, hidden_second)
    _, (forward, backward) = over_chunks(
        body, None, arrays, max(min(chunk, positions), 1), counts[0] if counts else None
    )
    return forward, backward


def _check(first: ModelHead, second: ModelHead, lengths: Array | None) -> None:
    for model in (first, second):
        if model.hidden.ndim != 3 or model.head.ndim != 2 or model.head.shape[0] != model.hidden.shape[-1]:
            raise ValueError(
                f"expected hidden [r, k, d] and head [d, v], found hidden {model.hidden.shape} and head "
                f"{model.head.shape}"
            )
    if first.hidden.shape[:2] != second.hidden.shape[:2] or first.head.shape[1] != second.head.shape[1]:
        raise ValueError(
            "a divergence needs the same positions and the same vocabulary of both models; found hidden "
            f"{first.hidden.shape} and {second.hidden.shape}, head {first.head.shape} and {second.head.shape}"
        )
    if lengths is not None and lengths.shape != first.hidden.shape[:1]:
        raise ValueError(f"expected lengths [r] for hidden {first.hidden.shape}, found {lengths.shape}")
