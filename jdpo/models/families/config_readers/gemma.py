"""Reads config.json of the Gemma families."""

from __future__ import annotations

from typing import Any

from jdpo.models.families.config_readers.llama import by_layer_type, by_window
from jdpo.models.families.config_readers.numbers_above_zero import above_zero
from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import ModelConfig


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


def gemma(hf_config: Any) -> ModelConfig:
    return _gemma_like(hf_config, activation="hidden_act", layers=same_layers(hf_config))


def gemma2(hf_config: Any) -> ModelConfig:
    return _gemma_like(hf_config, layers=by_window(hf_config), **_gemma2_mechanisms(hf_config))


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


def gemma3_text(hf_config: Any) -> ModelConfig:
    mechanisms = _gemma2_mechanisms(hf_config)
    if mechanisms["attention_softcap"] is not None:  # transformers' class reads it and does not use it
        raise ValueError("attn_logit_softcapping: not a setting that models of the family gemma3_text follow")
    # Layers with a window have a rope of their own, with shorter waves.
    return _gemma_like(hf_config, layers=by_layer_type(hf_config), qk_norm="head", **mechanisms)


def gemma3_of_images(hf_config: Any) -> ModelConfig:
    """Reads the text part of Gemma 3 with images, whose class in transformers caps no logits."""
    if hf_config.final_logit_softcapping is not None:
        raise ValueError("final_logit_softcapping: not a setting that models of the family gemma3 follow")
    return gemma3_text(hf_config)
