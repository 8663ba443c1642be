"""What the decoder needs to know of a model: mechanisms and sizes, no names of families.

Every field states one mechanism and is off by default; which family uses which is written in `jdpo.models.families`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields after `attention_factor` belong to the kinds that name them."""

    theta: float
    kind: RopeKind = "default"
    fraction: float = 1.0  # of each head that is rotated, from its start
    attention_factor: float = 1.0  # of cosines and sines
    factor: float = 1.0  # linear, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    divisors: tuple[float, ...] = ()  # longrope; one for each rotated pair

    def rotated_dims(self, head_dim: int) -> int:
        """How many of a head's numbers are rotated, from the first on.

        >>> RopeConfig(theta=1e4, fraction=0.25).rotated_dims(80)
        20
        """
        return int(head_dim * self.fraction)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer; layers of one kind have parameters of the same names and shapes.

    Attributes:
      rope: how attention knows positions; None for a layer that does not (NoPE).
      window: how many tokens a query sees, itself included; None sees every earlier token.
      mlp: "dense", or "experts" for a mixture of them.
    """

    rope: RopeConfig | None
    window: int | None = None
    mlp: Literal["dense", "experts"] = "dense"


NormKind = Literal["rms", "rms_wide", "rms_offset", "layer"]
"""How a norm is computed, see `jdpo.models.layers.Norm`."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts of a layer that has them in the place of its MLP."""

    num_experts: int
    experts_per_token: int
    d_ff: int  # of one expert
    normalize: bool  # whether the weights of a token's experts are made to sum to 1
    # Of the router's load balancing loss: how config.json says to train, no part of what the model computes.
    aux_loss_coef: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know of a model; hashable, so it can be a static argument of `jax.jit`."""

    family: str  # names the tensors of a checkpoint, and nothing else
    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    layers: tuple[LayerKind, ...]  # one a layer
    tie_embeddings: bool
    max_positions: int
    positions_end: bool = False  # whether no token may stand behind max_positions

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None  # over each head, or over all heads together
    attention_scale: float | None = None  # of scores; None: head_dim**-0.5
    attention_softcap: float | None = None  # scores become c * tanh(scores / c)

    norm: NormKind = "rms"
    norm_placement: Literal["before", "after", "both"] = "before"  # attention and MLP, inside the residual branch
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    residual_scale: float = 1.0  # of what a branch adds to the stream

    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False

    learned_positions: bool = False  # a vector for each position, added to the token's
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become c * tanh(logits / c), behind the scale

    moe: MoEConfig | None = None  # of the layers whose kind has experts

    def __post_init__(self) -> None:
        assert len(self.layers) == self.num_layers, (self.num_layers, self.layers)
        assert (self.moe is not None) == any(kind.mlp == "experts" for kind in self.layers), (self.moe, self.layers)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The attention window of each layer."""
        return tuple(kind.window for kind in self.layers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different ropes of the layers, in the order in which they first come."""
        return tuple(dict.fromkeys(kind.rope for kind in self.layers if kind.rope is not None))


class LayerPattern(NamedTuple):
    """How num_layers layers fall into repeats of a pattern and a rest; layer i is (i // period, i % period)."""

    period: int
    repeats: int
    rest: int


def layer_pattern(config: ModelConfig) -> LayerPattern:
    """The smallest period of `config.layers`, how often it fits, and what is left.

    >>> from types import SimpleNamespace as Config
    >>> layer_pattern(Config(num_layers=5, layers=("a", "b", "a", "b", "a")))
    LayerPattern(period=2, repeats=2, rest=1)
    """
    kinds, num_layers = config.layers, config.num_layers
    period = next(p for p in range(1, num_layers + 1) if all(kinds[i] == kinds[i % p] for i in range(num_layers)))
    return LayerPattern(period, num_layers // period, num_layers % period)
