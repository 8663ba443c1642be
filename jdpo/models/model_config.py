"""The configuration of the decoder: mechanisms and sizes, no names of families.

Every field is one mechanism and is off by default; `jdpo.models.families` has the mechanisms of each family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields after `attention_factor` are for the kinds in their comments."""

    theta: float
    kind: RopeKind = "default"
    fraction: float = 1.0  # the part of each head that is rotated, from its start
    attention_factor: float = 1.0  # multiplies cosines and sines
    interleaved: bool = False  # rotates pairs of neighbours (2i, 2i + 1), not (i, i + half)
    factor: float = 1.0  # linear, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    divisors: tuple[float, ...] = ()  # longrope; one for each rotated pair

    def rotated_dims(self, head_dim: int) -> int:
        """Returns the number of leading elements of a head that are rotated.

        >>> RopeConfig(theta=1e4, fraction=0.25).rotated_dims(80)
        20
        """
        return int(head_dim * self.fraction)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The settings that may differ between layers; layers of one kind have parameters of the same names and shapes.

    Attributes:
      rope: the rotary position embedding; None for a layer without positions (NoPE).
      window: number of tokens that a query sees, itself included; None for all earlier tokens.
      mlp: "dense", or "experts" for a mixture of them.
      mixer: what lets tokens see earlier ones, "attention", or "delta" for a gated DeltaNet, which has no rope and no
        window.
    """

    rope: RopeConfig | None
    window: int | None = None
    mlp: Literal["dense", "experts"] = "dense"
    mixer: Literal["attention", "delta"] = "attention"


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Factors of queries that grow with the position, as in Llama 4: 1 + beta * log(1 + floor(position / length))."""

    beta: float
    length: int  # in tokens; earlier queries have the factor 1


NormKind = Literal["rms", "rms_wide", "rms_offset", "layer", "layer_no_bias"]
"""The formula of a norm, see `jdpo.models.layers.Norm`."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "xielu"]


class ClampedGate(NamedTuple):
    """The gate of gpt-oss: g sigmoid(alpha g) (u + 1), for outputs g of the gate up to `limit` and u within +-limit."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts of a layer that has them instead of an MLP."""

    num_experts: int
    experts_per_token: int
    d_ff: int  # width of one expert
    normalize: bool  # True if the weights of a token's experts are normalized to sum to 1
    shared_d_ff: int | None = None  # width of an expert that every token goes through in addition; None for none
    # Weight of the router's load balancing loss. It affects training only, so it is not compared.
    aux_loss_coef: float = field(compare=False)
    bias: bool = False  # of the router and of every map of every expert
    clamped_gate: ClampedGate | None = None  # in place of act(gate) * up


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """The sizes of a gated DeltaNet (https://arxiv.org/abs/2412.06464), the mixer of layers without attention."""

    num_key_heads: int  # of queries and keys
    num_value_heads: int  # a multiple of num_key_heads: consecutive value heads share a key head
    key_head_dim: int
    value_head_dim: int
    conv_width: int  # tokens that the causal convolution of queries, keys and values sees

    @property
    def values_per_key(self) -> int:
        """The number of value heads that share a key head."""
        return self.num_value_heads // self.num_key_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a model; hashable, so it can be a static argument of `jax.jit`."""

    family: str  # only used for the names of tensors in checkpoints
    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    layers: tuple[LayerKind, ...]  # one per layer
    tie_embeddings: bool
    max_positions: int
    positions_end: bool = False  # True if no token may be after max_positions

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None  # over each head, or over all heads together
    attention_gate: bool = False  # attention's output is multiplied by sigmoids of a projection of its input
    attention_scale: float | None = None  # factor of scores; None for head_dim**-0.5
    attention_softcap: float | None = None  # scores become c * tanh(scores / c)
    attention_sinks: bool = False  # every softmax has one more score, learned by each head, without a value
    query_scaling: QueryScaling | None = None

    norm: NormKind = "rms"
    norm_placement: Literal["before", "after", "both"] = "before"  # of attention and MLP, inside the residual branch
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    shared_norm: bool = False  # the MLP reads the normed input of attention and has no norm of its own
    residual_scale: float = 1.0  # factor of what a branch adds to the residual stream

    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False

    learned_positions: bool = False  # a vector for each position, added to the token's
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become c * tanh(logits / c), after logit_scale

    moe: MoEConfig | None = None  # for the layers whose kind has experts
    delta: DeltaConfig | None = None  # for the layers whose mixer is a DeltaNet
    # A reward model: the head has one output, the reward of the text up to a token, instead of one for each token.
    reward_head: bool = False

    def __post_init__(self) -> None:
        assert len(self.layers) == self.num_layers, (self.num_layers, self.layers)
        assert (self.moe is not None) == any(kind.mlp == "experts" for kind in self.layers), (self.moe, self.layers)
        assert (self.delta is not None) == any(kind.mixer == "delta" for kind in self.layers), (self.delta, self.layers)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The attention window of each layer that has attention, or None."""
        return tuple(kind.window for kind in self.layers if kind.mixer == "attention")

    @property
    def num_delta_layers(self) -> int:
        """The number of layers with a DeltaNet in place of attention."""
        return self.num_layers - len(self.layer_windows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers that have attention, in order of first appearance."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The distinct ropes of the layers, in order of first appearance."""
        return tuple(dict.fromkeys(kind.rope for kind in self.layers if kind.rope is not None))


class LayerPattern(NamedTuple):
    """The division of the layers into repeats of a pattern and a rest; layer i is (i // period, i % period)."""

    period: int
    repeats: int
    rest: int


def layer_pattern(config: ModelConfig) -> LayerPattern:
    """Returns the smallest period of `config.layers`, the number of complete repeats, and that of remaining layers.

    >>> from types import SimpleNamespace as Config
    >>> layer_pattern(Config(num_layers=5, layers=("a", "b", "a", "b", "a")))
    LayerPattern(period=2, repeats=2, rest=1)
    """
    kinds, num_layers = config.layers, config.num_layers
    period = next(p for p in range(1, num_layers + 1) if all(kinds[i] == kinds[i % p] for i in range(num_layers)))
    return LayerPattern(period, num_layers // period, num_layers % period)
