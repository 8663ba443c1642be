"""The generation engine: answers of a model to prompts of token ids.

Axes: n rows (one answer each), t prompt columns (padded left), m new tokens, v vocabulary.

Every draw has its own key, made from the seed, the prompt's tokens, the sample's number and the token's index in the
answer. So an answer does not depend on the other answers of a batch, on their order, or on the number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdpo.generation.draws import draw
from jdpo.generation.values import FinishReason, Sampling
from jdpo.models.transformer import KVCache, Params, Transformer, Weights, init_cache, variables
from jdpo.sharding.on_mesh import OnMesh

# Shorter prompts share one compiled shape.
_MIN_COLUMNS = 16


class Drawn(NamedTuple):
    """One answer.

    Attributes:
      prompt: index of its prompt in the argument of `Engine.run`.
      sample: its number among the answers to the prompt, from 0.
      tokens: its token ids, including the token that ends it.
      logps: log-probability of each token under the model itself (temperature 1, all tokens).
      finish_reason: "stop" if an end token ends it, "length" if it is cut off at `max_new_tokens`.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logps: list[float]
    finish_reason: FinishReason


class Engine:
    """Answers prompts with one model and one way of drawing.

    Args:
      model: the model; its compute dtype is that of the computation and of the cache.
      params: its weights, plain or with adapters, placed on `mesh` if there is one.
      end_token_ids: an answer ends after the first of these tokens.
      sampling: how tokens are drawn.
      mesh: devices that share the work; None: the default device.
      max_slots: largest number of answers computed at the same time.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params | Weights,
        *,
        end_token_ids: Sequence[int],
        sampling: Sampling,
        mesh: Mesh | None = None,
        max_slots: int = 64,
    ) -> None:
        if max_slots < 1:
            raise ValueError(f"max_slots: expected 1 or more, found {max_slots}")
        self.model, self.params, self.sampling, self.mesh, self.max_slots = model, params, sampling, mesh, max_slots
        # Sorted, so that another order compiles no second program.
        self.end_token_ids = tuple(sorted({int(token) for token in end_token_ids}))

    def with_sampling(self, sampling: Sampling) -> Engine:
        """Returns an engine with the same model and weights that draws in another way."""
        return Engine(
            self.model,
            self.params,
            end_token_ids=self.end_token_ids,
            sampling=sampling,
            mesh=self.mesh,
            max_slots=self.max_slots,
        )

    def run(self, prompts: Sequence[Sequence[int]], num_samples: int = 1) -> Iterator[Drawn]:
        """Yields `num_samples` answers to every prompt: all of the first prompt, then all of the second, and so on.

        Args:
          prompts: token ids; equal prompts get equal answers.

        Raises:
          ValueError: a prompt is empty, too long for the model, or has a token that the model does not know.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected 1 or more, found {num_samples}")
        self._check(prompts)
        asked = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples)]
        return self._answers(prompts, asked)

    def stream(self, prompt: Sequence[int], sample: int = 0) -> Iterator[tuple[int, float]]:
        """Yields (token, log-probability) of one answer, token by token; `run` draws the very same tokens.

        Args:
          sample: the answer's number, see `Drawn`.

        Raises:
          ValueError: as for `run`.
        """
        self._check([prompt])
        (drawn,) = self._answers([prompt], [(0, sample)])
        return zip(drawn.tokens, drawn.logps, strict=True)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        most, new, vocab_size = (
            self.model.config.max_positions,
            self.sampling.max_new_tokens,
            self.model.config.vocab_size,
        )
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} is empty: a model needs at least one token to continue")
            if len(prompt) + new > most:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {new} these are more than the "
                    f"model's {most} positions"
                )
            unknown = next((token for token in prompt if not 0 <= token < vocab_size), None)
            if unknown is not None:
                raise ValueError(
                    f"prompt {index} has the token id {unknown}, but the model's vocabulary has {vocab_size} tokens: "
                    "use the tokenizer of this model"
                )

    def _answers(self, prompts: Sequence[Sequence[int]], asked: Sequence[tuple[int, int]]) -> Iterator[Drawn]:
        for start in range(0, len(asked), self.max_slots):
            rows = asked[start : start + self.max_slots]
            tokens, mask = _pad_left([prompts[prompt] for prompt, _ in rows])
            keys = np.stack([draw_key(self.sampling.seed, prompts[prompt], sample) for prompt, sample in rows])
            drawn, logps, lengths = map(_to_host, self._generate(tokens, mask, keys))
            for row, (prompt, sample) in enumerate(rows):
                length = int(lengths[row])
                ids = drawn[row, :length].tolist()
                reason: FinishReason = "stop" if ids[-1] in self.end_token_ids else "length"
                yield Drawn(prompt, sample, ids, logps[row, :length].tolist(), reason)

    def _generate(self, tokens: np.ndarray, mask: np.ndarray, keys: np.ndarray) -> tuple[jax.Array, ...]:
        # The seed is in the keys, so that another one compiles no second program.
        sampling = dataclasses.replace(self.sampling, seed=0)
        function = functools.partial(_generate, model=self.model, end_ids=self.end_token_ids, sampling=sampling)
        run = function if self.mesh is None else OnMesh(self.mesh, function)
        result: tuple[jax.Array, ...] = run(self.params, tokens, mask, keys)
        return result


