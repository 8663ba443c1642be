"""Layouts of families that name their tensors as Llama does."""

from __future__ import annotations

from jdpo.models.families.layouts.tensor_rules import Layout, Rule


def llama_rule(name: str, path: str, pattern: str) -> Rule:
    return Rule(f"model.layers.{{}}.{name}", tuple(path.split(".")), pattern)


_ATTENTION = (
    # torch.nn.Linear keeps its weight as [out, in]; kernels here have their inputs first.
    llama_rule("self_attn.q_proj.weight", "attention.query.kernel", "(h k) d -> d h k"),
    llama_rule("self_attn.k_proj.weight", "attention.key.kernel", "(g k) d -> d g k"),
    llama_rule("self_attn.v_proj.weight", "attention.value.kernel", "(g k) d -> d g k"),
    llama_rule("self_attn.q_proj.bias", "attention.query.bias", "(h k) -> h k"),
    llama_rule("self_attn.k_proj.bias", "attention.key.bias", "(g k) -> g k"),
    llama_rule("self_attn.v_proj.bias", "attention.value.bias", "(g k) -> g k"),
)
_OUTPUT = (
    llama_rule("self_attn.o_proj.weight", "attention.output.kernel", "d (h k) -> h k d"),
    llama_rule("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
)
# One tensor with the rows of all queries first, then those of keys and of values.
_FUSED_ATTENTION = (
    llama_rule("self_attn.qkv_proj.weight", "attention.query.kernel", "(h k)[g k][g k] d -> d h k"),
    llama_rule("self_attn.qkv_proj.weight", "attention.key.kernel", "[h k](g k)[g k] d -> d g k"),
    llama_rule("self_attn.qkv_proj.weight", "attention.value.kernel", "[h k][g k](g k) d -> d g k"),
)
_HEAD_NORMS = (
    llama_rule("self_attn.q_norm.weight", "attention.query_norm.scale", "k -> k"),
    llama_rule("self_attn.k_norm.weight", "attention.key_norm.scale", "k -> k"),
)
_WIDTH_NORMS = (
    llama_rule("self_attn.q_norm.weight", "attention.query_norm.scale", "(h k) -> h k"),
    llama_rule("self_attn.k_norm.weight", "attention.key_norm.scale", "(g k) -> g k"),
)
_MLP = (
    llama_rule("mlp.gate_proj.weight", "mlp.gate.kernel", "f d -> d f"),
    llama_rule("mlp.gate_proj.bias", "mlp.gate.bias", "f -> f"),
    llama_rule("mlp.up_proj.weight", "mlp.up.kernel", "f d -> d f"),
    llama_rule("mlp.up_proj.bias", "mlp.up.bias", "f -> f"),
)
# One tensor with the rows of the gate first, then those of up.
_FUSED_MLP = (
    llama_rule("mlp.gate_up_proj.weight", "mlp.gate.kernel", "f[f] d -> d f"),
    llama_rule("mlp.gate_up_proj.weight", "mlp.up.kernel", "[f]f d -> d f"),
)
_DOWN = (
    llama_rule("mlp.down_proj.weight", "mlp.down.kernel", "d f -> f d"),
    llama_rule("mlp.down_proj.bias", "mlp.down.bias", "d -> d"),
)

_ATTENTION_BEFORE = llama_rule("input_layernorm.weight", "attention_norm.scale", "d -> d")
# Llama calls the norm before the MLP "post attention"; in Gemma 2 and OLMo 2 this is the norm of attention's output.
_MLP_BEFORE = llama_rule("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d")
_ATTENTION_AFTER = llama_rule("post_attention_layernorm.weight", "attention_post_norm.scale", "d -> d")
_MLP_BEFORE_OF_BOTH = llama_rule("pre_feedforward_layernorm.weight", "mlp_norm.scale", "d -> d")
_MLP_AFTER = llama_rule("post_feedforward_layernorm.weight", "mlp_post_norm.scale", "d -> d")

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
# Apertus has two names of its own for the norms, no gate, and an activation with parameters.
APERTUS = LLAMA._replace(
    layer=(
        *(llama_rule("attention_layernorm.weight", "attention_norm.scale", "d -> d"), *_ATTENTION, *_HEAD_NORMS),
        *(*_OUTPUT, llama_rule("feedforward_layernorm.weight", "mlp_norm.scale", "d -> d"), *_MLP, *_DOWN),
        llama_rule("mlp.act_fn.alpha_p", "mlp.xielu.alpha_p", "r -> r"),
        llama_rule("mlp.act_fn.alpha_n", "mlp.xielu.alpha_n", "r -> r"),
        llama_rule("mlp.act_fn.beta", "mlp.xielu.beta", "->"),
        llama_rule("mlp.act_fn.eps", "mlp.xielu.eps", "->"),
    )
)
PHI3 = LLAMA._replace(layer=(_ATTENTION_BEFORE, *_FUSED_ATTENTION, *_OUTPUT, _MLP_BEFORE, *_FUSED_MLP, *_DOWN))
STARCODER2 = LLAMA._replace(
    last=(*LLAMA.last, Rule("model.norm.bias", ("final_norm", "bias"), "d -> d")),
    layer=(
        *(_ATTENTION_BEFORE, llama_rule("input_layernorm.bias", "attention_norm.bias", "d -> d")),
        *(*_ATTENTION, *_OUTPUT),
        *(_MLP_BEFORE, llama_rule("post_attention_layernorm.bias", "mlp_norm.bias", "d -> d")),
        llama_rule("mlp.c_fc.weight", "mlp.up.kernel", "f d -> d f"),
        llama_rule("mlp.c_fc.bias", "mlp.up.bias", "f -> f"),
        llama_rule("mlp.c_proj.weight", "mlp.down.kernel", "d f -> f d"),
        llama_rule("mlp.c_proj.bias", "mlp.down.bias", "d -> d"),
    ),
)
