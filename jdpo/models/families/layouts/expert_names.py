"""Layouts of families with experts."""

from __future__ import annotations

from jdpo.models.families.layouts.llama_names import LLAMA, llama_rule
from jdpo.models.families.layouts.tensor_rules import Rule


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Returns the rules of a layer with experts, from a family's names of the block and of the maps of an expert.

    There is one tensor per expert, as in published checkpoints and in those of save_pretrained, even if transformers'
    classes have one tensor for all experts in memory.
    """
    return (
        # Hugging Face calls the router `gate`, a word that means a map of the MLP everywhere else.
        llama_rule(f"{block}.gate.weight", "mlp.router.kernel", "e d -> d e"),
        llama_rule(f"{block}.experts.{{}}.{gate}.weight", "mlp.experts.gate.kernel", "x d -> d x"),
        llama_rule(f"{block}.experts.{{}}.{up}.weight", "mlp.experts.up.kernel", "x d -> d x"),
        llama_rule(f"{block}.experts.{{}}.{down}.weight", "mlp.experts.down.kernel", "d x -> x d"),
    )


SHARED_EXPERT = (
    llama_rule("mlp.shared_expert.gate_proj.weight", "mlp.shared.gate.kernel", "s d -> d s"),
    llama_rule("mlp.shared_expert.up_proj.weight", "mlp.shared.up.kernel", "s d -> d s"),
    llama_rule("mlp.shared_expert.down_proj.weight", "mlp.shared.down.kernel", "d s -> s d"),
    llama_rule("mlp.shared_expert_gate.weight", "mlp.shared.score.kernel", "r d -> d r"),
)
QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")

# Mistral's names: w1 is the gate, w3 is up, w2 is down.
MIXTRAL = LLAMA._replace(layer=(*LLAMA.layer, *_experts("block_sparse_moe", "w1", "w3", "w2")))
QWEN3_MOE = LLAMA._replace(layer=(*LLAMA.layer, *QWEN_EXPERTS))
