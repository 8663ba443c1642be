"""Reads settings of config.json that families share, and refuses those that the decoder lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jdpo.models.model_config import Activation, LayerKind, ModelConfig, MoEConfig, RopeConfig, RopeKind

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Activations by Hugging Face's names; gelu_new and gelu_pytorch_tanh are the same formula."""

_REFUSED = ("is_causal", "use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder")


def decoder(hf_config: Any, *, layers: tuple[LayerKind, ...], **own: Any) -> ModelConfig:
    """Builds a `ModelConfig` from the sizes that most families share and a family's own sizes and mechanisms.

    Raises:
      ValueError: sizes are inconsistent, or a setting is one that the decoder lacks.
    """
    _refuse_unsupported(hf_config)
    num_heads = hf_config.num_attention_heads
    sizes = {
        # Missing or null in models without grouped queries.
        "num_kv_heads": getattr(hf_config, "num_key_value_heads", None) or num_heads,
        # Missing or null in models whose heads divide the width evenly.
        "head_dim": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        "d_ff": getattr(hf_config, "intermediate_size", None),
        # Families with LayerNorm have another key for it, and pass it in `own`.
        "norm_eps": getattr(hf_config, "rms_norm_eps", None),
        "max_positions": hf_config.max_position_embeddings,
        **_end_of(layers),
        # Last, so that a family's own values take precedence over the shared ones.
        **own,
    }
    if num_heads % sizes["num_kv_heads"]:
        raise ValueError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {sizes['num_kv_heads']}"
        )
    if hf_config.num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers: expected at least 1, found {hf_config.num_hidden_layers}")
    head_dim = sizes["head_dim"]
    for kind in layers:
        _check_layer(kind, head_dim)
    if any(kind.rope.rotated_dims(head_dim) % 2 for kind in layers if kind.rope is not None):
        raise ValueError(f"head_dim {head_dim} is odd, or the part of it that is rotated; rotation needs pairs")
    return ModelConfig(
        family=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        num_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        num_heads=num_heads,
        layers=layers,
        tie_embeddings=bool(hf_config.tie_word_embeddings),
        **sizes,
    )


def _check_layer(kind: LayerKind, head_dim: int) -> None:
    if kind.window is not None and kind.window < 1:
        raise ValueError(f"sliding_window: expected at least 1, found {kind.window}; null for none")
    if kind.rope is not None and kind.rope.kind == "longrope":
        pairs = kind.rope.rotated_dims(head_dim) // 2
        if len(kind.rope.divisors) != pairs:
            raise ValueError(
                f"short_factor of longrope: expected {pairs} numbers, one for each rotated pair, found "
                f"{len(kind.rope.divisors)}"
            )


def _end_of(layers: tuple[LayerKind, ...]) -> dict[str, Any]:
    """Returns the limit of positions of longrope, whose first factors hold for the original length; see `rope_of`."""
    ropes = [kind.rope for kind in layers if kind.rope is not None]
    ends = [rope.original_max_positions for rope in ropes if rope.kind == "longrope"]
    return {"max_positions": min(ends), "positions_end": True} if ends else {}


def _refuse_unsupported(hf_config: Any) -> None:
    """Refuses settings that would change the arithmetic and that the decoder lacks."""
    for key in _REFUSED:
        # is_causal must be true, all others false.
        value, expected = getattr(hf_config, key, None), key == "is_causal"
        if value not in (None, expected):
            raise ValueError(f"{key}: {value!r} is not supported, expected {expected!r}")
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config: quantized weights cannot be trained; "
            "use the unquantized model, or dequantize it first"
        )
    if getattr(hf_config, "is_heterogeneous", False):
        raise ValueError("per_layer_config: layers that differ in size are not supported")


_OTHER_EXPERTS = {
    "shared_expert_intermediate_size": None,
    "n_shared_experts": None,
    "num_shared_experts": None,
    "scoring_func": "softmax",
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
}
"""Settings of related families for shared experts or another choice of experts, with the value that means none."""


