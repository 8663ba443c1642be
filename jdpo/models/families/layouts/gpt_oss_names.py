"""Layout of gpt-oss, which has the maps of all experts of a layer in one tensor, in bfloat16 or in MXFP4."""

from __future__ import annotations

from jdpo.models.families.layouts.llama_names import LLAMA, llama_rule
from jdpo.models.families.layouts.tensor_rules import Form

# Elements of gate and up alternate.
_EXPERTS = (
    llama_rule("mlp.experts.gate_up_proj", "mlp.experts.gate.kernel", "e d (x 0/2) -> e d x"),
    llama_rule("mlp.experts.gate_up_proj", "mlp.experts.up.kernel", "e d (x 1/2) -> e d x"),
    llama_rule("mlp.experts.down_proj", "mlp.experts.down.kernel", "e x d -> e x d"),
)
# The groups of 32 numbers are along the inputs, so that these are last: [outputs, inputs], transposed.
_MXFP4 = (
    llama_rule("mlp.experts.gate_up_proj_blocks", "mlp.experts.gate.kernel", "e (x 0/2) d -> e d x"),
    llama_rule("mlp.experts.gate_up_proj_blocks", "mlp.experts.up.kernel", "e (x 1/2) d -> e d x"),
    llama_rule("mlp.experts.down_proj_blocks", "mlp.experts.down.kernel", "e d x -> e x d"),
)

GPT_OSS = LLAMA._replace(
    layer=(
        *LLAMA.layer,
        llama_rule("self_attn.sinks", "attention.sinks", "h -> h"),
        llama_rule("mlp.router.weight", "mlp.router.kernel", "e d -> d e"),
        llama_rule("mlp.router.bias", "mlp.router.bias", "e -> e"),
        *_EXPERTS,
        llama_rule("mlp.experts.gate_up_proj_bias", "mlp.experts.gate.bias", "e (x 0/2) -> e x"),
        llama_rule("mlp.experts.gate_up_proj_bias", "mlp.experts.up.bias", "e (x 1/2) -> e x"),
        llama_rule("mlp.experts.down_proj_bias", "mlp.experts.down.bias", "e d -> e d"),
    ),
    forms=(Form(_MXFP4, is_kept=False),),
)
