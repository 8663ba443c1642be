"""The gated DeltaNet of a layer, over padded rows, packed rows, prompts, or a cache.

Axes: n sequences, t positions, d model, g key heads, m value heads of a key head, k key width, v value width, w taps;
with a cache, n is prompts and t the rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.sharding import PartitionSpec

from jdpo.models.context import Context
from jdpo.models.delta.convolution import CausalConvolution, last_tokens
from jdpo.models.delta.delta_cache import DeltaCache, DeltaState
from jdpo.models.delta.delta_rule import DeltaInputs, delta_step, gated_delta_rule, state_dtype
from jdpo.models.layers import Norm, Projection
from jdpo.models.mesh_axes import sequence_and_head_axes
from jdpo.models.model_config import ModelConfig
from jdpo.models.packed_attention import PackedSequences, to_sequences, to_slots

NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys, as transformers and flash-linear-attention do."""


class _Places(NamedTuple):
    """The places of the sequences of rows.

    Attributes:
      starts: int [n, t], the place where the sequence of each place starts.
      is_token: bool [n, t], False on padding.
    """

    starts: jax.Array
    is_token: jax.Array


class DeltaNet(nn.Module):
    """A gated DeltaNet (https://arxiv.org/abs/2412.06464), with the sizes of `ModelConfig.delta`.

    Queries, keys and values go through a causal convolution and SiLU; queries and keys are then normalized. The output
    of the delta rule is normalized per head, and multiplied by SiLU of a gate.
    """

    config: ModelConfig
    compute_dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, cache: DeltaCache | None, context: Context
    ) -> tuple[jax.Array, DeltaCache | DeltaState | None]:
        """Returns the branch's output, and the cache after the tokens or the prompts' states where there are such."""
        delta = self.config.delta
        assert delta is not None
        values = (delta.num_key_heads, delta.values_per_key)
        tokens, gate = self._tokens(x_ntd), self._project(x_ntd, "gate", (*values, delta.value_head_dim))
        kept: DeltaCache | DeltaState | None = None
        if cache is not None:
            assert context.tails is not None
            output, kept = self._decode(tokens, cache, context.tails.slot)
        elif context.packed is not None:
            output = self._over_packed_rows(tokens, context.packed)
        else:
            output, state = self._over_rows(tokens, _places(context, x_ntd.shape[1]))
            if context.lengths is not None:
                query, key, value = (last_tokens(x, context.lengths, delta.conv_width - 1) for x in tokens[:3])
                kept = DeltaState(query, key, value, state)
        normed = Norm("rms", self.config.norm_eps, ("head_dim",), self.param_dtype, name="norm")(output)
        gated = (normed * nn.silu(gate.astype(state_dtype(gate.dtype)))).astype(self.compute_dtype)
        shape, axes = (*values, delta.value_head_dim, self.config.d_model), ("kv_heads", None, "head_dim", "embed")
        project = Projection("ntgmv,gmvd->ntd", shape, axes, self.compute_dtype, self.param_dtype, 3, name="output")
        return project(gated), kept

    def _tokens(self, x_ntd: jax.Array) -> DeltaInputs:
        """Returns the rule's inputs, before convolution and normalization of queries, keys and values."""
        delta = self.config.delta
        assert delta is not None
        keys, values = (delta.num_key_heads, delta.key_head_dim), (delta.num_key_heads, delta.values_per_key)
        query, key = (self._project(x_ntd, name, keys) for name in ("query", "key"))
        value = self._project(x_ntd, "value", (*values, delta.value_head_dim))
        beta, decay = (self._project(x_ntd, name, values) for name in ("beta", "decay"))
        # In float32, like the decays: the rule sums these over a chunk and subtracts the sums.
        beta = nn.sigmoid(beta.astype(state_dtype(beta.dtype)))
        return DeltaInputs(query, key, value, self._log_decay(decay), beta)

    def _over_rows(self, tokens: DeltaInputs, places: _Places) -> tuple[jax.Array, jax.Array]:
        """Returns the rule's outputs [n, t, g, m, v], and the states after the last tokens."""
        query, key, value = self._convolve(tokens, places.starts)
        # Padding leaves the state as it is, so that it is that after the last token.
        log_decay, beta = (jnp.where(places.is_token[..., None, None], x, 0) for x in tokens[3:])
        return rule_over_mesh(_normalized(DeltaInputs(query, key, value, log_decay, beta)), places.starts)

    def _over_packed_rows(self, tokens: DeltaInputs, packed: PackedSequences) -> jax.Array:
        """Runs on the same gathered sequences as attention, so that both answers continue the state of their prompt."""
        shared = tokens.value.shape[3]
        gates = rearrange(jnp.stack(tokens[3:], -1), "n t g m two -> n t (g m) two")
        slots = (tokens.query, tokens.key, rearrange(tokens.value, "n t g m v -> n t (g m) v"), gates)
        query, key, value, gates = (to_sequences(x, packed) for x in slots)
        value, gates = (rearrange(x, "n t (g m) v -> n t g m v", m=shared) for x in (value, gates))
        gathered = DeltaInputs(query, key, value, gates[..., 0], gates[..., 1])
        output, _ = self._over_rows(gathered, _packed_places(packed))
        output = to_slots(rearrange(output, "n t g m v -> n t (g m) v"), packed)
        return rearrange(output, "n t (g m) v -> n t g m v", m=shared)

    def _decode(self, tokens: DeltaInputs, cache: DeltaCache, index_pr: jax.Array) -> tuple[jax.Array, DeltaCache]:
        before = cache.states(index_pr)
        windows = [
            jnp.concatenate([old, new.astype(old.dtype)[:, :, None]], axis=2)
            for old, new in zip(before[:3], tokens[:3], strict=True)
        ]
        query, key, value = self._convolve(windows, None)
        output, state = delta_step(before.state, _normalized(DeltaInputs(query, key, value, *tokens[3:])))
        query, key, value = (window[:, :, 1:] for window in windows)
        return output, cache._replace(tail=DeltaState(query, key, value, state))

    def _convolve(self, arrays: Sequence[jax.Array], starts_nt: jax.Array | None) -> list[jax.Array]:
        """Convolves queries, keys and values, the first three of the arrays."""
        assert self.config.delta is not None
        convolved, of_value = [], ("kv_heads", None, "head_dim")
        for name, x in zip(("query", "key", "value"), arrays[:3], strict=True):
            axes = of_value if name == "value" else ("kv_heads", "head_dim")
            convolve = CausalConvolution(self.config.delta.conv_width, axes, self.param_dtype, name=f"{name}_conv")
            convolved.append(convolve(x, starts_nt))
        return convolved

    def _log_decay(self, x_ntgm: jax.Array) -> jax.Array:
        axes, shape = ("kv_heads", None), x_ntgm.shape[2:]
        a_log = self.param("a_log", nn.with_logical_partitioning(_init_a_log, axes), shape, self.param_dtype)
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), axes)
        dt_bias = self.param("dt_bias", ones, shape, self.param_dtype)
        wide = state_dtype(x_ntgm.dtype)
        return -jnp.exp(a_log.astype(wide)) * nn.softplus(x_ntgm.astype(wide) + dt_bias.astype(wide))

    def _project(self, x_ntd: jax.Array, name: str, outputs: tuple[int, ...]) -> jax.Array:
        letters = {"query": "gk", "key": "gk", "value": "gmv", "gate": "gmv", "beta": "gm", "decay": "gm"}[name]
        # The value heads of a key head, m, stay together.
        axes = tuple({"g": "kv_heads", "m": None}.get(letter, "head_dim") for letter in letters)
        shape, dtypes = (self.config.d_model, *outputs), (self.compute_dtype, self.param_dtype)
        project = Projection(f"ntd,d{letters}->nt{letters}", shape, ("embed", *axes), *dtypes, name=name)
        # Split by heads, which are independent, so that the rule itself needs no communication.
        act = (axis and f"act_{axis}" for axis in axes)
        return nn.with_logical_constraint(project(x_ntd), ("batch", "act_length", *act))