def draw_key(seed: int, prompt: Sequence[int], sample: int) -> np.ndarray:
    """Returns the key data of an answer, uint32 [2]: fold_in of the seed, the prompt's digest and the sample's number.

    The key of the answer's i-th token is fold_in of this key and i.
    """
    digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()
    key = jax.random.key(seed, impl="threefry2x32")
    for word in (*np.frombuffer(digest[:8], "<u4"), sample):
        key = jax.random.fold_in(key, word)
    return np.asarray(jax.random.key_data(key))


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32 [n, t] and mask bool [n, t], where t is a power of two, so that few lengths are compiled."""
    columns = max(_MIN_COLUMNS, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), columns), np.int32)
    mask = np.zeros((len(prompts), columns), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = True
    return tokens, mask


class _State(NamedTuple):
    step: jax.Array  # int32 []
    logits: jax.Array  # [n, v], for the next token
    cache: KVCache
    tokens: jax.Array  # int32 [n, m]
    logps: jax.Array  # float32 [n, m]
    lengths: jax.Array  # int32 [n]
    done: jax.Array  # bool [n]


@functools.partial(jax.jit, static_argnames=("model", "end_ids", "sampling"))
def _generate(
    params: Params | Weights,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key_data: jax.Array,
    *,
    model: Transformer,
    end_ids: tuple[int, ...],
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns new tokens int32 [n, m], their log-probabilities, and the number of valid ones int32 [n]."""
    (num_rows, columns), max_new_tokens = prompt_tokens.shape, sampling.max_new_tokens
    keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")

    def run(tokens: jax.Array, mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        hidden, cache = model.apply(variables(params), tokens, mask, cache, method="decode")
        # Padding is on the left, so the last column is every prompt's last token; all columns would be [n, t, v].
        logits = model.apply(variables(params), hidden[:, -1:], method="logits")
        return logits[:, 0], cache

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token, logp = draw(state.logits, step_keys, sampling)
        # Rows that are done keep drawing until all are; `lengths` leaves those tokens out.
        tokens, logps = state.tokens.at[:, state.step].set(token), state.logps.at[:, state.step].set(logp)
        lengths = state.lengths + ~state.done
        done = state.done | jnp.isin(token, jnp.array(end_ids, jnp.int32))
        # Tokens of rows that ended before this step are padding.
        logits, cache = run(token[:, None], ~state.done[:, None], state.cache)
        return _State(state.step + 1, logits, cache, tokens, logps, lengths, done)

    logits, cache = run(prompt_tokens, prompt_mask, init_cache(model, num_rows, columns + max_new_tokens))
    tokens, logps = jnp.zeros((num_rows, max_new_tokens), jnp.int32), jnp.zeros((num_rows, max_new_tokens))
    lengths, done = jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, bool)
    # A while loop, unlike a scan, stops as soon as every row is done.
    start = _State(jnp.int32(0), logits, cache, tokens, logps, lengths, done)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens, end.logps, end.lengths


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    # Each process has only the rows of its own devices; this gives all processes all rows.
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
