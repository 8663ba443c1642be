"""Reads config.json of GPT-2, GPT-NeoX and StarCoder2, which have LayerNorm and an MLP without a gate."""

from __future__ import annotations

from typing import Any

from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import LayerKind, ModelConfig


def _plain_heads(hf_config: Any) -> dict[str, Any]:
    """Returns sizes of families without grouped queries and with heads of width d / h.

    Raises:
      ValueError: config.json has other sizes, which transformers' classes of these families do not follow.
    """
    num_heads = hf_config.num_attention_heads
    head_dim = hf_config.hidden_size // num_heads
    for key, size in (("num_key_value_heads", num_heads), ("head_dim", head_dim)):
        found = getattr(hf_config, key, None)
        if found not in (None, size):
            raise ValueError(f"{key}: {found!r} is not supported in a model of this family, expected {size}")
    return {"num_kv_heads": num_heads, "head_dim": head_dim}


def gpt2(hf_config: Any) -> ModelConfig:
    if hf_config.scale_attn_by_inverse_layer_idx:
        raise ValueError("scale_attn_by_inverse_layer_idx: True is not supported, expected False")
    return decoder(
        hf_config,
        # Positions come from a learned table instead.
        layers=(LayerKind(rope=None),) * hf_config.num_hidden_layers,
        **_plain_heads(hf_config),
        # Null means four times the width, as in transformers.
        d_ff=hf_config.n_inner if hf_config.n_inner is not None else 4 * hf_config.hidden_size,
        norm_eps=float(hf_config.layer_norm_epsilon),
        norm="layer",
        qkv_bias=True,
        o_bias=True,
        attention_scale=None if hf_config.scale_attn_weights else 1.0,
        activation=activation_of(hf_config, "activation_function"),
        gated_mlp=False,
        mlp_bias=True,
        learned_positions=True,
        # The table has no row for a later position.
        positions_end=True,
    )


def gpt_neox(hf_config: Any) -> ModelConfig:
    bias = bool(hf_config.attention_bias)
    return decoder(
        hf_config,
        layers=same_layers(hf_config, partial=True),
        **_plain_heads(hf_config),
        norm_eps=float(hf_config.layer_norm_eps),
        norm="layer",
        qkv_bias=bias,
        o_bias=bias,
        parallel_residual=bool(hf_config.use_parallel_residual),
        activation=activation_of(hf_config),
        gated_mlp=False,
        mlp_bias=True,
    )


def starcoder2(hf_config: Any) -> ModelConfig:
    bias = bool(hf_config.use_bias)
    return decoder(
        hf_config,
        layers=same_layers(hf_config, window=hf_config.sliding_window),
        norm_eps=float(hf_config.norm_epsilon),
        norm="layer",
        qkv_bias=bias,
        o_bias=bias,
        activation=activation_of(hf_config),
        gated_mlp=False,
        mlp_bias=bias,
    )
