"""The decoder: one flax.linen module for every family, and the pure functions around it.

Axes: n sequences, t positions, p prompts, r rows of a prompt, d model, v vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdpo.models.attention import LayerCache, visible_slots
from jdpo.models.blocks import Embedding, Head, LayerGroup
from jdpo.models.context import Cache, Context, Tails
from jdpo.models.experts.routing import ROUTER, router_stats
from jdpo.models.layers import ADAPTERS, SCALES, Norm, scaled
from jdpo.models.mesh_axes import constrain_weight
from jdpo.models.model_config import LayerPattern, ModelConfig, layer_pattern
from jdpo.models.packed_attention import PackedSequences, num_readers
from jdpo.models.remat import check_remat
from jdpo.models.rope import query_factors, rope_tables
from jdpo.models.self_attention import AttentionSettings
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


class Transformer(nn.Module):
    """A causal language model.

    Attributes:
      compute_dtype: dtype of activations; parameters are cast to it at use.
      param_dtype: dtype of the parameters that `init_params` makes.
      attention: backend of the attention over packed rows, see `causal_attention`; "auto" selects the fastest.
      attention_block_q, attention_block_kv: queries and keys per tile, for backends that work in tiles.
      remat: rematerialization policy, "none" or a name of `REMAT_POLICIES`.
      unrolled: True for a program without a scan over the layers, whose parameters are those of `unroll`. It takes
        longer to compile, but reads every weight in place: a scan first copies the weights of each layer.
    """

    config: ModelConfig
    compute_dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    attention_block_q: int | None = None
    attention_block_kv: int | None = None
    unrolled: bool = False

    def setup(self) -> None:
        check_remat(self.remat)
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        attention = AttentionSettings(self.attention, self.attention_block_q, self.attention_block_kv)
        pattern = self._pattern()
        self.embed = Embedding(config, *dtypes)
        if pattern.repeats:
            scan = nn.scan(
                LayerGroup,
                # One body for all repeats: compile time does not grow with depth. Axis 0 of each collection, and of
                # prompts' keys and values, is the repeat.
                variable_axes={"params": 0, ADAPTERS: 0, SCALES: 0, ROUTER: 0},
                split_rngs={"params": True},
                # Masks, positions and rope tables are the same for all.
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
        context = self._context(positions, mask, positions=positions, mask=mask)
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
        context = self._context(positions, num_readers(sequences), packed=sequences)
        hidden = self._run(tokens, positions, None, context)[0]
        # Split as it is stored, in the compute dtype: whoever loops over chunks of tokens gathers it before the loop.
        return hidden, constrain_weight(self.head_kernel(), ("embed", self._outputs_axis))

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

    def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Runs prompts; returns logits [n, v] after their last tokens, and their keys and values for a cache.

        Args:
          tokens: int [n, t], padded on the right.
          lengths: int [n], numbers of real tokens.

        Returns:
          logits, and for every layer of the tree that `unroll` takes arrays [n, g, k, t] and [n, g, t, k], or a
          DeltaNet's state.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        context = self._context(positions, positions < lengths[:, None], lengths=lengths)
        hidden, keys = self._run(tokens, positions, None, context)
        # Gathered before the head: the logits of all columns would be [n, t, v].
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        return self.logits(last)[:, 0], keys

    def decode(
        self,
        tokens: jax.Array,
        is_real: jax.Array,
        prompt_lengths: jax.Array,
        index: jax.Array,
        caches: tuple[Cache, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs one token of every answer; returns logits [p, r, v] of the next one, and the longer caches.

        Only for an unrolled model.

        Args:
          tokens: int [p, r].
          is_real: bool [p, r], False on idle rows, whose results are arbitrary.
          prompt_lengths: int [p].
          index: int [p, r], the number of the token in its answer, from 0, and of the slot that it is written to.
          caches: one for each layer.
        """
        assert self.unrolled, "decoding needs the layers one by one"
        positions = prompt_lengths[:, None] + index
        # The slots of any layer with attention: all have the same, and a DeltaNet has none.
        slots = next((cache.num_slots for cache in caches if isinstance(cache, LayerCache)), (0, 0))
        # Once per distinct window, not in every layer.
        visible = tuple(visible_slots(prompt_lengths, index, *slots, window) for window in self.config.windows)
        context = self._context(positions, is_real, tails=Tails(index, visible))
        by_layer = {"rest": {f"layer_{i}": cache for i, cache in enumerate(caches)}}
        hidden, kept = self._run(tokens, positions, by_layer, context)
        return self.logits(hidden), tuple(kept["rest"][name] for name in by_layer["rest"])

    def _context(self, positions: jax.Array, token_weights: jax.Array, /, **visible: Any) -> Context:
        config = self.config
        # bfloat16 has no exact integers above 256, so the angles of later positions would be wrong.
        dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
        ropes = tuple(rope_tables(positions, rope, config.head_dim, dtype) for rope in config.ropes)
        factors = query_factors(positions, config.query_scaling, dtype)
        return Context(ropes, token_weights, factors, **visible)

    def _pattern(self) -> LayerPattern:
        pattern = layer_pattern(self.config)
        return pattern._replace(repeats=0, rest=self.config.num_layers) if self.unrolled else pattern

    def _run(
        self, tokens: jax.Array, positions: jax.Array, caches: dict[str, Any] | None, context: Context
    ) -> tuple[jax.Array, dict[str, Any]]:
        pattern, kept = self._pattern(), {}
        x = self.embed(tokens, positions)
        if pattern.repeats:
            assert caches is None, "a scan would copy the cache of each layer"
            x, kept["stack"] = self.stack(x, None, context)
        if pattern.rest:
            x, kept["rest"] = self.rest(x, None if caches is None else caches["rest"], context)
        return self.final_norm(x), kept


