"""Reads the settings of rotary position embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jdpo.models.families.config_readers.numbers_above_zero import positive
from jdpo.models.model_config import RopeConfig, RopeKind


def rope_of(hf_config: Any, layer_type: str | None = None, *, partial: bool = False) -> RopeConfig:
    """Reads the rotary embedding.

    longrope has two sets of factors, for sequences up to the original length and for longer ones. Only the first set is
    supported, so the model ends at that length.

    Args:
      layer_type: the type of layer, for families with one rope per type.
      partial: True if the family can rotate a part of each head.

    Raises:
      ValueError: the decoder lacks the type of rope or one of its settings.
    """
    # Not copied: what is read of it is recorded, and the rest is refused.
    parameters = hf_config.rope_parameters or {}
    if layer_type is not None:
        if layer_type not in parameters:
            # Early versions 5 of transformers make one rope for all layers of what Olmo 3 publishes.
            raise ValueError(
                f"rope_parameters: expected a rope for the layers of each type, found none for {layer_type}; upgrade "
                "transformers, or write them by type"
            )
        parameters = parameters[layer_type]
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters: one rope per layer type ({', '.join(nested)}) is not supported for this family"
        )
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_SETTINGS:
        raise ValueError(f"rope_type: {kind!r} is not supported; supported are {', '.join(_ROPE_SETTINGS)}")
    fraction = float(parameters.get("partial_rotary_factor", 1.0))
    if fraction != 1.0 and not (partial and 0 < fraction < 1):
        raise ValueError(f"partial_rotary_factor: {fraction} is not supported, expected 1.0")
    own = _ROPE_SETTINGS[kind](parameters, hf_config)
    return RopeConfig(theta=positive("rope_theta", parameters.get("rope_theta")), kind=kind, fraction=fraction, **own)


def _no_rope_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    return {}


def _linear_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    return {"factor": positive("factor of rope_parameters", parameters.get("factor"))}


def _llama3_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    factors = {key: positive(key, parameters.get(key)) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["low_freq_factor"] >= factors["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor: expected less than high_freq_factor, {factors['high_freq_factor']}, found "
            f"{factors['low_freq_factor']}"
        )
    return {
        **factors,
        "original_max_positions": _original_length(parameters),
    }


def _yarn_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    original, factor = _stretch(parameters, hf_config)

    def magnitude(scale: float) -> float:
        # The YaRN paper's sqrt(1/t): it scales queries and keys alike, by way of cosines and sines.
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    scale, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None:
        attention_factor = magnitude(scale) / magnitude(all_dims) if scale and all_dims else magnitude(1.0)
    return {
        "factor": factor,
        "attention_factor": float(attention_factor),
        "original_max_positions": original,
        # Null means the default here, as in transformers.
        "beta_fast": float(parameters.get("beta_fast") or 32),
        "beta_slow": float(parameters.get("beta_slow") or 1),
        "truncate": bool(parameters.get("truncate", True)),
    }


def _longrope_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    original, factor = _stretch(parameters, hf_config)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        # Phi-3's formula, as in transformers.
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "attention_factor": float(attention_factor),
        "original_max_positions": original,
        "divisors": tuple(float(value) for value in parameters["short_factor"]),
    }


def _stretch(parameters: dict[str, Any], hf_config: Any) -> tuple[int, float]:
    """Returns the original number of positions, and the factor by which it was extended."""
    original, factor = _original_length(parameters), parameters.get("factor")
    if factor is None:
        # Phi-3's configs have no factor; the two lengths imply it.
        return original, float(hf_config.max_position_embeddings / original)
    return original, positive("factor of rope_parameters", factor)


def _original_length(parameters: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(positive(key, parameters.get(key)))


_ROPE_SETTINGS: dict[RopeKind, Callable[[dict[str, Any], Any], dict[str, Any]]] = {
    "default": _no_rope_settings,
    "linear": _linear_settings,
    "llama3": _llama3_settings,
    "yarn": _yarn_settings,
    "longrope": _longrope_settings,
}
