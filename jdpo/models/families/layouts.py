"""Names of the decoder's parameters in checkpoints: one layout for each naming scheme.

A layout lists every parameter that its families may have; `parameters_of` omits those that a model lacks.

Axes of the patterns, for which see `jdpo.models.weights.strided_views`: d model, h query heads, g key/value heads,
k head width, f MLP width, v vocabulary, p positions, e experts, x width of an expert, r=1 the reward.
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


class Layout(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
      prefix: prefix of all names except the head's; checkpoints of the model without its head may lack it.
      embedding, head: the table of tokens, and the output head if it is not tied.
      first, last: the other parameters before and after the layers.
      layer: the parameters of a layer.
      buffers: endings of names that are not weights, such as masks in old checkpoints.
    """

    prefix: str
    embedding: Rule
    head: Rule
    first: tuple[Rule, ...]
    last: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)


REWARD_HEAD = Rule("score.weight", ("score", "kernel"), "r d -> d r")
"""The head of `*ForSequenceClassification`, which has the same name in all families."""


def parameters_of(rules: tuple[Rule, ...], config: ModelConfig, kind: LayerKind | None = None) -> Iterator[Rule]:
    """Yields the rules whose parameter the model has; with `kind`, those of a layer of that kind."""
    for rule in rules:
        if _has(config, rule.path) and (kind is None or _belongs(kind, rule.path)):
            yield rule


def _belongs(kind: LayerKind, path: Path) -> bool:
    """Returns True if layers of a kind have a parameter."""
    return path[0] != "mlp" or (path[1] in ("router", "experts")) == (kind.mlp == "experts")


def _has(config: ModelConfig, path: Path) -> bool:
    """Returns True if a model has a parameter, given by its path without the layer."""
    match path:
        case ("embed", "positions"):
            return config.learned_positions
        case ("attention", "query" | "key" | "value", "bias"):
            return config.qkv_bias
        case ("attention", "output", "bias"):
            return config.o_bias
        case ("attention", "query_norm" | "key_norm", _):
            return config.qk_norm is not None
        case ("mlp", "gate", name):
            return config.gated_mlp and (name != "bias" or config.mlp_bias)
        case ("mlp", _, "bias"):
            return config.mlp_bias
        case ("final_norm", "bias"):
            return config.norm == "layer"
    return True


def _llama(name: str, path: str, pattern: str) -> Rule:
    return Rule(f"model.layers.{{}}.{name}", tuple(path.split(".")), pattern)


