"""The decoder: one flax.linen module for every family, and the pure functions around it.

Axes: n sequences, t positions, s cache slots, d model, g key/value heads, k head width, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdpo.models.blocks import Embedding, Head, LayerCache, LayerGroup
from jdpo.models.experts.routing import ROUTER, router_stats
from jdpo.models.layers import ADAPTERS, SCALES, Norm, scaled
from jdpo.models.model_config import ModelConfig, layer_pattern
from jdpo.models.packed_attention import PackedSequences, num_readers
from jdpo.models.remat import check_remat
from jdpo.models.rope import RopeTables, rope_tables
from jdpo.models.self_attention import AttentionSettings, Context
from jdpo.types import Routed

Params = dict[str, Any]
ApplyFn = Callable[[Params, jax.Array, jax.Array], jax.Array]


class Weights(NamedTuple):
    """A model's parameters with scales and adapters; accepted wherever plain parameters are.

    Attributes:
      params: the tree of `abstract_params`; kernels of projections may be int8.
      scales: for every int8 kernel at a path of `params`, float32 factors of its output channels at the same path.
      adapters: {"a", "b"} at the paths of adapted projections, see `jdpo.models.lora.adapters`; may be empty.
    """

    params: Params
    scales: Params
    adapters: Params


def variables(params: Params | Weights) -> dict[str, Params]:
    """Returns the collections that `Transformer.apply` takes."""
    if isinstance(params, Weights):
        return {"params": params.params, SCALES: params.scales, ADAPTERS: params.adapters}
    return {"params": params}


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; slot i of every row was written by the i-th token column.

    Attributes:
      layers: {"stack": {"layer_j": {"key", "value"}}, "rest": ..}, arrays [repeats, n, s, g, k] and [n, s, g, k].
      positions: int32 [n, s], the position of each slot's token.
      mask: bool [n, s], True on slots that hold a real token.
      index: int32 [], the next slot to write.
    """

    layers: dict[str, LayerCache]
    positions: jax.Array
    mask: jax.Array
    index: jax.Array  # type: ignore[assignment]  # the method of tuples is not needed


