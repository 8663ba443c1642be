"""Reads config.json of the Qwen families."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_readers.expert_settings import experts_of
from jdpo.models.families.config_readers.llama import by_window, llama_like
from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import LayerKind, ModelConfig, MoEConfig


def qwen2(hf_config: Any) -> ModelConfig:
    """Reads Qwen2, and the text part of Qwen2.5-VL, whose rope is a plain one in rows without images."""
    # Qwen2 always has biases on query, key and value; config.json has no key for them.
    return decoder(hf_config, layers=by_window(hf_config), activation=activation_of(hf_config), qkv_bias=True)


def qwen3(hf_config: Any) -> ModelConfig:
    return llama_like(hf_config, layers=by_window(hf_config), qk_norm="head")


def qwen3_vl_text(hf_config: Any) -> ModelConfig:
    # In a row without images a token has one position in all three sections of the rope, which makes it a plain rope.
    return llama_like(hf_config, layers=same_layers(hf_config), qk_norm="head")


def qwen3_moe(hf_config: Any) -> ModelConfig:
    layers, moe = with_experts(hf_config, same_layers(hf_config, window=hf_config.sliding_window))
    return llama_like(hf_config, layers=layers, qk_norm="head", moe=moe)


def with_experts(
    hf_config: Any, layers: tuple[LayerKind, ...], *, has_shared: bool = False
) -> tuple[tuple[LayerKind, ...], MoEConfig | None]:
    """Returns the layers, with experts in those that decoder_sparse_step and mlp_only_layers leave, and the experts.

    Raises:
      ValueError: a setting of the experts is not supported.
    """
    every, dense = hf_config.decoder_sparse_step, hf_config.mlp_only_layers
    if every < 1:
        raise ValueError(f"decoder_sparse_step: expected 1 or more, found {every}")
    # Counted from 1: with a step of 2, layers 1, 3, .. have experts.
    sparse = [index for index in range(len(layers)) if index not in dense and (index + 1) % every == 0]
    if not sparse or not hf_config.num_experts:
        return layers, None
    normalize, d_ff = bool(hf_config.norm_topk_prob), hf_config.moe_intermediate_size
    moe = experts_of(hf_config, hf_config.num_experts, d_ff=d_ff, normalize=normalize, has_shared=has_shared)
    return tuple(
        dataclasses.replace(kind, mlp="experts") if index in sparse else kind for index, kind in enumerate(layers)
    ), moe
