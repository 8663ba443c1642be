"""Families of models that are not supported yet, each with the mechanisms that it needs and the decoder lacks."""

from __future__ import annotations

_LATENT = "multi-head latent attention (keys and values from a narrow projection, kv_lora_rank)"
_INDEXER = "sparse attention to the tokens that an indexer selects"
_SIGMOIDS = "a router of sigmoids with a correction bias, groups of experts, and shared experts without a gate"
_MAMBA = "Mamba-2 layers"
_SHORT_CONVOLUTION = "layers that are a gated short convolution"
_SHARED_KEYS = "layers that reuse the keys and values of an earlier layer"
_PER_LAYER_INPUTS = "an embedding of each token for every layer (hidden_size_per_layer_input)"
_HYPER = "hyper-connections (several residual streams)"
_CHANNEL_DECAY = "Kimi delta attention (a delta rule with a decay for each channel)"
_HALF_NEIGHBOURS = "rotation of neighbouring elements in one half of each head"
_GLM_NORMS = "its names of tensors, with norms before and after each branch"
_IMAGES = "the names of tensors of its text part"
_CHUNKS = "attention within chunks of the sequence"
_GEMMA3N = (_PER_LAYER_INPUTS, _SHARED_KEYS, "AltUp and LAuReL blocks")
_GEMMA4 = (_PER_LAYER_INPUTS, _SHARED_KEYS, "heads of another width in layers without a window")

MISSING: dict[str, tuple[str, ...]] = {
    "deepseek_v2": (_LATENT, "a router with groups of experts, and shared experts without a gate"),
    "deepseek_v3": (_LATENT, _SIGMOIDS),
    "deepseek_v32": (_LATENT, _INDEXER, _SIGMOIDS),
    "deepseek_v4": ("compressed sparse attention", _INDEXER, _HYPER),
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "glm": (_HALF_NEIGHBOURS, "its names of tensors"),
    "glm4": (_HALF_NEIGHBOURS, _GLM_NORMS),
    "glm4_moe": (_SIGMOIDS,),
    "glm4_moe_lite": (_LATENT, _SIGMOIDS),
    "glm46v": (_IMAGES, _HALF_NEIGHBOURS),
    "glm4v": (_IMAGES, _HALF_NEIGHBOURS),
    "glm4v_moe": (_IMAGES, _SIGMOIDS),
    "glm5_next": (_CHANNEL_DECAY, _LATENT, _INDEXER, _HYPER, _SIGMOIDS),
    "glm_moe_dsa": (_LATENT, _INDEXER, _SIGMOIDS),
    "granitemoehybrid": (_MAMBA, "an MLP next to the experts of a layer"),
    "kimi_k2": (_LATENT, _SIGMOIDS),
    "kimi_k25": (_IMAGES, _LATENT, _SIGMOIDS),
    "kimi_linear": (_CHANNEL_DECAY, _LATENT, _SIGMOIDS),
    "kimi_vl": (_IMAGES, _LATENT, _SIGMOIDS),
    "lfm2": (_SHORT_CONVOLUTION,),
    "lfm2_moe": (_SHORT_CONVOLUTION, "a router of sigmoids with a bias"),
    "lfm2_vl": (_IMAGES, _SHORT_CONVOLUTION),
    "lfm3": (_SHORT_CONVOLUTION,),
    "lfm3_vl": (_IMAGES, _SHORT_CONVOLUTION),
    "llama4": (_IMAGES, _CHUNKS, "a router whose sigmoids scale the experts' inputs"),
    "llama4_text": (_CHUNKS, "a router whose sigmoids scale the experts' inputs"),
    "minimax_m2": ("a router of sigmoids with a correction bias",),
    "mistral4": (_LATENT, "shared experts without a gate"),
    "nemotron": ("LayerNorm of 1 + w, and an MLP of squared ReLUs",),
    "nemotron_h": (_MAMBA, "layers of one branch alone, and MLPs of squared ReLUs"),
    "nemotron_h_omni": (_IMAGES, _MAMBA),
}
"""{model_type: what the decoder lacks}."""


def missing_from(model_type: object) -> str:
    """Returns what a family needs and the decoder lacks, as the end of a message; empty for an unknown family.

    >>> missing_from("lfm2")
    ': it needs layers that are a gated short convolution'
    >>> missing_from("no_such_family")
    ''
    """
    needs = MISSING.get(model_type, ()) if isinstance(model_type, str) else ()
    return f": it needs {'; '.join(needs)}" if needs else ""