def _init_a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # As transformers initializes it; the lower bound keeps the logarithm finite.
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


def _normalized(inputs: DeltaInputs) -> DeltaInputs:
    """Returns queries and keys of length 1, in float32 before they are rounded; queries times k**-0.5."""

    def normalize(x: jax.Array, scale: float) -> jax.Array:
        wide = x.astype(state_dtype(x.dtype))
        length = jnp.sum(wide * wide, axis=-1, keepdims=True) + NORM_EPSILON
        return (wide * jax.lax.rsqrt(length) * scale).astype(x.dtype)

    query, key = normalize(inputs.query, inputs.query.shape[-1] ** -0.5), normalize(inputs.key, 1.0)
    return inputs._replace(query=query, key=key)


def _places(context: Context, num_places: int) -> _Places:
    """Returns where the sequences of padded rows or prompts are."""
    place = jnp.arange(num_places)
    if context.lengths is not None:
        is_token = place < context.lengths[:, None]
        return _Places(jnp.zeros(is_token.shape, jnp.int32), is_token)
    assert context.mask is not None
    # A sequence starts after its left padding; the padding itself is a sequence of its own.
    first = jnp.argmax(context.mask, axis=1, keepdims=True)
    return _Places(jnp.where(place >= first, first, 0), context.mask)


def _packed_places(packed: PackedSequences) -> _Places:
    lengths = rearrange(packed.lengths, "r q u -> (r q) u")
    place = jnp.arange(packed.slot.shape[1] // packed.lengths.shape[1])
    is_token = place < jnp.sum(lengths, axis=1)[:, None]
    starts = jnp.zeros(is_token.shape, jnp.int32) if packed.segments is None else packed.segments
    return _Places(starts, is_token)


def rule_over_mesh(inputs: DeltaInputs, starts_nt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs `gated_delta_rule` on each device's own sequences and heads, as the logical rules in context split them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.empty:
        return gated_delta_rule(inputs, starts_nt)
    batch_axes, head_axes = sequence_and_head_axes(mesh, inputs.key.shape[2])
    tokens, states = PartitionSpec(batch_axes, None, head_axes), PartitionSpec(batch_axes, head_axes)
    # Left to itself, XLA could split the loop over chunks along the states' widths, with communication in every step.
    rule = jax.shard_map(
        gated_delta_rule,
        mesh=mesh,
        in_specs=(tokens, PartitionSpec(batch_axes)),
        out_specs=(tokens, states),
        check_vma=False,
    )
    return rule(inputs, starts_nt)
