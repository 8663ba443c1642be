"""Which parameter of the decoder is which tensor of a Hugging Face checkpoint: one table, read in both directions.

A leaf of the params is filled from pieces: each is one block of it (a layer of a stacked leaf, an expert of a layer),
and a window of one checkpoint tensor. Several pieces may share a tensor: a fused one gives each leaf its part.

Axes of the patterns, as `window_of` reads them: d model, h query heads, g key/value heads, k head width, f MLP width,
v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jdpo.models.config import ModelConfig, layer_pattern
from jdpo.models.windows import Window, window_of

Path = tuple[str, ...]


class Rule(NamedTuple):
    """One row of the table: `{}` in `hf_name` is the layer's number; `pattern` has Hugging Face's layout first."""

    hf_name: str
    path: Path
    pattern: str


class Piece(NamedTuple):
    """A block of one leaf, and where it stands in the checkpoint.

    Attributes:
      hf_shape: of the whole checkpoint tensor.
      path: keys down the params tree.
      at: the block's indices along the leaf's leading axes: (layer,), (layer, expert), or () where it is all of it.
      window: the block in the decoder's layout, in the elements of the checkpoint tensor.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    path: Path
    at: tuple[int, ...]
    window: Window


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


def checkpoint_pieces(config: ModelConfig) -> Iterator[Piece]:
    """All that fills the params of this model, in the order of the forward pass."""
    yield _piece(EMBEDDING, config, EMBEDDING.hf_name, EMBEDDING.path)
    pattern = layer_pattern(config)
    for index in range(config.num_layers):
        repeat, position = divmod(index, pattern.period)
        scanned = repeat < pattern.repeats
        prefix = ("stack" if scanned else "rest", f"layer_{position}")
        for rule in _layer_rules(config):
            path = prefix + rule.path
            yield _piece(rule, config, rule.hf_name.format(index), path, (repeat,) if scanned else ())
    yield _piece(FINAL_NORM, config, FINAL_NORM.hf_name, FINAL_NORM.path)
    if not config.tie_embeddings:
        yield _piece(HEAD, config, HEAD.hf_name, HEAD.path)


def leaves(config: ModelConfig) -> dict[Path, tuple[tuple[int, ...], list[Piece]]]:
    """Every leaf of the params, in the order of the forward pass: its shape, stacked axes and all, and its pieces."""
    pieces: dict[Path, list[Piece]] = {}
    for piece in checkpoint_pieces(config):
        pieces.setdefault(piece.path, []).append(piece)
    return {
        path: ((*(max(axis) + 1 for axis in zip(*(piece.at for piece in own), strict=True)), *own[0].window.shape), own)
        for path, own in pieces.items()
    }


def hf_tensors(config: ModelConfig) -> dict[str, list[Piece]]:
    """Every tensor a checkpoint of this model has, in the order of the forward pass, with the pieces in it."""
    tensors: dict[str, list[Piece]] = {}
    for piece in checkpoint_pieces(config):
        tensors.setdefault(piece.hf_name, []).append(piece)
    return tensors


def is_ignorable(hf_name: str) -> bool:
    """Whether a tensor that the table lacks holds no weights: old checkpoints store the rotary frequencies."""
    return hf_name.endswith("rotary_emb.inv_freq")


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


def _piece(rule: Rule, config: ModelConfig, hf_name: str, path: Path, at: tuple[int, ...] = ()) -> Piece:
    hf_shape, window = window_of(rule.pattern, axis_sizes(config))
    return Piece(hf_name, hf_shape, path, at, window)
