"""Generates text: all prompts in one forward pass, then token by token with the KV cache.

Axes: n prompts, t prompt columns (padded left), m new tokens, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.models.transformer import KVCache, Params, Transformer, Weights, init_cache, variables

# Shorter prompts share one compiled shape.
_MIN_COLUMNS = 16


class _State(NamedTuple):
    step: jax.Array  # int32 []
    logits: jax.Array  # [n, v], for the next token
    cache: KVCache
    tokens: jax.Array  # int32 [n, m]
    lengths: jax.Array  # int32 [n]
    done: jax.Array  # bool [n]


def generate(
    params: Params | Weights,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    key: jax.Array,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Continues all prompts in one batch.

    Compiles once per batch size, max_new_tokens, temperature and power of two of the longest prompt.

    Args:
      params: weights of `model`.
      prompts: token ids; no prompt is empty.
      max_new_tokens: largest number of new tokens per prompt.
      end_token_ids: a continuation stops after the first of these tokens.
      key: PRNG key of the samples.
      temperature: 0 is greedy.

    Returns:
      the new tokens of each prompt, including the end token if there is one.

    Raises:
      ValueError: an empty prompt, one too long for the model, or a negative temperature.
    """
    # Not `< 0`, so that NaN is refused as well.
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {temperature}")
    _check_lengths(prompts, max_new_tokens, model)
    if not prompts:
        return []
    tokens, mask = _pad_left(prompts)
    # A static argument of jit must be hashable; sorted, so that another order compiles no second program.
    end_ids = tuple(sorted({int(token) for token in end_token_ids}))
    new_tokens, lengths = _generate(params, tokens, mask, key, model, max_new_tokens, end_ids, temperature)
    rows = zip(_to_host(new_tokens), _to_host(lengths), strict=True)
    return [row[:length].tolist() for row, length in rows]


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: Transformer) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, found {max_new_tokens}")
    max_positions = model.config.max_positions
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty: a model needs at least one token to continue")
        if len(prompt) + max_new_tokens > max_positions:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} these are more than "
                f"the model's {max_positions} positions"
            )


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32 [n, t] and mask bool [n, t], where t is a power of two, so that few lengths are compiled."""
    columns = max(_MIN_COLUMNS, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), columns), np.int32)
    mask = np.zeros((len(prompts), columns), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _generate(
    params: Params | Weights,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    model: Transformer,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns new tokens int32 [n, m] and the number of valid ones int32 [n]."""
    num_prompts, columns = prompt_tokens.shape

    def run(tokens: jax.Array, mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        hidden, cache = model.apply(variables(params), tokens, mask, cache, method="decode")
        # Padding is on the left, so the last column is every prompt's last token; all columns would be [n, t, v].
        logits = model.apply(variables(params), hidden[:, -1:], method="logits")
        return logits[:, 0], cache

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        # A key per step, from its number: the samples do not depend on max_new_tokens.
        token = sample(state.logits, jax.random.fold_in(key, state.step), temperature)
        # Rows that are done keep sampling until all are; `lengths` leaves those tokens out.
        tokens = state.tokens.at[:, state.step].set(token)
        lengths = state.lengths + ~state.done
        done = state.done | jnp.isin(token, jnp.array(end_ids, jnp.int32))
        # Tokens of rows that ended before this step are padding.
        logits, cache = run(token[:, None], ~state.done[:, None], state.cache)
        return _State(state.step + 1, logits, cache, tokens, lengths, done)

    logits, cache = run(prompt_tokens, prompt_mask, init_cache(model, num_prompts, columns + max_new_tokens))
    tokens = jnp.zeros((num_prompts, max_new_tokens), jnp.int32)
    lengths, done = jnp.zeros(num_prompts, jnp.int32), jnp.zeros(num_prompts, bool)
    # A while loop, unlike a scan, stops as soon as every row is done.
    end = jax.lax.while_loop(unfinished, advance, _State(jnp.int32(0), logits, cache, tokens, lengths, done))
    return end.tokens, end.lengths


def sample(logits_nv: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """Draws one token per row, int32 [n]; a draw depends on the row's index and the key, not on other rows."""
    if temperature == 0:
        return jnp.argmax(logits_nv, axis=-1).astype(jnp.int32)
    # One key per row, so that its draw depends on its index and the key alone.
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_nv.shape[0]))
    return jax.vmap(jax.random.categorical)(row_keys, logits_nv / temperature).astype(jnp.int32)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    # Each process has only the rows of its own devices; this gives all processes all rows.
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
