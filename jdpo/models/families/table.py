"""The table of families: for each a function that reads its config.json, and the layout of its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.models.families.layouts import GEMMA2, GPT2, GPT_NEOX, LLAMA, MIXTRAL, OLMO2, PHI3, QWEN3_MOE, Layout
from jdpo.models.families.shared import (
    above_zero,
    activation_of,
    decoder,
    experts_of,
    rope_of,
    same_layers,
    windows_of,
)
from jdpo.models.model_config import LayerKind, ModelConfig, MoEConfig


class Family(NamedTuple):
    """One family of models.

    Attributes:
      read: converts transformers' config of a model. Raises ValueError for settings that the decoder lacks.
      layout: the tensors of its checkpoints.
    """

    read: Callable[[Any], ModelConfig]
    layout: Layout


def _llama_like(hf_config: Any, *, layers: tuple[LayerKind, ...], **mechanisms: Any) -> ModelConfig:
    """Reads optional biases of attention and of the MLP, which llama, smollm3 and granite share."""
    attention_bias = bool(hf_config.attention_bias)
    own = {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(getattr(hf_config, "mlp_bias", False)),
    }
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config), **{**own, **mechanisms})


def _llama(hf_config: Any) -> ModelConfig:
    return _llama_like(hf_config, layers=same_layers(hf_config))


def _mistral(hf_config: Any) -> ModelConfig:
    layers = same_layers(hf_config, window=hf_config.sliding_window)
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config))


def _by_window(hf_config: Any) -> tuple[LayerKind, ...]:
    rope = rope_of(hf_config)
    return tuple(LayerKind(rope=rope, window=window) for window in windows_of(hf_config))


def _qwen2(hf_config: Any) -> ModelConfig:
    # Qwen2 always has biases on query, key and value; config.json has no key for them.
    return decoder(hf_config, layers=_by_window(hf_config), activation=activation_of(hf_config), qkv_bias=True)


def _qwen3(hf_config: Any) -> ModelConfig:
    return _llama_like(hf_config, layers=_by_window(hf_config), qk_norm="head")


def _mixtral(hf_config: Any) -> ModelConfig:
    if hf_config.router_jitter_noise:
        raise ValueError(
            f"router_jitter_noise: {hf_config.router_jitter_noise} is not supported, expected 0: routers would see "
            "other inputs in training than in evaluation"
        )
    # Mixtral always normalizes the weights of a token's experts; config.json has no key for it.
    moe = experts_of(hf_config, hf_config.num_local_experts, d_ff=hf_config.intermediate_size, normalize=True)
    layers = same_layers(hf_config, window=hf_config.sliding_window)
    sparse = [dataclasses.replace(kind, mlp="experts") for kind in layers]
    return decoder(hf_config, layers=tuple(sparse), activation=activation_of(hf_config), moe=moe)


def _qwen3_moe(hf_config: Any) -> ModelConfig:
    every, dense = hf_config.decoder_sparse_step, hf_config.mlp_only_layers
    if every < 1:
        raise ValueError(f"decoder_sparse_step: expected 1 or more, found {every}")
    layers = list(same_layers(hf_config, window=hf_config.sliding_window))
    # Counted from 1: with a step of 2, layers 1, 3, .. have experts.
    sparse = [index for index in range(len(layers)) if index not in dense and (index + 1) % every == 0]
    moe: MoEConfig | None = None
    if sparse and hf_config.num_experts:
        normalize, d_ff = bool(hf_config.norm_topk_prob), hf_config.moe_intermediate_size
        moe = experts_of(hf_config, hf_config.num_experts, d_ff=d_ff, normalize=normalize)
        for index in sparse:
            layers[index] = dataclasses.replace(layers[index], mlp="experts")
    return _llama_like(hf_config, layers=tuple(layers), qk_norm="head", moe=moe)


def _smollm3(hf_config: Any) -> ModelConfig:
    rope, turned = rope_of(hf_config), hf_config.no_rope_layers
    if len(turned) < hf_config.num_hidden_layers:
        raise ValueError(f"no_rope_layers: {len(turned)} entries for {hf_config.num_hidden_layers} layers")
    windows = windows_of(hf_config)
    # Despite the key's name, an entry of 1 means that the layer has a rope.
    layers = [
        LayerKind(rope=rope if has_rope else None, window=window)
        for has_rope, window in zip(turned, windows, strict=False)
    ]
    return _llama_like(hf_config, layers=tuple(layers))


def _granite(hf_config: Any) -> ModelConfig:
    return _llama_like(
        hf_config,
        layers=same_layers(hf_config),
        embedding_scale=float(hf_config.embedding_multiplier),
        residual_scale=float(hf_config.residual_multiplier),
        attention_scale=float(hf_config.attention_multiplier),
        # Granite divides logits by this key, but multiplies by the three above.
        logit_scale=1.0 / (above_zero(hf_config, "logits_scaling") or 1.0),
    )


def _olmo2(hf_config: Any) -> ModelConfig:
    # OLMo 2 normalizes the output of each branch, and not its input.
    mechanisms = {"norm": "rms_wide", "norm_placement": "after", "qk_norm": "width"}
    return _llama_like(hf_config, layers=same_layers(hf_config), **mechanisms)


def _phi3(hf_config: Any) -> ModelConfig:
    layers = same_layers(hf_config, window=hf_config.sliding_window, partial=True)
    return decoder(hf_config, layers=layers, activation=activation_of(hf_config))


def _gemma_like(hf_config: Any, *, activation: str, **mechanisms: Any) -> ModelConfig:
    """Sets the mechanisms that all Gemma models share: norms of 1 + w, and embeddings times sqrt(d)."""
    bias = bool(hf_config.attention_bias)
    return decoder(
        hf_config,
        activation=activation_of(hf_config, activation),
        qkv_bias=bias,
        o_bias=bias,
        norm="rms_offset",
        embedding_scale=float(hf_config.hidden_size**0.5),
        **mechanisms,
    )


def _gemma(hf_config: Any) -> ModelConfig:
    return _gemma_like(hf_config, activation="hidden_act", layers=same_layers(hf_config))


def _gemma2(hf_config: Any) -> ModelConfig:
    return _gemma_like(hf_config, layers=_by_window(hf_config), **_gemma2_mechanisms(hf_config))


def _gemma2_mechanisms(hf_config: Any) -> dict[str, Any]:
    # Not always the head width: Gemma 2 27B has d_model / num_heads here.
    scalar = above_zero(hf_config, "query_pre_attn_scalar")
    return {
        "activation": "hidden_activation",
        "norm_placement": "both",
        "attention_scale": None if scalar is None else scalar**-0.5,
        "attention_softcap": above_zero(hf_config, "attn_logit_softcapping"),
        "logit_softcap": above_zero(hf_config, "final_logit_softcapping"),
    }


def _gemma3_text(hf_config: Any) -> ModelConfig:
    types = zip(hf_config.layer_types, windows_of(hf_config), strict=True)
    # Layers with a window have a rope of their own, with shorter waves.
    ropes = {kind: rope_of(hf_config, kind) for kind in set(hf_config.layer_types)}
    layers = tuple(LayerKind(rope=ropes[kind], window=window) for kind, window in types)
    mechanisms = _gemma2_mechanisms(hf_config)
    if mechanisms["attention_softcap"] is not None:  # transformers' class reads it and does not use it
        raise ValueError("attn_logit_softcapping: not a setting that models of the family gemma3_text follow")
    return _gemma_like(hf_config, layers=layers, qk_norm="head", **mechanisms)


def _plain_heads(hf_config: Any) -> dict[str, int]:
    """Returns sizes of families without grouped queries and with heads of width d / h, whatever config.json has."""
    num_heads = hf_config.num_attention_heads
    return {"num_kv_heads": num_heads, "head_dim": hf_config.hidden_size // num_heads}


def _gpt2(hf_config: Any) -> ModelConfig:
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


def _gpt_neox(hf_config: Any) -> ModelConfig:
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


FAMILIES: dict[str, Family] = {
    "gemma": Family(_gemma, LLAMA),
    "gemma2": Family(_gemma2, GEMMA2),
    "gemma3_text": Family(_gemma3_text, GEMMA2),
    "gpt2": Family(_gpt2, GPT2),
    "gpt_neox": Family(_gpt_neox, GPT_NEOX),
    "granite": Family(_granite, LLAMA),
    "llama": Family(_llama, LLAMA),
    "mistral": Family(_mistral, LLAMA),
    "mixtral": Family(_mixtral, MIXTRAL),
    "olmo2": Family(_olmo2, OLMO2),
    "phi3": Family(_phi3, PHI3),
    "qwen2": Family(_qwen2, LLAMA),
    "qwen3": Family(_qwen3, LLAMA),
    "qwen3_moe": Family(_qwen3_moe, QWEN3_MOE),
    "smollm3": Family(_smollm3, LLAMA),
}
