"""Hugging Face config.json -> ModelConfig: which families jdpo trains, one entry a family.

A setting that changes the arithmetic and that the decoder lacks is refused by name: model_type, hidden_act,
mlp_bias, quantization_config, rope_type, rope_parameters nested by layer type, partial_rotary_factor, layer_types,
is_causal, per_layer_config. Settings that do not change a forward pass are ignored: initializer_range, use_cache,
pretraining_tp, output_*, and attention_dropout, since preference training runs without dropout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdpo.models.config import LayerKind, ModelConfig, RopeConfig

__all__ = ["FAMILIES", "read_model_config"]

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`) in style.

    Raises:
      ValueError: no folder, no config.json, broken JSON, an unsupported family, or a setting the decoder lacks.
    """
    raw = _read_json(folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder}/config.json: model_type {family!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    # transformers fills the defaults that save_pretrained leaves out, and brings old rope keys to the new form.
    from transformers import AutoConfig

    try:
        # Left unset, trust_remote_code is asked for on the terminal, and "y" runs Python files of the folder.
        hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise their own types, KeyError and bare TypeError among them
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}/config.json: this model needs Python code of its own (auto_map), which jdpo never runs; "
                f"supported are {', '.join(sorted(FAMILIES))} as transformers has them"
            ) from None
        raise ValueError(f"{folder}/config.json: transformers cannot read it: {error}") from error
    try:
        return FAMILIES[family](hf_config)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist (or is not a folder)")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _refuse_unsupported(hf_config: Any) -> None:
    """Names every setting that would change the arithmetic and that the decoder does not have."""
    for key, expected in {"hidden_act": "silu", "mlp_bias": False, "is_causal": True}.items():
        value = getattr(hf_config, key, None)
        if value not in (None, expected):
            raise ValueError(f"{key}: {value!r} is not supported, expected {expected!r}")
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config: quantized weights cannot be trained; "
            "use the unquantized model, or dequantize it first"
        )
    if getattr(hf_config, "is_heterogeneous", False):
        raise ValueError("per_layer_config: layers that differ in size are not supported")


def _rope(hf_config: Any) -> RopeConfig:
    parameters = dict(hf_config.rope_parameters or {})
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters: one rope a layer type ({', '.join(nested)}) is not supported for this family"
        )
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: {parameters['partial_rotary_factor']} is not supported, expected 1.0")
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=float(parameters["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope_type: {kind!r} is not supported; supported are default, linear, llama3")


def _decoder(hf_config: Any, *, windows: tuple[int | None, ...], **family_fields: Any) -> ModelConfig:
    """The part of the mapping that all Llama-shaped families share."""
    _refuse_unsupported(hf_config)
    num_heads, num_kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    rope = _rope(hf_config)
    return ModelConfig(
        family=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        num_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        d_ff=hf_config.intermediate_size,
        norm_eps=float(hf_config.rms_norm_eps),
        tie_embeddings=bool(hf_config.tie_word_embeddings),
        layers=tuple(LayerKind(rope=rope, window=window) for window in windows),
        max_positions=hf_config.max_position_embeddings,
        **family_fields,
    )


def _uniform_windows(hf_config: Any, window: int | None) -> tuple[int | None, ...]:
    # transformers' own classes of these families ignore layer_types: following them would train a different model.
    if getattr(hf_config, "layer_types", None) is not None:
        raise ValueError(f"layer_types: not a setting of the family {hf_config.model_type}")
    return (window,) * hf_config.num_hidden_layers


def _windows_of_layer_types(hf_config: Any) -> tuple[int | None, ...]:
    layer_types = hf_config.layer_types
    unknown = sorted(set(layer_types) - {FULL_ATTENTION, SLIDING_ATTENTION})
    if unknown:
        raise ValueError(
            f"layer_types: {unknown[0]!r} is not supported; supported are {FULL_ATTENTION}, {SLIDING_ATTENTION}"
        )
    if SLIDING_ATTENTION in layer_types and hf_config.sliding_window is None:
        raise ValueError(
            "layer_types has sliding_attention, but sliding_window is not set or use_sliding_window is false"
        )
    return tuple(hf_config.sliding_window if kind == SLIDING_ATTENTION else None for kind in layer_types)


def _llama(hf_config: Any) -> ModelConfig:
    bias = bool(hf_config.attention_bias)
    windows = _uniform_windows(hf_config, None)
    return _decoder(hf_config, windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=False)


def _mistral(hf_config: Any) -> ModelConfig:
    windows = _uniform_windows(hf_config, hf_config.sliding_window)
    return _decoder(hf_config, windows=windows, qkv_bias=False, o_bias=False, qk_norm=False)


def _qwen2(hf_config: Any) -> ModelConfig:
    windows = _windows_of_layer_types(hf_config)
    return _decoder(hf_config, windows=windows, qkv_bias=True, o_bias=False, qk_norm=False)


def _qwen3(hf_config: Any) -> ModelConfig:
    bias = bool(hf_config.attention_bias)
    windows = _windows_of_layer_types(hf_config)
    return _decoder(hf_config, windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


FAMILIES: dict[str, Callable[[Any], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
