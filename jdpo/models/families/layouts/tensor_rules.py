"""Names of the decoder's parameters in checkpoints: one layout for each naming scheme.

A layout lists every parameter that its families may have; `parameters_of` omits those that a model lacks.

Axes of the patterns, for which see `jdpo.models.weights.strided_views`: d model, h query heads, g key/value heads,
k head width, f MLP width, v vocabulary, p positions, e experts, x width of an expert, s width of the shared expert,
r=1 the reward, the score of the shared expert, or a number of xIELU; of a DeltaNet q key heads, m value heads of each
key head, y key width, z value width, w taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jdpo.models.model_config import LayerKind, ModelConfig

Path = tuple[str, ...]


class Rule(NamedTuple):
    """One row of a layout. The first `{}` in `hf_name` is the layer's number, a second one the expert's.

    `pattern` has Hugging Face's layout on the left; for the tensor of one expert it omits the axis of experts.
    """

    hf_name: str
    path: Path
    pattern: str


class Spelling(NamedTuple):
    """Names that the text part has in some folders instead of those of its layout.

    Attributes:
      prefix: in place of the layout's prefix.
      head: name of the output head.
    """

    prefix: str
    head: str


class Form(NamedTuple):
    """Another way in which folders store some parameters of a layer.

    Attributes:
      rules: they replace those of the layout's layer with the same paths.
      is_kept: True if an export has these tensors where the folder that it started from has them.
    """

    rules: tuple[Rule, ...]
    is_kept: bool


class Layout(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
      prefix: prefix of all names except the head's; checkpoints of the model without its head may lack it.
      embedding, head: the table of tokens, and the output head if it is not tied.
      first, last: the other parameters before and after the layers.
      layer: the parameters of a layer.
      buffers: endings of names that are not weights, such as masks in old checkpoints.
      spellings: other names that folders of this family use; an export keeps those of the folder that it started from.
      carried: prefixes of tensors that belong to other parts of a model, such as a vision tower: they are not read or
        trained, and an export has them bit for bit. ("",) for every tensor outside of the text part.
      forms: other ways in which folders store some parameters of a layer.
    """

    prefix: str
    embedding: Rule
    head: Rule
    first: tuple[Rule, ...]
    last: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    spellings: tuple[Spelling, ...] = ()
    carried: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()

    @property
    def is_part(self) -> bool:
        """True if folders hold more than this model: it is the text part of a multimodal one."""
        return "" in self.carried

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules except the head's."""
        return (self.embedding, *self.first, *self.layer, *self.last)


REWARD_HEAD = Rule("score.weight", ("score", "kernel"), "r d -> d r")
"""The head of `*ForSequenceClassification`, which has the same name in all families."""


def parameters_of(rules: tuple[Rule, ...], config: ModelConfig, kind: LayerKind | None = None) -> Iterator[Rule]:
    """Yields the rules whose parameter the model has; with `kind`, those of a layer of that kind."""
    for rule in rules:
        if _has(config, rule.path) and (kind is None or _belongs(kind, rule.path)):
            yield rule


def _belongs(kind: LayerKind, path: Path) -> bool:
    """Returns True if layers of a kind have a parameter."""
    if path[0] in ("attention", "delta"):
        return path[0] == kind.mixer
    return path[0] != "mlp" or (path[1] in ("router", "experts", "shared")) == (kind.mlp == "experts")


def _has(config: ModelConfig, path: Path) -> bool:
    """Returns True if a model has a parameter, given by its path without the layer."""
    match path:
        case ("embed", "positions"):
            return config.learned_positions
        case ("attention", "query" | "key" | "value", "bias"):
            return config.qkv_bias
        case ("attention", "gate", name):
            return config.attention_gate and (name != "bias" or config.qkv_bias)
        case ("attention", "output", "bias"):
            return config.o_bias
        case ("attention", "query_norm" | "key_norm", _):
            return config.qk_norm is not None
        case ("attention", "sinks"):
            return config.attention_sinks
        case ("mlp", "shared", *_):
            return config.moe is not None and config.moe.shared_d_ff is not None
        case ("mlp", "gate", name):
            return config.gated_mlp and (name != "bias" or config.mlp_bias)
        case ("mlp", "router", "bias") | ("mlp", "experts", _, "bias"):
            return config.moe is not None and config.moe.bias
        case ("mlp", _, "bias"):
            return config.mlp_bias
        case ("mlp", "xielu", _):
            return config.activation == "xielu"
        case ("mlp_norm", _):
            return not config.shared_norm
        case ("final_norm", "bias"):
            return config.norm == "layer"
    return True
