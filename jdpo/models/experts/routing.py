"""Mixture of experts: a router that selects experts for each token, and the weighted sum of these experts.

Axes: n sequences or rows, t positions or slots, k experts of a token, e experts, d model, f expert width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.experts.expert_mlps import ExpertMap, ExpertMaps, Gate, mixture
from jdpo.models.experts.shared_expert import SharedExpert
from jdpo.models.layers import ACTIVATIONS, ADAPTERS, INIT_STDDEV, SCALES, Projection
from jdpo.models.model_config import Activation, MoEConfig
from jdpo.models.remat import ROUTING
from jdpo.types import RouterStats

ROUTER = "router"
"""Collection for the statistics of each layer's router, written if the caller makes it mutable."""


class MoE(nn.Module):
    """The sum of the experts that the router selects, weighted by its probabilities, and of a shared expert if any.

    Writes sums over the tokens of a sequence, weighted by `token_weights_nt`, to the collection ROUTER:
      assignments: [n, e], number of tokens of each expert.
      probabilities: [n, e], the router's probability of each expert.
      tokens: [n], number of tokens.
    """

    config: MoEConfig
    d_model: int
    activation: Activation
    compute_dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_ntd: jax.Array, token_weights_nt: jax.Array) -> jax.Array:
        """
        Args:
          token_weights_nt: weight of a token in the router's statistics; 0 on padding, which is not routed.
        """
        num_experts, num_chosen = self.config.num_experts, self.config.experts_per_token
        wide = jnp.promote_types(self.compute_dtype, jnp.float32)
        # In float32: a rounding error can change which experts are selected.
        route = Projection(
            *("ntd,de->nte", (self.d_model, num_experts), ("embed", None), wide, self.param_dtype),
            use_bias=self.config.bias,
            name="router",
        )
        probabilities_nte = jax.nn.softmax(route(x_ntd.astype(wide)))
        # Kept by every remat policy. The first of equal probabilities is selected.
        experts_ntk = checkpoint_name(jax.lax.top_k(probabilities_nte, num_chosen)[1], ROUTING)
        # Compared, not gathered: the transpose of a gather is a scatter-add.
        is_chosen_ntke = experts_ntk[..., None] == jnp.arange(num_experts)
        weights_ntk = jnp.where(is_chosen_ntke, probabilities_nte[..., None, :], 0).sum(-1)
        # Over the selected experts only, so that their weights sum to 1: the softmax of their logits alone.
        if self.config.normalize:
            weights_ntk = weights_ntk / weights_ntk.sum(-1, keepdims=True)
        self._leave(is_chosen_ntke.any(-2), probabilities_nte, token_weights_nt)
        # An index past the last expert means none, so padding is computed by no expert.
        experts_ntk = jnp.where((token_weights_nt > 0)[..., None], experts_ntk, num_experts)
        mixed_ntd = mixture(x_ntd, weights_ntk, experts_ntk, self._maps(), gate_function(self.config, self.activation))
        if self.config.shared_d_ff is None:
            return mixed_ntd
        sizes, dtypes = (self.d_model, self.config.shared_d_ff), (self.compute_dtype, self.param_dtype)
        return mixed_ntd + SharedExpert(*sizes, self.activation, *dtypes, name="shared")(x_ntd)

    def _leave(self, is_chosen_nte: jax.Array, probabilities_nte: jax.Array, token_weights_nt: jax.Array) -> None:
        weights_nt1 = token_weights_nt[..., None].astype(probabilities_nte.dtype)
        statistics = {
            "assignments": jnp.where(is_chosen_nte, weights_nt1, 0).sum(1),
            # Selected, not multiplied by 0: values on padding may be NaN.
            "probabilities": jnp.where(weights_nt1 > 0, weights_nt1 * probabilities_nte, 0).sum(1),
            "tokens": weights_nt1[..., 0].sum(1),
        }
        for name, values in statistics.items():
            # `sow` would append to a tuple; a router runs once per call, so the value itself is kept.
            self.sow(ROUTER, name, values, init_fn=lambda: None, reduce_fn=lambda _, new: new)

    def _maps(self) -> ExpertMaps:
        inner, outer = ("expert_embed", self.d_model), ("expert_mlp", self.config.d_ff)
        dtypes = self.compute_dtype, self.param_dtype
        return Experts(self.config.num_experts, inner, outer, *dtypes, self.config.bias, name="experts")()


def gate_function(config: MoEConfig, activation: Activation) -> Gate:
    """Returns the elementwise function of an expert's gate and up."""
    if config.clamped_gate is None:
        return lambda gate, up: ACTIVATIONS[activation](gate) * up
    alpha, limit = config.clamped_gate

    def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
        # Selected, not clipped: at the limit itself the gradient passes, as in torch, where that of min is halved.
        gate = jnp.where(gate > limit, limit, gate)
        up = jnp.where(jnp.abs(up) > limit, jnp.sign(up) * limit, up)
        return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))

    return clamped


def router_stats(left: dict[str, Any]) -> RouterStats:
    """Sums the statistics in ROUTER over the layers, scanned (with a leading axis of layers) or not."""
    totals: dict[str, Any] = {}

    def add(path: Any, values: jax.Array) -> None:
        name = path[-1].key
        # [layers, n, e], or [layers, n] for "tokens"; one layer if it is not scanned.
        per_layer = values.reshape(-1, *values.shape[values.ndim - (1 if name == "tokens" else 2) :])
        totals[name] = totals.get(name, 0) + per_layer.sum(0)

    jax.tree_util.tree_map_with_path(add, left)
    return RouterStats(**totals)


class Experts(nn.Module):
    """The kernels of all experts, `gate`, `up` and `down`."""

    num_experts: int
    model: tuple[str, int]  # logical name and size
    width: tuple[str, int]
    compute_dtype: Any
    param_dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> ExpertMaps:
        def held(name: str, inputs: tuple[str, int], outputs: tuple[str, int]) -> ExpertMap:
            axes, shape = zip(("expert", self.num_experts), inputs, outputs, strict=True)
            return ExpertKernel(shape, axes, self.compute_dtype, self.param_dtype, self.use_bias, name=name)()

        model, width = self.model, self.width
        return ExpertMaps(held("gate", model, width), held("up", model, width), held("down", width, model))


class ExpertKernel(nn.Module):
    """One linear map of every expert, [e, inputs, outputs], with its scale and adapter, and its bias [e, outputs].

    As for `Projection`: "kernel" [e, outputs] in SCALES, "a" [e, inputs, rank] and "b" [e, rank, outputs] in ADAPTERS.
    """

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    compute_dtype: Any
    param_dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> ExpertMap:
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), self.axes)
        kernel = self.param("kernel", init, self.shape, self.param_dtype).astype(self.compute_dtype)
        held = ExpertMap(kernel, self.get_variable(SCALES, "kernel") if self.has_variable(SCALES, "kernel") else None)
        if self.has_variable(ADAPTERS, "a"):
            a, b = (self.get_variable(ADAPTERS, name).astype(self.compute_dtype) for name in ("a", "b"))
            held = held._replace(a=a, b=b)
        if self.use_bias:
            experts, _, outputs = self.axes
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (experts, outputs))
            bias = self.param("bias", zeros, (self.shape[0], self.shape[2]), self.param_dtype)
            held = held._replace(bias=bias.astype(self.compute_dtype))
        return held
