"""Reads config.json of Qwen3-Next and Qwen3.5, whose layers have attention with a gate, or a gated delta rule."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_readers.expert_settings import experts_of
from jdpo.models.families.config_readers.llama import llama_like
from jdpo.models.families.config_readers.qwen import with_experts
from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.families.config_readers.shared import FULL_ATTENTION, activation_of, refuse_unknown_layer_types
from jdpo.models.model_config import DeltaConfig, LayerKind, ModelConfig

LINEAR_ATTENTION = "linear_attention"

_DELTA_SIZES = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
"""The sizes of a gated DeltaNet, and their names in config.json."""


def _layers(hf_config: Any) -> tuple[LayerKind, ...]:
    """Returns the layers by their types.

    Raises:
      ValueError: a type is unknown.
    """
    refuse_unknown_layer_types(hf_config, FULL_ATTENTION, LINEAR_ATTENTION)
    # Positions of time, height and width (mrope_section) are the same in rows of text, so the rope is a plain one.
    rope = rope_of(hf_config, partial=True)
    kinds = {FULL_ATTENTION: LayerKind(rope=rope), LINEAR_ATTENTION: LayerKind(rope=None, mixer="delta")}
    return tuple(kinds[layer_type] for layer_type in hf_config.layer_types)


def _delta(hf_config: Any, layers: tuple[LayerKind, ...]) -> DeltaConfig | None:
    """Reads the sizes of the gated DeltaNet, if any layer has one.

    Raises:
      ValueError: the sizes are inconsistent, or the activation of the convolution is another one.
    """
    if all(kind.mixer != "delta" for kind in layers):
        return None
    sizes = {ours: getattr(hf_config, theirs) for ours, theirs in _DELTA_SIZES.items()}
    for ours, theirs in _DELTA_SIZES.items():
        if sizes[ours] < 1:
            raise ValueError(f"{theirs}: expected 1 or more, found {sizes[ours]}")
    if sizes["num_value_heads"] % sizes["num_key_heads"]:
        raise ValueError(
            f"linear_num_value_heads {sizes['num_value_heads']} is not a multiple of linear_num_key_heads "
            f"{sizes['num_key_heads']}"
        )
    if activation_of(hf_config) != "silu":
        raise ValueError(
            f"hidden_act: {hf_config.hidden_act!r} is not supported with {LINEAR_ATTENTION}, whose convolution it "
            "would change; expected 'silu'"
        )
    return DeltaConfig(**sizes)


def _hybrid(hf_config: Any, layers: tuple[LayerKind, ...], **mechanisms: Any) -> ModelConfig:
    """Sets the mechanisms that these families share.

    Raises:
      ValueError: a setting that transformers' classes do not follow, or that the decoder lacks.
    """
    if getattr(hf_config, "attn_output_gate", True) is not True:
        raise ValueError(f"attn_output_gate: {hf_config.attn_output_gate!r} is not supported, expected true")
    own = {"norm": "rms_offset", "qk_norm": "head", "attention_gate": True, "delta": _delta(hf_config, layers)}
    return llama_like(hf_config, layers=layers, **own, **mechanisms)


def qwen3_next(hf_config: Any) -> ModelConfig:
    layers, moe = with_experts(hf_config, _layers(hf_config), has_shared=True)
    return _hybrid(hf_config, layers, moe=moe)


def qwen3_5_text(hf_config: Any) -> ModelConfig:
    return _hybrid(hf_config, _layers(hf_config))


def qwen3_5_moe_text(hf_config: Any) -> ModelConfig:
    # Every layer has experts, whose weights are always normalized; config.json has no keys for either.
    layers = tuple(dataclasses.replace(kind, mlp="experts") for kind in _layers(hf_config))
    d_ff = hf_config.moe_intermediate_size
    moe = experts_of(hf_config, hf_config.num_experts, d_ff=d_ff, normalize=True, has_shared=True)
    # No layer is dense, so config.json has no width for one.
    return _hybrid(hf_config, layers, moe=moe, d_ff=d_ff)
