"""Reads config.json of gpt-oss."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_readers.expert_settings import experts_of
from jdpo.models.families.config_readers.numbers_above_zero import positive
from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.families.config_readers.shared import decoder, windows_of
from jdpo.models.model_config import ClampedGate, LayerKind, ModelConfig


def gpt_oss(hf_config: Any) -> ModelConfig:
    if hf_config.hidden_act != "silu":
        raise ValueError(f"hidden_act: {hf_config.hidden_act!r} is not supported, expected 'silu' in the clamped gate")
    moe = experts_of(hf_config, hf_config.num_local_experts, d_ff=hf_config.intermediate_size, normalize=True)
    if not hf_config.output_router_logits:
        # Published configs have 0.9, with which balance would outweigh every preference; transformers' class adds the
        # loss only if it returns the router's logits.
        moe = dataclasses.replace(moe, aux_loss_coef=0.0)
    # Early versions 5 of transformers have both as constants in the modeling file.
    alpha, limit = getattr(hf_config, "swiglu_alpha", 1.702), getattr(hf_config, "swiglu_limit", 7.0)
    gate = ClampedGate(positive("swiglu_alpha", alpha), positive("swiglu_limit", limit))
    rope = rope_of(hf_config)
    return decoder(
        hf_config,
        layers=tuple(LayerKind(rope=rope, window=window, mlp="experts") for window in windows_of(hf_config)),
        formats=("mxfp4",),
        moe=dataclasses.replace(moe, bias=True, clamped_gate=gate),
        norm="rms_wide",
        attention_sinks=True,
        qkv_bias=bool(hf_config.attention_bias),
        o_bias=bool(hf_config.attention_bias),
    )
