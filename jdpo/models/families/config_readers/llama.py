"""Reads config.json of families that are close to Llama."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jdpo.models.families.config_readers.numbers_above_zero import above_zero, positive
from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers, windows_of
from jdpo.models.model_config import LayerKind, ModelConfig, QueryScaling


def llama_like(hf_config: Any, *, layers: tuple[LayerKind, ...], **mechanisms: Any) -> ModelConfig:
    """Reads optional biases of attention and of the MLP, which llama, smollm3 and granite share."""
    attention_bias = bool(hf_config.attention_bias)
    own = {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(getattr(hf_config, "mlp_bias", False)),
    }
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config), **{**own, **mechanisms})


def by_window(hf_config: Any) -> tuple[LayerKind, ...]:
    rope = rope_of(hf_config)
    return tuple(LayerKind(rope=rope, window=window) for window in windows_of(hf_config))


def by_layer_type(hf_config: Any) -> tuple[LayerKind, ...]:
    """Returns layers whose window and rope are those of their type."""
    types = zip(hf_config.layer_types, windows_of(hf_config), strict=True)
    ropes = {layer_type: rope_of(hf_config, layer_type) for layer_type in set(hf_config.layer_types)}
    return tuple(LayerKind(rope=ropes[layer_type], window=window) for layer_type, window in types)


def llama(hf_config: Any) -> ModelConfig:
    return llama_like(hf_config, layers=same_layers(hf_config))


def mistral(hf_config: Any) -> ModelConfig:
    layers = same_layers(hf_config, window=hf_config.sliding_window)
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config))


def ministral3(hf_config: Any) -> ModelConfig:
    # Written as a setting of the rope, whose angles it does not change: queries are scaled by their position.
    beta = hf_config.rope_parameters.get("llama_4_scaling_beta")
    length = hf_config.rope_parameters.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < math.inf:
        raise ValueError(f"llama_4_scaling_beta of rope_parameters: expected a number of 0 or more, found {beta!r}")
    scaling = QueryScaling(beta=float(beta), length=int(positive("original_max_position_embeddings", length)))
    return decoder(
        hf_config,
        layers=same_layers(hf_config, window=hf_config.sliding_window),
        activation=activation_of(hf_config),
        query_scaling=scaling if beta else None,
    )


def smollm3(hf_config: Any) -> ModelConfig:
    rope, turned = rope_of(hf_config), hf_config.no_rope_layers
    if len(turned) < hf_config.num_hidden_layers:
        raise ValueError(f"no_rope_layers: {len(turned)} entries for {hf_config.num_hidden_layers} layers")
    windows = windows_of(hf_config)
    # Despite the key's name, an entry of 1 means that the layer has a rope.
    layers = [
        LayerKind(rope=rope if has_rope else None, window=window)
        for has_rope, window in zip(turned, windows, strict=False)
    ]
    return llama_like(hf_config, layers=tuple(layers))


def granite(hf_config: Any) -> ModelConfig:
    return llama_like(
        hf_config,
        layers=same_layers(hf_config),
        embedding_scale=float(hf_config.embedding_multiplier),
        residual_scale=float(hf_config.residual_multiplier),
        attention_scale=float(hf_config.attention_multiplier),
        # Granite divides logits by this key, but multiplies by the three above.
        logit_scale=1.0 / (above_zero(hf_config, "logits_scaling") or 1.0),
    )


# OLMo 2 normalizes the output of each branch, and not its input.
_OLMO = {"norm": "rms_wide", "norm_placement": "after", "qk_norm": "width"}


def olmo2(hf_config: Any) -> ModelConfig:
    return llama_like(hf_config, layers=same_layers(hf_config), **_OLMO)


def olmo3(hf_config: Any) -> ModelConfig:
    return llama_like(hf_config, layers=by_layer_type(hf_config), **_OLMO)


def phi3(hf_config: Any) -> ModelConfig:
    layers = same_layers(hf_config, window=hf_config.sliding_window, partial=True)
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config))


def apertus(hf_config: Any) -> ModelConfig:
    bias, is_own = bool(hf_config.attention_bias), hf_config.hidden_act == "xielu"
    return decoder(
        hf_config,
        layers=same_layers(hf_config),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        activation="xielu" if is_own else activation_of(hf_config),
        gated_mlp=False,
    )


def ernie4_5(hf_config: Any) -> ModelConfig:
    bias = bool(hf_config.use_bias)
    rope = replace(rope_of(hf_config), interleaved=True)
    return decoder(
        hf_config,
        layers=(LayerKind(rope=rope),) * hf_config.num_hidden_layers,
        activation=activation_of(hf_config),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def seed_oss(hf_config: Any) -> ModelConfig:
    return llama_like(hf_config, layers=same_layers(hf_config), o_bias=bool(hf_config.attention_out_bias))
