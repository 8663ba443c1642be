"""Layouts of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from jdpo.models.families.layouts.expert_names import QWEN_EXPERTS, SHARED_EXPERT
from jdpo.models.families.layouts.llama_names import LLAMA, llama_rule
from jdpo.models.families.layouts.tensor_rules import Form, Rule, Spelling

# A head's query is followed by its gate, in the same tensor.
_GATED_QUERY = (
    llama_rule("self_attn.q_proj.weight", "attention.query.kernel", "(h 0/2 k) d -> d h k"),
    llama_rule("self_attn.q_proj.weight", "attention.gate.kernel", "(h 1/2 k) d -> d h k"),
    llama_rule("self_attn.q_proj.bias", "attention.query.bias", "(h 0/2 k) -> h k"),
    llama_rule("self_attn.q_proj.bias", "attention.gate.bias", "(h 1/2 k) -> h k"),
)

_DELTA = (
    llama_rule("linear_attn.conv1d.weight", "delta.query_conv.taps", "(q y)[q y][q m z] 0/1 w -> q y w"),
    llama_rule("linear_attn.conv1d.weight", "delta.key_conv.taps", "[q y](q y)[q m z] 0/1 w -> q y w"),
    llama_rule("linear_attn.conv1d.weight", "delta.value_conv.taps", "[q y][q y](q m z) 0/1 w -> q m z w"),
    llama_rule("linear_attn.A_log", "delta.a_log", "(q m) -> q m"),
    llama_rule("linear_attn.dt_bias", "delta.dt_bias", "(q m) -> q m"),
    llama_rule("linear_attn.norm.weight", "delta.norm.scale", "z -> z"),
    llama_rule("linear_attn.out_proj.weight", "delta.output.kernel", "d (q m z) -> q m z d"),
)
# Each kind of output in one piece: all queries, then all keys, then all values.
_DELTA_INPUTS = (
    llama_rule("linear_attn.in_proj_qkv.weight", "delta.query.kernel", "(q y)[q y][q m z] d -> d q y"),
    llama_rule("linear_attn.in_proj_qkv.weight", "delta.key.kernel", "[q y](q y)[q m z] d -> d q y"),
    llama_rule("linear_attn.in_proj_qkv.weight", "delta.value.kernel", "[q y][q y](q m z) d -> d q m z"),
    llama_rule("linear_attn.in_proj_z.weight", "delta.gate.kernel", "(q m z) d -> d q m z"),
    llama_rule("linear_attn.in_proj_b.weight", "delta.beta.kernel", "(q m) d -> d q m"),
    llama_rule("linear_attn.in_proj_a.weight", "delta.decay.kernel", "(q m) d -> d q m"),
)
# Everything of a key head in one piece: its query, its key, the values and the gates of its value heads.
_DELTA_INPUTS_BY_HEAD = (
    llama_rule("linear_attn.in_proj_qkvz.weight", "delta.query.kernel", "(q (y)[y][m z][m z]) d -> d q y"),
    llama_rule("linear_attn.in_proj_qkvz.weight", "delta.key.kernel", "(q [y](y)[m z][m z]) d -> d q y"),
    llama_rule("linear_attn.in_proj_qkvz.weight", "delta.value.kernel", "(q [y][y](m z)[m z]) d -> d q m z"),
    llama_rule("linear_attn.in_proj_qkvz.weight", "delta.gate.kernel", "(q [y][y][m z](m z)) d -> d q m z"),
    llama_rule("linear_attn.in_proj_ba.weight", "delta.beta.kernel", "(q 0/2 m) d -> d q m"),
    llama_rule("linear_attn.in_proj_ba.weight", "delta.decay.kernel", "(q 1/2 m) d -> d q m"),
)


def _gated(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    plain = {rule.hf_name for rule in _GATED_QUERY}
    return (*_GATED_QUERY, *(rule for rule in layer if rule.hf_name not in plain))


# All experts of a layer in one tensor: the rows of each expert's gate first, then those of its up.
_EXPERTS = (
    llama_rule("mlp.gate.weight", "mlp.router.kernel", "e d -> d e"),
    llama_rule("mlp.experts.gate_up_proj", "mlp.experts.gate.kernel", "e x[x] d -> e d x"),
    llama_rule("mlp.experts.gate_up_proj", "mlp.experts.up.kernel", "e [x]x d -> e d x"),
    llama_rule("mlp.experts.down_proj", "mlp.experts.down.kernel", "e d x -> e x d"),
)
# One tensor per expert, as Qwen3-Next is published and as save_pretrained writes all of them.
_ONE_BY_ONE = Form(tuple(rule for rule in QWEN_EXPERTS if "experts" in rule.path), is_kept=True)

_LAYER = (*_gated(LLAMA.layer), *_EXPERTS, *SHARED_EXPERT, *_DELTA)

# Layers that predict further tokens, which transformers' classes do not have; they read the model's last hidden states.
_MTP = "mtp."

QWEN3_NEXT = LLAMA._replace(layer=(*_LAYER, *_DELTA_INPUTS_BY_HEAD), forms=(_ONE_BY_ONE,), carried=(_MTP,))
QWEN3_5 = LLAMA._replace(
    layer=(*_LAYER, *_DELTA_INPUTS),
    # Folders of the text part alone that were made from a multimodal model keep its names.
    spellings=(Spelling("model.language_model.", "lm_head.weight"),),
    forms=(_ONE_BY_ONE,),
    carried=(_MTP, "model.visual."),
)
