"""Which parameter of the decoder is which tensor of a Hugging Face checkpoint: one table, read in both directions.

Axes of the patterns, as einops names them: d model, h query heads, g key/value heads, k head width, f MLP width,
v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jdpo.models.config import ModelConfig, layer_pattern

Path = tuple[str, ...]


class Rule(NamedTuple):
    """One row of the table: `{}` in `hf_name` is the layer's number; `pattern` has Hugging Face's layout first."""

    hf_name: str
    path: Path
    pattern: str


class Tensor(NamedTuple):
    """One tensor of a checkpoint and its place in the params.

    Attributes:
      path: keys down the params tree.
      layer: index along the leaf's leading "layers" axis, None where it has none.
      hf_shape, shape: in Hugging Face's layout and in the decoder's (without the layers axis).
      forward, backward: einops patterns Hugging Face -> decoder and back.
    """

    hf_name: str
    path: Path
    layer: int | None
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    forward: str
    backward: str


EMBEDDING = Rule("model.embed_tokens.weight", ("embed", "embedding"), "v d -> v d")
FINAL_NORM = Rule("model.norm.weight", ("final_norm", "scale"), "d -> d")
HEAD = Rule("lm_head.weight", ("lm_head", "kernel"), "v d -> d v")

_LAYER = (
    Rule("model.layers.{}.input_layernorm.weight", ("attention_norm", "scale"), "d -> d"),
    Rule("model.layers.{}.self_attn.q_proj.weight", ("attention", "query", "kernel"), "(h k) d -> d h k"),
    Rule("model.layers.{}.self_attn.k_proj.weight", ("attention", "key", "kernel"), "(g k) d -> d g k"),
    Rule("model.layers.{}.self_attn.v_proj.weight", ("attention", "value", "kernel"), "(g k) d -> d g k"),
    Rule("model.layers.{}.self_attn.o_proj.weight", ("attention", "output", "kernel"), "d (h k) -> h k d"),
    Rule("model.layers.{}.post_attention_layernorm.weight", ("mlp_norm", "scale"), "d -> d"),
    Rule("model.layers.{}.mlp.gate_proj.weight", ("mlp", "gate", "kernel"), "f d -> d f"),
    Rule("model.layers.{}.mlp.up_proj.weight", ("mlp", "up", "kernel"), "f d -> d f"),
    Rule("model.layers.{}.mlp.down_proj.weight", ("mlp", "down", "kernel"), "d f -> f d"),
)
_QKV_BIAS = (
    Rule("model.layers.{}.self_attn.q_proj.bias", ("attention", "query", "bias"), "(h k) -> h k"),
    Rule("model.layers.{}.self_attn.k_proj.bias", ("attention", "key", "bias"), "(g k) -> g k"),
    Rule("model.layers.{}.self_attn.v_proj.bias", ("attention", "value", "bias"), "(g k) -> g k"),
)
_O_BIAS = (Rule("model.layers.{}.self_attn.o_proj.bias", ("attention", "output", "bias"), "d -> d"),)
_QK_NORM = (
    Rule("model.layers.{}.self_attn.q_norm.weight", ("attention", "query_norm", "scale"), "k -> k"),
    Rule("model.layers.{}.self_attn.k_norm.weight", ("attention", "key_norm", "scale"), "k -> k"),
)


def checkpoint_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor a checkpoint of this model has, in the order of the forward pass."""
    yield _tensor(EMBEDDING, config, EMBEDDING.hf_name, EMBEDDING.path, None)
    pattern = layer_pattern(config)
    for index in range(config.num_layers):
        repeat, position = divmod(index, pattern.period)
        scanned = repeat < pattern.repeats
        prefix = ("stack" if scanned else "rest", f"layer_{position}")
        for rule in _layer_rules(config):
            path = prefix + rule.path
            yield _tensor(rule, config, rule.hf_name.format(index), path, repeat if scanned else None)
    yield _tensor(FINAL_NORM, config, FINAL_NORM.hf_name, FINAL_NORM.path, None)
    if not config.tie_embeddings:
        yield _tensor(HEAD, config, HEAD.hf_name, HEAD.path, None)


def is_ignorable(hf_name: str) -> bool:
    """Whether a tensor that the table lacks holds no weights: old checkpoints store the rotary frequencies."""
    return hf_name.endswith("rotary_emb.inv_freq")


def split_axes(side: str) -> list[tuple[str, ...]]:
    """One side of a pattern as axes of axes.

    >>> split_axes("(h k) d")
    [('h', 'k'), ('d',)]
    """
    return [tuple((group or axis).split()) for group, axis in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every axis letter of the patterns."""
    return {
        "v": config.vocab_size,
        "d": config.d_model,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
        "f": config.d_ff,
    }


def _layer_rules(config: ModelConfig) -> Iterable[Rule]:
    yield from _LAYER
    if config.qkv_bias:
        yield from _QKV_BIAS
    if config.o_bias:
        yield from _O_BIAS
    if config.qk_norm:
        yield from _QK_NORM


def _tensor(rule: Rule, config: ModelConfig, hf_name: str, path: Path, layer: int | None) -> Tensor:
    sizes = axis_sizes(config)
    hf_side, own_side = (side.strip() for side in rule.pattern.split("->"))

    def shape(side: str) -> tuple[int, ...]:
        return tuple(math.prod(sizes[axis] for axis in group) for group in split_axes(side))

    return Tensor(hf_name, path, layer, shape(hf_side), shape(own_side), rule.pattern, f"{own_side} -> {hf_side}")
