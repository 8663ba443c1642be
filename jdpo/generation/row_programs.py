"""The compiled programs of the engine, and the arrays on the device that they pass on.

Axes: p places (a prompt each), r rows of a place (an answer each), b prompts computed together, t columns of prompts,
g key/value heads, s prompt slots, c tail slots, k head width, v vocabulary, m steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jdpo.generation.draws import draw
from jdpo.generation.values import Sampling
from jdpo.models.attention import empty_layer_cache
from jdpo.models.context import Cache
from jdpo.models.delta.delta_cache import empty_delta_cache
from jdpo.models.model_config import LayerKind
from jdpo.models.transformer import Params, Transformer, Weights, unroll, variables


class Rows(NamedTuple):
    """The answers in progress.

    Attributes:
      prompt_lengths: int32 [p].
      prompt_logits: float32 [p, v], the logits after each prompt, from which all its answers begin.
      token: int32 [p, r], the last token drawn, which is not in the cache yet.
      count: int32 [p, r], number of tokens drawn.
      active: bool [p, r], False on rows whose answer is complete.
      caches: one for each layer, see `jdpo.models.attention.cached` and `jdpo.models.delta.delta_cache`.
    """

    prompt_lengths: jax.Array
    prompt_logits: jax.Array
    token: jax.Array
    count: jax.Array  # type: ignore[assignment]  # the method of tuples is not needed
    active: jax.Array
    caches: tuple[Cache, ...]


class Orders(NamedTuple):
    """The orders of the host to `advance`.

    Attributes:
      seed: uint32 [].
      digests: uint32 [p, 2], of the tokens of each place's prompt.
      samples: int32 [p, r], the number of each row's answer.
      fresh: bool [p, r], rows that begin an answer.
      end_ids: int32 [e], tokens that end an answer; -1 is none.
      max_new_tokens: int32 [].
      num_steps: int32 [], at most the static `most_steps`.
      has_waiting: bool [p], places whose idle rows can begin another answer.
      uses_places: bool [], whether places without active rows can be given other work.
      patience: int32 [], number of rows that could begin another answer at which the loop ends for it.
    """

    seed: Any
    digests: Any
    samples: Any
    fresh: Any
    end_ids: Any
    max_new_tokens: Any
    num_steps: Any
    has_waiting: Any
    uses_places: Any
    patience: Any


class Report(NamedTuple):
    """The report of `advance` to the host.

    Attributes:
      tokens, logps: [m + 1, p, r]; index 0 has the first token of fresh rows, index i that of step i.
      count, active: as in `Rows`. A row has drawn one token in each of the first steps, up to its count.
    """

    tokens: jax.Array
    logps: jax.Array
    count: jax.Array  # type: ignore[assignment]
    active: jax.Array


def draw_keys(seed: Any, digests: Any, samples: Any) -> jax.Array:
    """Returns the keys of answers, [p, r]: fold_in of the seed, both words of the digest, and the sample's number.

    The key of an answer's i-th token is fold_in of the answer's key and i.
    """
    # By name, so that a user's default of another generator does not change the answers.
    key = jax.random.key(seed, impl="threefry2x32")

    def of_place(digest: jax.Array, samples: jax.Array) -> jax.Array:
        of_prompt = jax.random.fold_in(jax.random.fold_in(key, digest[0]), digest[1])
        return jax.vmap(jax.random.fold_in, (None, 0))(of_prompt, samples)

    return jax.vmap(of_place)(digests, samples)


def decoder_of(model: Transformer) -> Transformer:
    """Returns the model that decodes with `decoding_weights`: without a scan, and on the CPU without a tied head."""
    config = model.config
    if jax.default_backend() == "cpu":
        # The product with a tied head, [v, d], transposes it in every step, which takes half as long as the product.
        config = dataclasses.replace(config, tie_embeddings=False)
    return model.clone(unrolled=True, config=config)


@functools.partial(jax.jit, static_argnames="model")
def decoding_weights(weights: Params | Weights, *, model: Transformer) -> Params | Weights:
    """Returns the weights of the unrolled model: a copy in the compute dtype, so that no step casts or slices them."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        # Norms compute in float32 with their weights as they are, and so does the router.
        is_cast = names[-1] in ("kernel", "embedding", "positions", "a", "b") and "router" not in names
        return leaf.astype(model.compute_dtype) if is_cast and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def of_tree(tree: Params) -> Params:
        unrolled: Params = jax.tree_util.tree_map_with_path(cast, unroll(model.config, tree))
        return unrolled

    def of_params(params: Params) -> Params:
        params = of_tree(params)
        if model.config.tie_embeddings and not decoder_of(model).config.tie_embeddings:
            params["lm_head"] = {"kernel": params["embed"]["embedding"].T}
        return params

    if isinstance(weights, Weights):
        # Scales of int8 kernels are float32 factors of the products and stay as they are.
        params, scales = of_params(weights.params), unroll(model.config, weights.scales)
        return Weights(params, scales, of_tree(weights.adapters))
    return of_params(weights)


