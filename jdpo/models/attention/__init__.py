"""Attention: `causal_attention` with a backend for each platform, and `cached_attention` for decoding."""

from jdpo.models.attention.blockwise import ATTENTION_RESIDUALS
from jdpo.models.attention.cached import (
    LayerCache,
    VisibleSlots,
    cached_attention,
    empty_layer_cache,
    visible_slots,
    write_tails,
)
from jdpo.models.attention.causal import causal_attention, sharded_causal_attention
from jdpo.models.attention.choose import check_attention, choose_attention, compiled_attention, sequences_per_row
from jdpo.models.attention.segments import segment_starts
from jdpo.models.attention.xla import dot_product_attention

__all__ = [
    "ATTENTION_RESIDUALS",
    "LayerCache",
    "VisibleSlots",
    "cached_attention",
    "causal_attention",
    "check_attention",
    "choose_attention",
    "compiled_attention",
    "dot_product_attention",
    "empty_layer_cache",
    "segment_starts",
    "sequences_per_row",
    "sharded_causal_attention",
    "visible_slots",
    "write_tails",
]
