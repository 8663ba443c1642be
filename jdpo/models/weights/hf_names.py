"""Maps parameters of the decoder to tensors of a Hugging Face checkpoint; reading and exporting use the same map.

A leaf of the params is filled from pieces. Each is one part of the leaf (a layer of a stacked leaf, an expert of a
layer) and a strided view of one checkpoint tensor. Several pieces may share a tensor: a fused one has a part for each
of several leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from jdpo.models.families import FAMILIES
from jdpo.models.families.layouts import REWARD_HEAD, Layout, Path, Rule, parameters_of
from jdpo.models.model_config import DeltaConfig, ModelConfig, MoEConfig, layer_pattern
from jdpo.models.weights.strided_views import StridedView, view_of


class Piece(NamedTuple):
    """A part of one leaf, and where it is in the checkpoint.

    Attributes:
      hf_shape: shape of the whole checkpoint tensor.
      path: keys down the params tree.
      at: the part's indices along the leaf's leading axes: (layer,), (layer, expert), or () for a whole leaf.
      view: the part in the decoder's layout, as a view of the checkpoint tensor's elements.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    path: Path
    at: tuple[int, ...]
    view: StridedView


def checkpoint_pieces(config: ModelConfig, layout: Layout | None = None) -> Iterator[Piece]:
    """Yields the pieces that fill the params of this model, in the order of the forward pass.

    Args:
      layout: the tensors of one folder, see `layout_in`; None for those that exports have.
    """
    layout = layout or layout_of(config)
    for rule in (layout.embedding, *parameters_of(layout.first, config)):
        yield _piece(rule, config, rule.hf_name, rule.path)
    pattern = layer_pattern(config)
    for index in range(config.num_layers):
        repeat, position = divmod(index, pattern.period)
        # Layers after the last complete repeat are in `rest`, without a stacked axis.
        scanned = repeat < pattern.repeats
        prefix = ("stack" if scanned else "rest", f"layer_{position}")
        for rule in parameters_of(layout.layer, config, config.layers[index]):
            path, at = prefix + rule.path, (repeat,) if scanned else ()
            for name, expert in _of_experts(rule, config, index):
                yield _piece(rule, config, name, path, at + expert)
    for rule in (*parameters_of(layout.last, config), *_head(layout, config)):
        yield _piece(rule, config, rule.hf_name, rule.path)


def _head(layout: Layout, config: ModelConfig) -> list[Rule]:
    if config.reward_head:
        return [REWARD_HEAD]
    # A tied head is the embedding, and has no tensor of its own.
    return [] if config.tie_embeddings else [layout.head]


def _of_experts(rule: Rule, config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the names of a rule's tensors in a layer, with their index along the axis of experts, if there is one."""
    if rule.hf_name.count("{}") == 1:
        yield rule.hf_name.format(layer), ()
        return
    assert config.moe is not None
    for expert in range(config.moe.num_experts):
        yield rule.hf_name.format(layer, expert), (expert,)


def leaves(config: ModelConfig, layout: Layout | None = None) -> dict[Path, tuple[tuple[int, ...], list[Piece]]]:
    """Returns the shape, stacked axes included, and the pieces of every leaf, in the order of the forward pass."""
    pieces: dict[Path, list[Piece]] = {}
    for piece in checkpoint_pieces(config, layout):
        pieces.setdefault(piece.path, []).append(piece)
    return {
        # A stacked axis is as long as the highest index along it.
        path: ((*(max(axis) + 1 for axis in zip(*(piece.at for piece in own), strict=True)), *own[0].view.shape), own)
        for path, own in pieces.items()
    }


def hf_tensors(config: ModelConfig, layout: Layout | None = None) -> dict[str, list[Piece]]:
    """Returns every tensor of a checkpoint of this model, in the order of the forward pass, with the pieces in it."""
    tensors: dict[str, list[Piece]] = {}
    for piece in checkpoint_pieces(config, layout):
        tensors.setdefault(piece.hf_name, []).append(piece)
    return tensors


def layout_of(config: ModelConfig) -> Layout:
    """Returns how checkpoints of this model name their tensors."""
    return FAMILIES[config.family].layout


def layout_in(names: Collection[str], config: ModelConfig, *, for_export: bool = False) -> Layout:
    """Returns the layout of a folder with tensors of these names: that of the model, or one of its other forms.

    Args:
      for_export: True for the layout of an export that starts from such a folder.
    """
    layout = layout_of(config)
    for rules in (form.rules for form in layout.forms if form.is_kept or not for_export):
        # Rules for one expert have a second number.
        if any(rule.hf_name.format(layer, 0) in names for rule in rules for layer in range(config.num_layers)):
            replaced = {rule.path for rule in rules}
            kept = (rule for rule in layout.layer if rule.path not in replaced)
            return layout._replace(layer=(*kept, *rules))
    return layout


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every axis letter of the patterns."""
    return {
        "v": config.vocab_size,
        "d": config.d_model,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
        "f": config.d_ff,
        "p": config.max_positions,
        "r": 1,
        **_expert_sizes(config.moe),
        **({} if config.delta is None else _delta_sizes(config.delta)),
    }


def _expert_sizes(moe: MoEConfig | None) -> dict[str, int]:
    if moe is None:
        return {}
    return {"e": moe.num_experts, "x": moe.d_ff, **({} if moe.shared_d_ff is None else {"s": moe.shared_d_ff})}


def _delta_sizes(config: DeltaConfig) -> dict[str, int]:
    return {
        "q": config.num_key_heads,
        "m": config.values_per_key,
        "y": config.key_head_dim,
        "z": config.value_head_dim,
        "w": config.conv_width,
    }


def _piece(rule: Rule, config: ModelConfig, hf_name: str, path: Path, at: tuple[int, ...] = ()) -> Piece:
    hf_shape, view = view_of(rule.pattern, axis_sizes(config))
    return Piece(hf_name, hf_shape, path, at, view)
