"""Reads settings of config.json that families share, and refuses those that the decoder lacks."""

from __future__ import annotations

from typing import Any

from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.model_config import Activation, LayerKind, ModelConfig

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


def decoder(hf_config: Any, *, layers: tuple[LayerKind, ...], formats: tuple[str, ...] = (), **own: Any) -> ModelConfig:
    """Builds a `ModelConfig` from the sizes that most families share and a family's own sizes and mechanisms.

    Args:
      formats: values of quant_method whose weights are dequantized as they are read.

    Raises:
      ValueError: sizes are inconsistent, or a setting is one that the decoder lacks.
    """
    refuse_unsupported(hf_config, formats)
    num_heads = hf_config.num_attention_heads
    sizes = {
        # Missing or null in models without grouped queries.
        "num_kv_heads": getattr(hf_config, "num_key_value_heads", None) or num_heads,
        # Missing or null in models whose heads divide the width evenly.
        "head_dim": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        **_sizes_unless(own, hf_config, d_ff="intermediate_size", norm_eps="rms_norm_eps"),
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


def _sizes_unless(own: dict[str, Any], hf_config: Any, **keys: str) -> dict[str, Any]:
    """Returns the sizes that a family does not give itself; a key that is asked for counts as followed."""
    return {size: getattr(hf_config, key, None) for size, key in keys.items() if size not in own}


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


def refuse_unsupported(hf_config: Any, formats: tuple[str, ...] = ()) -> None:
    """Refuses settings that would change the arithmetic and that the decoder lacks; `formats` as in `decoder`."""
    for key in _REFUSED:
        # is_causal must be true, all others false.
        value, expected = getattr(hf_config, key, None), key == "is_causal"
        if value not in (None, expected):
            raise ValueError(f"{key}: {value!r} is not supported, expected {expected!r}")
    quantization = getattr(hf_config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method not in formats:
        raise ValueError(
            "quantization_config: quantized weights cannot be trained; "
            "use the unquantized model, or dequantize it first"
        )
    if getattr(hf_config, "is_heterogeneous", False):
        raise ValueError("per_layer_config: layers that differ in size are not supported")


def activation_of(hf_config: Any, key: str = "hidden_act") -> Activation:
    """Reads the MLP's activation function.

    Raises:
      ValueError: the decoder lacks it.
    """
    name = getattr(hf_config, key)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key}: {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


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


def refuse_unknown_layer_types(hf_config: Any, *supported: str) -> None:
    """Refuses layers of other types than those that a family has."""
    unknown = sorted(set(hf_config.layer_types) - {*supported})
    if unknown:
        raise ValueError(f"layer_types: {unknown[0]!r} is not supported; supported are {', '.join(supported)}")


def windows_of(hf_config: Any) -> tuple[int | None, ...]:
    """Returns the window of each layer, by its type.

    Raises:
      ValueError: a type is unknown, or is sliding although there is no window.
    """
    layer_types = hf_config.layer_types
    refuse_unknown_layer_types(hf_config, FULL_ATTENTION, SLIDING_ATTENTION)
    # Qwen's configs keep a window that use_sliding_window turns off.
    window = hf_config.sliding_window if getattr(hf_config, "use_sliding_window", True) else None
    if SLIDING_ATTENTION in layer_types and window is None:
        raise ValueError(
            "layer_types has sliding_attention, but sliding_window is not set or use_sliding_window is false"
        )
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in layer_types)
