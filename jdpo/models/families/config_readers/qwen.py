"""Reads config.json of the Qwen families."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_readers.expert_settings import experts_of
from jdpo.models.families.config_readers.llama import by_window, llama_like
from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import ModelConfig, MoEConfig


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
    return llama_like(hf_config, layers=tuple(layers), qk_norm="head", moe=moe)