_ATTENTION = (
    # torch.nn.Linear keeps its weight as [out, in]; kernels here have their inputs first.
    _llama("self_attn.q_proj.weight", "attention.query.kernel", "(h k) d -> d h k"),
    _llama("self_attn.k_proj.weight", "attention.key.kernel", "(g k) d -> d g k"),
    _llama("self_attn.v_proj.weight", "attention.value.kernel", "(g k) d -> d g k"),
    _llama("self_attn.q_proj.bias", "attention.query.bias", "(h k) -> h k"),
    _llama("self_attn.k_proj.bias", "attention.key.bias", "(g k) -> g k"),
    _llama("self_attn.v_proj.bias", "attention.value.bias", "(g k) -> g k"),
)
_OUTPUT = (
    _llama("self_attn.o_proj.weight", "attention.output.kernel", "d (h k) -> h k d"),
    _llama("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
)
# One tensor with the rows of all queries first, then those of keys and of values.
_FUSED_ATTENTION = (
    _llama("self_attn.qkv_proj.weight", "attention.query.kernel", "(h k)[g k][g k] d -> d h k"),
    _llama("self_attn.qkv_proj.weight", "attention.key.kernel", "[h k](g k)[g k] d -> d g k"),
    _llama("self_attn.qkv_proj.weight", "attention.value.kernel", "[h k][g k](g k) d -> d g k"),
)
_HEAD_NORMS = (
    _llama("self_attn.q_norm.weight", "attention.query_norm.scale", "k -> k"),
    _llama("self_attn.k_norm.weight", "attention.key_norm.scale", "k -> k"),
)
_WIDTH_NORMS = (
    _llama("self_attn.q_norm.weight", "attention.query_norm.scale", "(h k) -> h k"),
    _llama("self_attn.k_norm.weight", "attention.key_norm.scale", "(g k) -> g k"),
)
_MLP = (
    _llama("mlp.gate_proj.weight", "mlp.gate.kernel", "f d -> d f"),
    _llama("mlp.gate_proj.bias", "mlp.gate.bias", "f -> f"),
    _llama("mlp.up_proj.weight", "mlp.up.kernel", "f d -> d f"),
    _llama("mlp.up_proj.bias", "mlp.up.bias", "f -> f"),
)
# One tensor with the rows of the gate first, then those of up.
_FUSED_MLP = (
    _llama("mlp.gate_up_proj.weight", "mlp.gate.kernel", "f[f] d -> d f"),
    _llama("mlp.gate_up_proj.weight", "mlp.up.kernel", "[f]f d -> d f"),
)
_DOWN = (
    _llama("mlp.down_proj.weight", "mlp.down.kernel", "d f -> f d"),
    _llama("mlp.down_proj.bias", "mlp.down.bias", "d -> d"),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Returns the rules of a layer with experts, from a family's names of the block and of the maps of an expert.

    There is one tensor per expert, as in published checkpoints and in those of save_pretrained, even if transformers'
    classes have one tensor for all experts in memory.
    """
    return (
        # Hugging Face calls the router `gate`, a word that means a map of the MLP everywhere else.
        _llama(f"{block}.gate.weight", "mlp.router.kernel", "e d -> d e"),
        _llama(f"{block}.experts.{{}}.{gate}.weight", "mlp.experts.gate.kernel", "x d -> d x"),
        _llama(f"{block}.experts.{{}}.{up}.weight", "mlp.experts.up.kernel", "x d -> d x"),
        _llama(f"{block}.experts.{{}}.{down}.weight", "mlp.experts.down.kernel", "d x -> x d"),
    )


_ATTENTION_BEFORE = _llama("input_layernorm.weight", "attention_norm.scale", "d -> d")
# Llama calls the norm before the MLP "post attention"; in Gemma 2 and OLMo 2 this is the norm of attention's output.
_MLP_BEFORE = _llama("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d")
_ATTENTION_AFTER = _llama("post_attention_layernorm.weight", "attention_post_norm.scale", "d -> d")
_MLP_BEFORE_OF_BOTH = _llama("pre_feedforward_layernorm.weight", "mlp_norm.scale", "d -> d")
_MLP_AFTER = _llama("post_feedforward_layernorm.weight", "mlp_post_norm.scale", "d -> d")

LLAMA = Layout(
    prefix="model.",
    embedding=Rule("model.embed_tokens.weight", ("embed", "embedding"), "v d -> v d"),
    head=Rule("lm_head.weight", ("lm_head", "kernel"), "v d -> d v"),
    first=(),
    last=(Rule("model.norm.weight", ("final_norm", "scale"), "d -> d"),),
    layer=(_ATTENTION_BEFORE, *_ATTENTION, *_HEAD_NORMS, *_OUTPUT, _MLP_BEFORE, *_MLP, *_DOWN),
)
GEMMA2 = LLAMA._replace(
    layer=(
        *(_ATTENTION_BEFORE, *_ATTENTION, *_HEAD_NORMS, *_OUTPUT, _ATTENTION_AFTER),
        *(_MLP_BEFORE_OF_BOTH, *_MLP, *_DOWN, _MLP_AFTER),
    )
)
OLMO2 = LLAMA._replace(layer=(*_ATTENTION, *_WIDTH_NORMS, *_OUTPUT, _ATTENTION_AFTER, *_MLP, *_DOWN, _MLP_AFTER))
PHI3 = LLAMA._replace(layer=(_ATTENTION_BEFORE, *_FUSED_ATTENTION, *_OUTPUT, _MLP_BEFORE, *_FUSED_MLP, *_DOWN))

# Mistral's names: w1 is the gate, w3 is up, w2 is down.
MIXTRAL = LLAMA._replace(layer=(*LLAMA.layer, *_experts("block_sparse_moe", "w1", "w3", "w2")))
QWEN3_MOE = LLAMA._replace(layer=(*LLAMA.layer, *_experts("mlp", "gate_proj", "up_proj", "down_proj")))


def _gpt2(name: str, path: str, pattern: str) -> Rule:
    return Rule(f"transformer.h.{{}}.{name}", tuple(path.split(".")), pattern)


GPT2 = Layout(
    prefix="transformer.",
    embedding=Rule("transformer.wte.weight", ("embed", "embedding"), "v d -> v d"),
    head=LLAMA.head,
    first=(Rule("transformer.wpe.weight", ("embed", "positions"), "p d -> p d"),),
    last=(
        Rule("transformer.ln_f.weight", ("final_norm", "scale"), "d -> d"),
        Rule("transformer.ln_f.bias", ("final_norm", "bias"), "d -> d"),
    ),
    layer=(
        _gpt2("ln_1.weight", "attention_norm.scale", "d -> d"),
        _gpt2("ln_1.bias", "attention_norm.bias", "d -> d"),
        # Conv1D keeps its weight as [in, out].
        _gpt2("attn.c_attn.weight", "attention.query.kernel", "d (h k)[g k][g k] -> d h k"),
        _gpt2("attn.c_attn.weight", "attention.key.kernel", "d [h k](g k)[g k] -> d g k"),
        _gpt2("attn.c_attn.weight", "attention.value.kernel", "d [h k][g k](g k) -> d g k"),
        _gpt2("attn.c_attn.bias", "attention.query.bias", "(h k)[g k][g k] -> h k"),
        _gpt2("attn.c_attn.bias", "attention.key.bias", "[h k](g k)[g k] -> g k"),
        _gpt2("attn.c_attn.bias", "attention.value.bias", "[h k][g k](g k) -> g k"),
        _gpt2("attn.c_proj.weight", "attention.output.kernel", "(h k) d -> h k d"),
        _gpt2("attn.c_proj.bias", "attention.output.bias", "d -> d"),
        _gpt2("ln_2.weight", "mlp_norm.scale", "d -> d"),
        _gpt2("ln_2.bias", "mlp_norm.bias", "d -> d"),
        _gpt2("mlp.c_fc.weight", "mlp.up.kernel", "d f -> d f"),
        _gpt2("mlp.c_fc.bias", "mlp.up.bias", "f -> f"),
        _gpt2("mlp.c_proj.weight", "mlp.down.kernel", "f d -> f d"),
        _gpt2("mlp.c_proj.bias", "mlp.down.bias", "d -> d"),
    ),
    # Despite their names these are the causal mask and its fill value, not parameters.
    buffers=(".attn.bias", ".attn.masked_bias"),
)


def _neox(name: str, path: str, pattern: str) -> Rule:
    return Rule(f"gpt_neox.layers.{{}}.{name}", tuple(path.split(".")), pattern)


GPT_NEOX = Layout(
    prefix="gpt_neox.",
    embedding=Rule("gpt_neox.embed_in.weight", ("embed", "embedding"), "v d -> v d"),
    head=Rule("embed_out.weight", ("lm_head", "kernel"), "v d -> d v"),
    first=(),
    last=(
        Rule("gpt_neox.final_layer_norm.weight", ("final_norm", "scale"), "d -> d"),
        Rule("gpt_neox.final_layer_norm.bias", ("final_norm", "bias"), "d -> d"),
    ),
    layer=(
        _neox("input_layernorm.weight", "attention_norm.scale", "d -> d"),
        _neox("input_layernorm.bias", "attention_norm.bias", "d -> d"),
        # Query, key and value of a head are adjacent.
        _neox("attention.query_key_value.weight", "attention.query.kernel", "(h 0/3 k) d -> d h k"),
        _neox("attention.query_key_value.weight", "attention.key.kernel", "(g 1/3 k) d -> d g k"),
        _neox("attention.query_key_value.weight", "attention.value.kernel", "(g 2/3 k) d -> d g k"),
        _neox("attention.query_key_value.bias", "attention.query.bias", "(h 0/3 k) -> h k"),
        _neox("attention.query_key_value.bias", "attention.key.bias", "(g 1/3 k) -> g k"),
        _neox("attention.query_key_value.bias", "attention.value.bias", "(g 2/3 k) -> g k"),
        _neox("attention.dense.weight", "attention.output.kernel", "d (h k) -> h k d"),
        _neox("attention.dense.bias", "attention.output.bias", "d -> d"),
        _neox("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
        _neox("post_attention_layernorm.bias", "mlp_norm.bias", "d -> d"),
        _neox("mlp.dense_h_to_4h.weight", "mlp.up.kernel", "f d -> d f"),
        _neox("mlp.dense_h_to_4h.bias", "mlp.up.bias", "f -> f"),
        _neox("mlp.dense_4h_to_h.weight", "mlp.down.kernel", "d f -> f d"),
        _neox("mlp.dense_4h_to_h.bias", "mlp.down.bias", "d -> d"),
    ),
    # As in GPT-2, `bias` is the causal mask.
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