def experts_of(hf_config: Any, num_experts: int, *, d_ff: int, normalize: bool) -> MoEConfig:
    """Reads the settings of experts.

    Raises:
      ValueError: a token has more experts than there are, or the experts are of another kind.
    """
    for key, expected in _OTHER_EXPERTS.items():
        value = getattr(hf_config, key, None)
        # 0, null and false all mean that the mechanism is off.
        if value and value != expected:
            raise ValueError(
                f"{key}: {value!r} is not supported, and transformers' {hf_config.model_type} does not know it; "
                f"expected {expected!r}"
            )
    chosen = hf_config.num_experts_per_tok
    if not 1 <= chosen <= num_experts:
        raise ValueError(f"num_experts_per_tok: expected 1 to {num_experts}, the number of experts, found {chosen}")
    coef = hf_config.router_aux_loss_coef
    if not 0 <= coef < math.inf:
        raise ValueError(f"router_aux_loss_coef: expected 0 or more, found {coef}")
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=chosen,
        d_ff=d_ff,
        normalize=normalize,
        aux_loss_coef=float(coef),
    )


def activation_of(hf_config: Any, key: str = "hidden_act") -> Activation:
    """Reads the MLP's activation function.

    Raises:
      ValueError: the decoder lacks it.
    """
    name = getattr(hf_config, key)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key}: {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def above_zero(hf_config: Any, key: str) -> float | None:
    """Reads a cap or a divisor; None if it is not set.

    Raises:
      ValueError: the value is not a number above 0.
    """
    value = getattr(hf_config, key)
    return None if value is None else _positive(key, value)


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: expected a number above 0, found {value!r}")
    return float(value)


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
    parameters = dict(hf_config.rope_parameters or {})
    if layer_type is not None:
        parameters = dict(parameters[layer_type])
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
    return RopeConfig(theta=_positive("rope_theta", parameters.get("rope_theta")), kind=kind, fraction=fraction, **own)


def _no_rope_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    return {}


def _linear_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    return {"factor": _positive("factor of rope_parameters", parameters.get("factor"))}


def _llama3_settings(parameters: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    factors = {key: _positive(key, parameters.get(key)) for key in ("factor", "low_freq_factor", "high_freq_factor")}
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
    if attention_factor is None:
        scale, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
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
    return original, _positive("factor of rope_parameters", factor)


def _original_length(parameters: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(_positive(key, parameters.get(key)))


_ROPE_SETTINGS: dict[RopeKind, Callable[[dict[str, Any], Any], dict[str, Any]]] = {
    "default": _no_rope_settings,
    "linear": _linear_settings,
    "llama3": _llama3_settings,
    "yarn": _yarn_settings,
    "longrope": _longrope_settings,
}


def same_layers(hf_config: Any, *, window: int | None = None, partial: bool = False) -> tuple[LayerKind, ...]:
    """Returns layers that are all of one kind.

    Raises:
      ValueError: config.json has layer_types, which the family does not support.
    """
    # transformers' own classes of these families ignore layer_types: following them would train a different model.
    if getattr(hf_config, "layer_types", None) is not None:
        raise ValueError(f"layer_types: not a setting of the family {hf_config.model_type}")
    kind = LayerKind(rope=rope_of(hf_config, partial=partial), window=window)
    return (kind,) * hf_config.num_hidden_layers


def windows_of(hf_config: Any) -> tuple[int | None, ...]:
    """Returns the window of each layer, by its type.

    Raises:
      ValueError: a type is unknown, or is sliding although there is no window.
    """
    layer_types = hf_config.layer_types
    unknown = sorted(set(layer_types) - {FULL_ATTENTION, SLIDING_ATTENTION})
    if unknown:
        raise ValueError(
            f"layer_types: {unknown[0]!r} is not supported; supported are {FULL_ATTENTION}, {SLIDING_ATTENTION}"
        )
    # Qwen's configs keep a window that use_sliding_window turns off.
    is_off = hf_config.sliding_window is None or getattr(hf_config, "use_sliding_window", True) is False
    if SLIDING_ATTENTION in layer_types and is_off:
        raise ValueError(
            "layer_types has sliding_attention, but sliding_window is not set or use_sliding_window is false"
        )
    return tuple(hf_config.sliding_window if kind == SLIDING_ATTENTION else None for kind in layer_types)