@functools.partial(jax.jit, static_argnames=("model", "num_places", "num_rows", "prompt_slots", "tail_slots"))
def empty_rows(*, model: Transformer, num_places: int, num_rows: int, prompt_slots: int, tail_slots: int) -> Rows:
    """Returns idle rows."""
    config, rows = model.config, (num_places, num_rows)

    def empty(kind: LayerKind) -> Cache:
        if kind.mixer == "delta":
            assert config.delta is not None
            return empty_delta_cache(config.delta, model.compute_dtype, *rows)
        sizes = (config.num_kv_heads, config.head_dim)
        return empty_layer_cache(*sizes, model.compute_dtype, *rows, prompt_slots, tail_slots)

    return _placed(
        Rows(
            prompt_lengths=jnp.zeros(num_places, jnp.int32),
            prompt_logits=jnp.zeros((num_places, config.vocab_size), jnp.float32),
            token=jnp.zeros(rows, jnp.int32),
            count=jnp.zeros(rows, jnp.int32),
            active=jnp.zeros(rows, bool),
            caches=tuple(empty(kind) for kind in config.layers),
        )
    )


@functools.partial(jax.jit, static_argnames=("prompt_slots", "tail_slots"))
def resize(rows: Rows, *, prompt_slots: int, tail_slots: int) -> Rows:
    """Returns the rows with more slots; the new ones are at the end."""
    caches = tuple(cache.resize(prompt_slots, tail_slots) for cache in rows.caches)
    return _placed(rows._replace(caches=caches))