class Transformer(nn.Module):
    """A causal language model.

    Attributes:
      compute_dtype: dtype of activations; parameters are cast to it at use.
      param_dtype: dtype of the parameters that `init_params` makes.
      attention: backend of the attention over packed rows, see `causal_attention`; "auto" selects the fastest.
      attention_block_q, attention_block_kv: queries and keys per tile, for backends that work in tiles.
      remat: rematerialization policy, "none" or a name of `REMAT_POLICIES`.
    """

    config: ModelConfig
    compute_dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    attention_block_q: int | None = None
    attention_block_kv: int | None = None

    def setup(self) -> None:
        check_remat(self.remat)
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        attention = AttentionSettings(self.attention, self.attention_block_q, self.attention_block_kv)
        pattern = layer_pattern(config)
        self.embed = Embedding(config, *dtypes)
        scan = nn.scan(
            LayerGroup,
            # One body for all repeats: compile time does not grow with depth. Axis 0 of each collection is the repeat.
            variable_axes={"params": 0, ADAPTERS: 0, SCALES: 0, ROUTER: 0},
            split_rngs={"params": True},
            # Each repeat has its own slice of the cache; masks, positions and rope tables are the same for all.
            in_axes=(0, nn.broadcast),
            length=pattern.repeats,
            # Puts the logical axis "layers", which no mesh axis splits, before the axes of each parameter.
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.stack = scan(config, config.layers[: pattern.period], *dtypes, attention, self.remat, True)
        if pattern.rest:
            # The rest begins the pattern again, so its kinds are the first ones.
            kinds = config.layers[: pattern.rest]
            self.rest = LayerGroup(config, kinds, *dtypes, attention, self.remat, False)
        self.final_norm = Norm(config.norm, config.norm_eps, ("norm",), self.param_dtype)
        if config.reward_head:
            self.score = Head(config, self.param_dtype)
        elif not config.tie_embeddings:
            self.lm_head = Head(config, self.param_dtype)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Returns logits [n, t, v] of the token after each position, float32 (float64 if the compute dtype is float64).

        A reward model returns [n, t, 1], the reward of the tokens up to each position.

        Args:
          tokens: int [n, t].
          attention_mask: bool [n, t], True on real tokens; padding may be on the left or right.
        """
        return self.logits(self.hidden_states(tokens, attention_mask))

    def hidden_states(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Returns the final norm's output [n, t, d]; arguments as for `__call__`."""
        mask = attention_mask.astype(bool)
        # Positions count real tokens only, so that left padding does not shift them.
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        # Queries and keys are the same tokens, so both have these positions.
        context = Context(self._ropes(positions), positions, positions, mask, token_weights=mask)
        return self._run(tokens, positions, None, context)[0]

    def packed_hidden_and_head(
        self, tokens: jax.Array, positions: jax.Array, sequences: PackedSequences
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the final norm's output [r, s, d] of flat rows, and the output head [d, v].

        Args:
          tokens, positions: int [r, s], as in `PackedBatch`.
          sequences: see `packed_sequences`.
        """
        # A pair's prompt is computed once but belongs to two sequences, so the router's statistics count it twice.
        context = Context(
            self._ropes(positions), None, None, None, token_weights=num_readers(sequences), packed=sequences
        )
        hidden = self._run(tokens, positions, None, context)[0]
        # Gathered along the model dimension once here, not in every chunk of tokens.
        return hidden, nn.with_logical_constraint(self.head_kernel(), (None, self._outputs_axis))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the output head to final hidden states [n, t, d]: logits, scaled and capped, in float32 or wider."""
        kernel = self.head_kernel()
        # The log-softmax over the vocabulary needs float32, so the product is never rounded to bfloat16.
        logits_dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
        logits = jnp.einsum("ntd,dv->ntv", hidden, kernel, preferred_element_type=logits_dtype)
        logits, softcap = scaled(logits, self.config.logit_scale), self.config.logit_softcap
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        return nn.with_logical_constraint(logits, ("batch", "act_length", self._outputs_axis))

    def head_kernel(self) -> jax.Array:
        """Returns the output head [d, v] in the compute dtype, tied or not; [d, 1] for a reward model."""
        if self.config.reward_head:
            return self.score().astype(self.compute_dtype)
        kernel = self.embed.head() if self.config.tie_embeddings else self.lm_head()
        return kernel.astype(self.compute_dtype)

    @property
    def _outputs_axis(self) -> str | None:
        # A single output cannot be divided.
        return None if self.config.reward_head else "act_vocab"

    def decode(self, tokens: jax.Array, token_mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Runs t more tokens of every row with the cache; returns hidden states [n, t, d] and the longer cache.

        Args:
          tokens: int [n, t], written to slots cache.index .. cache.index + t - 1, which must exist.
          token_mask: bool [n, t], False on padding (prompts of unequal length are padded left).
        """
        mask = token_mask.astype(bool)
        seen = jnp.sum(cache.mask, axis=1, keepdims=True, dtype=jnp.int32)
        # As in `hidden_states`, but counted from the real tokens that the cache already holds.
        positions = jnp.maximum(seen + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.index, axis=1)
        key_positions, key_mask = write(cache.positions, positions), write(cache.mask, mask)
        context = Context(
            self._ropes(positions), positions, key_positions, key_mask, token_weights=mask, write_index=cache.index
        )
        hidden, layers = self._run(tokens, positions, cache.layers, context)
        assert layers is not None
        return hidden, KVCache(layers, key_positions, key_mask, cache.index + tokens.shape[1])

    def _ropes(self, positions: jax.Array) -> tuple[RopeTables, ...]:
        # bfloat16 has no exact integers above 256, so the angles of later positions would be wrong.
        dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
        return tuple(rope_tables(positions, rope, self.config.head_dim, dtype) for rope in self.config.ropes)

    def _run(
        self, tokens: jax.Array, positions: jax.Array, cache: dict[str, LayerCache] | None, context: Context
    ) -> tuple[jax.Array, dict[str, LayerCache] | None]:
        new_cache: dict[str, Any] = {}
        x = self.embed(tokens, positions)
        # None has no leaves, so the scan has nothing to slice where there is no cache.
        x, new_cache["stack"] = self.stack(x, None if cache is None else cache["stack"], context)
        if layer_pattern(self.config).rest:
            x, new_cache["rest"] = self.rest(x, None if cache is None else cache["rest"], context)
        return self.final_norm(x), None if cache is None else new_cache


def _boxed_params(model: Transformer, key: jax.Array) -> Any:
    # One token suffices: no parameter's shape depends on the batch or the length.
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, jnp.ones((1, 1), bool))["params"]


# A flax module is frozen and hashable, so jit can compile one program per model.
@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, key: jax.Array) -> Params:
    """Initializes parameters, a nested dict of arrays: kernels normal(0.02), biases 0, norms 1.

    To create them sharded, jit a function of the key with `out_shardings`.
    """
    # Flax boxes each parameter with its logical axes; outside of this module the trees hold plain arrays.
    return nn.meta.unbox(_boxed_params(model, key))


def _is_x64() -> bool:
    config: Any = jax.config  # its values have no annotations
    return bool(config.jax_enable_x64)


def abstract_params(model: Transformer) -> Params:
    """Returns shapes and dtypes of the parameters, a tree of jax.ShapeDtypeStruct, without computing them."""
    return nn.meta.unbox(_abstract_boxed(model, _is_x64()))


def logical_axes(model: Transformer) -> Params:
    """Returns the logical axis names of every parameter: the tree of `abstract_params` with tuples as leaves."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _abstract_boxed(model, _is_x64()),
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


@functools.lru_cache(maxsize=16)
def _abstract_boxed(model: Transformer, enable_x64: bool) -> Any:
    """Returns the tree that both views above are made from.

    Cached, because it traces the whole model and the start of a run asks for it about ten times. Dtypes depend on
    `enable_x64`, which is therefore part of the key.
    """
    return jax.eval_shape(functools.partial(_boxed_params, model), jax.random.key(0))


def make_apply_fn(model: Transformer) -> ApplyFn:
    """Returns the pure function (params, tokens [n, t], attention_mask [n, t]) -> logits [n, t, v]."""
    return lambda params, tokens, attention_mask: model.apply(variables(params), tokens, attention_mask)


def apply_routed(model: Transformer, params: Params | Weights, *args: Any, method: str | None = None) -> Routed:
    """Applies a model with experts; returns the method's output and the statistics of the routers."""
    # Routers write their statistics only where the collection is mutable, so other calls do not pay for them.
    output, left = model.apply(variables(params), *args, method=method, mutable=[ROUTER])
    return Routed(output, router_stats(left[ROUTER]))


def make_routed_apply_fn(model: Transformer) -> Callable[[Params, jax.Array, jax.Array], Routed]:
    """Returns the function of `make_apply_fn` for a model with experts."""
    return lambda params, tokens, attention_mask: apply_routed(model, params, tokens, attention_mask)


def init_cache(model: Transformer, batch: int, max_length: int) -> KVCache:
    """Returns an empty cache of max_length slots for `batch` rows, with keys and values in the compute dtype."""
    config, pattern = model.config, layer_pattern(model.config)

    def layer(*leading: int) -> dict[str, jax.Array]:
        # [repeats, n, s, g, k] in the stack, so that the scan slices the cache along with the parameters.
        shape = (*leading, batch, max_length, config.num_kv_heads, config.head_dim)
        return {name: jnp.zeros(shape, model.compute_dtype) for name in ("key", "value")}

    layers: dict[str, LayerCache] = {"stack": {f"layer_{j}": layer(pattern.repeats) for j in range(pattern.period)}}
    if pattern.rest:
        layers["rest"] = {f"layer_{j}": layer() for j in range(pattern.rest)}
    slots = (batch, max_length)
    return KVCache(layers, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool), jnp.int32(0))
