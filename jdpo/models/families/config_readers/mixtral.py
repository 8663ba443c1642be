"""Reads config.json of Mixtral."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_readers.expert_settings import experts_of
from jdpo.models.families.config_readers.shared import activation_of, decoder, same_layers
from jdpo.models.model_config import ModelConfig


def mixtral(hf_config: Any) -> ModelConfig:
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
