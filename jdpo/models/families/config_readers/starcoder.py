"""Reads config.json of StarCoder2."""

from __future__ import annotations

from typing import Any

from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import ModelConfig


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