@functools.partial(jax.jit, static_argnames="model")
def prefill(
    weights: Params | Weights, tokens: jax.Array, lengths: jax.Array, *, model: Transformer
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Computes prompts, once for all their answers.

    Args:
      weights: of `model`, which is not unrolled, so that this compiles fast for every length.
      tokens: int32 [b, t], padded on the right.
      lengths: int32 [b].

    Returns:
      logits [b, v] after each prompt, and for each layer what its cache inserts, such as keys and values.
    """
    logits, kept = model.apply(variables(weights), tokens, lengths, method="prefill")
    layers = unroll(model.config, kept)["rest"]
    return logits.astype(jnp.float32), tuple(layers[f"layer_{index}"] for index in range(model.config.num_layers))


@functools.partial(jax.jit, donate_argnums=0)
def insert(rows: Rows, places: jax.Array, lengths: jax.Array, logits: jax.Array, kept: tuple[Any, ...]) -> Rows:
    """Gives computed prompts to places, int32 [b]; a place past the last one means none."""
    # Each layer's mixer decides what it keeps of prompts, and its cache takes just that.
    caches = tuple(cache.insert(places, of_layer) for cache, of_layer in zip(rows.caches, kept, strict=True))
    return _placed(
        rows._replace(
            prompt_lengths=rows.prompt_lengths.at[places].set(lengths, mode="drop"),
            prompt_logits=rows.prompt_logits.at[places].set(logits, mode="drop"),
            caches=caches,
        )
    )


@functools.partial(jax.jit, donate_argnums=0)
def share(rows: Rows, source: jax.Array) -> Rows:
    """Gives places the prompts of others: place i that of place source[i], int32 [p]."""
    return _placed(_with_prompts(rows, source, rows.caches))


@jax.jit
def select(rows: Rows, kept: jax.Array) -> Rows:
    """Returns the rows of some places, int32 [p]."""
    rows = rows._replace(token=rows.token[kept], count=rows.count[kept], active=rows.active[kept])
    caches = tuple(cache.with_tails_of(kept) for cache in rows.caches)
    return _placed(_with_prompts(rows, kept, caches))


def _with_prompts(rows: Rows, source: jax.Array, caches: tuple[Cache, ...]) -> Rows:
    return rows._replace(
        prompt_lengths=rows.prompt_lengths[source],
        prompt_logits=rows.prompt_logits[source],
        caches=tuple(cache.with_prompts_of(source) for cache in caches),
    )


class _Loop(NamedTuple):
    step: jax.Array
    rows: Rows
    tokens: jax.Array
    logps: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "sampling", "most_steps"), donate_argnums=1)
def advance(
    weights: Params | Weights,
    rows: Rows,
    orders: Orders,
    *,
    model: Transformer,
    sampling: Sampling,
    most_steps: int,
) -> tuple[Rows, Report]:
    """Begins the fresh rows, and draws tokens until rows can be given new work, all are idle, or the steps are over.

    Args:
      weights: of `model`, which is unrolled; see `decoding_weights`.
      sampling: its seed and max_new_tokens are not read, see `Orders`.
    """
    keys = draw_keys(orders.seed, orders.digests, orders.samples)

    def draw_next(logits_prv: jax.Array, number_pr: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys_n = jax.vmap(jax.random.fold_in)(keys.reshape(-1), number_pr.reshape(-1))
        drawn, logps = draw(logits_prv.reshape(-1, logits_prv.shape[-1]), keys_n, sampling)
        return drawn.reshape(number_pr.shape), logps.reshape(number_pr.shape)

    # An answer also ends with the model's positions, which it shares with its prompt.
    most_p1 = jnp.minimum(orders.max_new_tokens, model.config.max_positions - rows.prompt_lengths)[:, None]

    def goes_on(token: jax.Array, count: jax.Array) -> jax.Array:
        return ~jnp.isin(token, orders.end_ids) & (count < most_p1)

    def begin(rows: Rows) -> tuple[Rows, jax.Array]:
        logits_prv = jnp.broadcast_to(rows.prompt_logits[:, None], (*rows.count.shape, rows.prompt_logits.shape[-1]))
        drawn, logps = draw_next(logits_prv, jnp.zeros_like(rows.count))
        count = jnp.where(orders.fresh, 1, rows.count)
        token = jnp.where(orders.fresh, drawn, rows.token)
        active = jnp.where(orders.fresh, goes_on(drawn, count), rows.active)
        return rows._replace(token=token, count=count, active=active), logps

    def unfinished(loop: _Loop) -> jax.Array:
        idle = ~loop.rows.active
        could_begin = idle & (orders.has_waiting | (orders.uses_places & idle.all(1)))[:, None]
        return (loop.step < orders.num_steps) & loop.rows.active.any() & (could_begin.sum() < orders.patience)

    def step(loop: _Loop) -> _Loop:
        rows, number = loop.rows, loop.step + 1
        # The last token is the first one that the cache lacks; its number in the answer is its slot.
        # Idle rows are at their first slot: with the next prompt of their place, the slot of their old answer could be
        # past the model's last position, where learned positions are NaN.
        slot = jnp.where(rows.active, rows.count - 1, 0)
        arguments = (rows.token, rows.active, rows.prompt_lengths, slot, rows.caches)
        logits, caches = model.apply(variables(weights), *arguments, method="decode")
        drawn, logps = draw_next(logits, rows.count)
        count = rows.count + rows.active
        token = jnp.where(rows.active, drawn, rows.token)
        rows = rows._replace(token=token, count=count, active=rows.active & goes_on(token, count), caches=caches)
        return _Loop(number, rows, loop.tokens.at[number].set(token), loop.logps.at[number].set(logps))

    none = jnp.zeros(rows.count.shape, jnp.float32)
    rows, first_logps = jax.lax.cond(orders.fresh.any(), begin, lambda rows: (rows, none), rows)
    tokens = jnp.zeros((most_steps + 1, *rows.count.shape), jnp.int32).at[0].set(rows.token)
    logps = jnp.zeros(tokens.shape, jnp.float32).at[0].set(first_logps)
    # A while loop, unlike a scan, ends early.
    loop = jax.lax.while_loop(unfinished, step, _Loop(jnp.int32(0), rows, tokens, logps))
    return _placed(loop.rows), _replicated(Report(loop.tokens, loop.logps, loop.rows.count, loop.rows.active))


def _placed(rows: Rows) -> Rows:
    """Splits places over the batch axes of the mesh and heads over `tensor`; without a mesh, changes nothing."""
    by_place, place = "batch", nn.with_logical_constraint
    return Rows(
        prompt_lengths=place(rows.prompt_lengths, (by_place,)),
        prompt_logits=place(rows.prompt_logits, (by_place, "act_vocab")),
        token=place(rows.token, (by_place, None)),
        count=place(rows.count, (by_place, None)),
        active=place(rows.active, (by_place, None)),
        caches=tuple(cache.placed() for cache in rows.caches),
    )


def _replicated(report: Report) -> Report:
    """Gives every device, and so every process, the whole report."""
    if jax.sharding.get_abstract_mesh().empty:
        return report
    return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, PartitionSpec()), report)
