"""The decoder's layers: a scanned stack of repeats and an unrolled rest.

Axes: n sequences, t positions, d model, v vocabulary. With a cache, n is prompts and t the rows of each.

The kinds of layers repeat with a period p. `stack` has num_layers // p repeats of them, each parameter with a leading
"layers" axis; `rest` has the remaining num_layers % p layers. So the settings of every kind are static under the scan.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdpo.models.context import Cache, Context, Kept
from jdpo.models.delta.delta_net import DeltaNet
from jdpo.models.experts.routing import MoE
from jdpo.models.layers import INIT_STDDEV, MLP, Norm, scaled
from jdpo.models.lookup import lookup
from jdpo.models.model_config import LayerKind, ModelConfig
from jdpo.models.remat import REMAT_POLICIES, named_layer_input
from jdpo.models.self_attention import Attention, AttentionSettings


class DecoderLayer(nn.Module):
    """A layer: a mixer (attention or a DeltaNet) and an MLP, each a branch that adds to the residual stream."""

    config: ModelConfig
    kind: LayerKind
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings

    @nn.compact
    def __call__(self, x_ntd: jax.Array, cache: Cache | None, context: Context) -> tuple[jax.Array, Kept | None]:
        config = self.config
        x_ntd = named_layer_input(x_ntd)
        normed_ntd = self._norm("before", "attention_norm", x_ntd)
        attended, kept = self._mixer()(normed_ntd, cache, context)
        attended = self._norm("after", "attention_post_norm", attended)
        # Constrained after every branch: left to itself, XLA may split the stream along d like the weights.
        after_ntd = constrain_stream(x_ntd + scaled(attended, config.residual_scale))
        # GPT-NeoX feeds the layer's input to both branches and adds both results to it.
        read_ntd = x_ntd if config.parallel_residual else after_ntd
        # Cohere normalizes this input once, for both.
        normed_ntd = normed_ntd if config.shared_norm else self._norm("before", "mlp_norm", read_ntd)
        widened = self._mlp(normed_ntd, context)
        widened = self._norm("after", "mlp_post_norm", widened)
        return constrain_stream(after_ntd + scaled(widened, config.residual_scale)), kept

    def _mixer(self) -> Attention | DeltaNet:
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        if self.kind.mixer == "delta":
            return DeltaNet(config, *dtypes, name="delta")
        return Attention(config, self.kind, *dtypes, self.attention, name="attention")

    def _mlp(self, x_ntd: jax.Array, context: Context) -> jax.Array:
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        if self.kind.mlp == "dense":
            return MLP(config, *dtypes, name="mlp")(x_ntd)
        assert config.moe is not None
        return MoE(config.moe, config.d_model, config.activation, *dtypes, name="mlp")(x_ntd, context.token_weights)

    def _norm(self, placement: str, name: str, x_ntd: jax.Array) -> jax.Array:
        """Applies the norm before or after a branch, if the model has one there."""
        config = self.config
        if config.norm_placement not in (placement, "both"):
            return x_ntd
        return Norm(config.norm, config.norm_eps, ("norm",), self.param_dtype, name=name)(x_ntd)


class LayerGroup(nn.Module):
    """Consecutive layers `layer_0` .., each of its own kind; the body of the scan, and the rest after it."""

    config: ModelConfig
    kinds: tuple[LayerKind, ...]
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings
    remat: str
    scanned: bool

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, caches: dict[str, Cache] | None, context: Context
    ) -> tuple[jax.Array, dict[str, Kept | None]]:
        layer_class: Any = DecoderLayer
        if self.remat != "none":
            # Within a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
            policy = REMAT_POLICIES[self.remat]
            layer_class = nn.remat(DecoderLayer, policy=policy, prevent_cse=not self.scanned)
        # Each layer is rematerialized on its own, so the backward pass holds the inner values of one layer at a time.
        kept: dict[str, Kept | None] = {}
        for index, kind in enumerate(self.kinds):
            name = f"layer_{index}"
            layer = layer_class(self.config, kind, self.compute_dtype, self.param_dtype, self.attention, name=name)
            x_ntd, kept[name] = layer(x_ntd, None if caches is None else caches[name], context)
        return x_ntd, kept


class Embedding(nn.Module):
    """The token table [v, d], which is also the output head if they are tied, and the table of positions [p, d]."""

    config: ModelConfig
    compute_dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(INIT_STDDEV)
        by_token = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.embedding = self.param("embedding", by_token, (config.vocab_size, config.d_model), self.param_dtype)
        if config.learned_positions:
            by_position = nn.with_logical_partitioning(init, ("positions", "embed"))
            self.positions = self.param(
                "positions", by_position, (config.max_positions, config.d_model), self.param_dtype
            )

    def __call__(self, tokens_nt: jax.Array, positions_nt: jax.Array) -> jax.Array:
        x_ntd = lookup(self.embedding, tokens_nt, ("vocab", "embed"), self.compute_dtype)
        if self.config.embedding_scale != 1.0:  # rounded to the compute dtype, as in the training of such models
            x_ntd = x_ntd * jnp.asarray(self.config.embedding_scale, self.compute_dtype)
        if self.config.learned_positions:
            x_ntd = x_ntd + lookup(self.positions, positions_nt, ("positions", "embed"), self.compute_dtype)
        return constrain_stream(x_ntd)

    def head(self) -> jax.Array:
        """Returns the token table as a head kernel, [d, v]."""
        # A transpose folds into the product, so a tied head needs no second table.
        return self.embedding.T


class Head(nn.Module):
    """An untied output head, [d, v]; [d, 1] for a reward model."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        # [d, v] like every other kernel, inputs first; Hugging Face stores it as [v, d].
        outputs, axis = (1, None) if self.config.reward_head else (self.config.vocab_size, "vocab")
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), ("embed", axis))
        return self.param("kernel", init, (self.config.d_model, outputs), self.param_dtype)


def constrain_stream(x_ntd: jax.Array) -> jax.Array:
    # Devices differ in their rows of the batch; the model dimension is whole on each.
    return nn.with_logical_constraint(x_ntd, ("batch", "act_length", "act_embed"))