def _boxed_params(model: Transformer, key: jax.Array) -> Any:
    # One token suffices: no parameter's shape depends on the batch or the length.
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, jnp.ones((1, 1), bool))["params"]


def most_sequences_per_row(model: Transformer, longest: int) -> int | None:
    """Returns the most sequences that an attention row should hold, for packed rows whose sequences are this long.

    None: as many as fit. It depends on the backend of attention, and with it on the platform.
    """
    settings = AttentionSettings(model.attention, model.attention_block_q, model.attention_block_kv)
    return settings.sequences_per_row(model.compute_dtype, model.config, longest)


def padded_row_length(model: Transformer, length: int) -> int:
    """Returns the places that the model's attention computes for rows of this length."""
    settings = AttentionSettings(model.attention, model.attention_block_q, model.attention_block_kv)
    return settings.padded_length(model.compute_dtype, model.config, length)


# A flax module is frozen and hashable, so jit can compile one program per model.
@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, key: jax.Array) -> Params:
    """Initializes parameters, a nested dict of arrays: kernels normal(0.02), biases 0, norms 1.

    To create them sharded, jit a function of the key with `out_shardings`.
    """
    # Flax boxes each parameter with its logical axes; outside of this module the trees hold plain arrays.
    return nn.meta.unbox(_boxed_params(model, key))


def float32_products(model: Transformer) -> contextlib.AbstractContextManager[Any]:
    """While entered, a model of float32 multiplies in float32; without it, TPUs use bfloat16 and GPUs TF32.

    Training configures the whole process instead, see `numerics`.
    """
    is_float32 = jnp.dtype(model.compute_dtype) == jnp.float32
    return jax.default_matmul_precision("float32") if is_float32 else contextlib.nullcontext()


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


def unroll(config: ModelConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a tree with one entry per layer, `rest/layer_i`, from one with repeats of the pattern.

    Args:
      tree: a collection of `variables`, or what `Transformer.prefill` returns.
    """
    pattern, layers = layer_pattern(config), {}
    for index in range(config.num_layers):
        repeat, place = divmod(index, pattern.period)
        name = f"layer_{place}"
        if repeat < pattern.repeats:
            # Adapters and scales may have no entry for a layer.
            if name in tree.get("stack", {}):
                layers[f"layer_{index}"] = jax.tree.map(lambda leaf, at=repeat: leaf[at], tree["stack"][name])
        elif name in tree.get("rest", {}):
            layers[f"layer_{index}"] = tree["rest"][name]
    others = {key: value for key, value in tree.items() if key not in ("stack", "rest")}
    return {**others, "rest": layers}
