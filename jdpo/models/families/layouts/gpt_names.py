"""Layouts of GPT-2 and GPT-NeoX, which have LayerNorm and biases everywhere."""

from __future__ import annotations

from jdpo.models.families.layouts.llama_names import LLAMA
from jdpo.models.families.layouts.tensor_rules import Layout, Rule


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
