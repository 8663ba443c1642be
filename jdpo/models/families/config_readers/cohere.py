"""Reads config.json of Command R7B, Command A and the others of Cohere's second generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.families.config_readers.shared import activation_of, decoder, windows_of
from jdpo.models.model_config import LayerKind, ModelConfig


def cohere2(hf_config: Any) -> ModelConfig:
    bias, rope = bool(hf_config.attention_bias), replace(rope_of(hf_config), interleaved=True)
    return decoder(
        hf_config,
        # A layer has both a window and a rope, or neither.
        layers=tuple(
            LayerKind(rope=None if window is None else rope, window=window) for window in windows_of(hf_config)
        ),
        qkv_bias=bias,
        o_bias=bias,
        norm="layer_no_bias",
        norm_eps=float(hf_config.layer_norm_eps),
        parallel_residual=True,
        shared_norm=True,
        activation=activation_of(hf_config),
        logit_scale=float(hf_config.logit_scale),
    )
