"""Families with experts against transformers' own torch classes, at two random small shapes each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.checkpoint.hf_export import export_model
from jdpo.data.batching.loader import collate_pairs
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.losses.settings import loss_settings
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_routed_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.training.step.objectives import PreferenceObjective
from jdpo.training.step.train_step import loss_and_grads
from jdpo.types import TokenizedPair
from tests.models.hf_arrays import hf_arrays
from tests.models.torch_cases import DELTA, NARROW_DELTA, SCALED_YARN, SIGHT, tower_settings

pytestmark = pytest.mark.torch

BETA, COEF, NUM_PAIRS, LENGTH = 0.3, 0.2, 3, 12
SHARED = {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 9}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4, "num_hidden_layers": 3}),
    ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "decoder_sparse_step": 2}
        | {"num_hidden_layers": 5, "mlp_only_layers": [1], "attention_bias": True},
    ),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True}),
    (
        "GptOss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4, "num_hidden_layers": 3}
        | {"swiglu_limit": 0.8, "rope_parameters": SCALED_YARN},
    ),
    (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5, "attention_bias": False}
        | {"layer_types": ["full_attention", "sliding_attention"], "swiglu_alpha": 0.9},
    ),
    ("Qwen3Next", {**DELTA, **SHARED, "norm_topk_prob": False, "mlp_only_layers": [1]}),
    ("Qwen3Next", {**NARROW_DELTA, **SHARED, "tie_word_embeddings": True, "attention_bias": True}),
    ("Qwen3_5MoeText", {**DELTA, **SHARED, "attention_bias": True}),
    ("Qwen3_5MoeText", {**NARROW_DELTA, **SHARED, "tie_word_embeddings": True}),
    ("Qwen3_5Moe", {**DELTA, **SHARED}),
    ("Qwen3_5Moe", {**NARROW_DELTA, **SHARED, "tie_word_embeddings": True}),
]


def make_torch(seed: int, prefix: str, settings: dict[str, Any], vocab_size: int) -> Any:
    """Makes a random model of odd head counts and sizes without a common factor."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    num_kv_heads, head_dim = int(rng.integers(1, 4)), 2 * int(rng.integers(2, 6))
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": int(rng.integers(10, 30)),
        "head_dim": head_dim,
        "intermediate_size": int(rng.integers(10, 30)),
        "num_hidden_layers": 2,
        "num_attention_heads": num_kv_heads * int(rng.integers(1, 4)),
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "output_router_logits": True,
    }
    if prefix.startswith("Qwen3"):
        shape["moe_intermediate_size"] = int(rng.integers(5, 15))
    if prefix.startswith("Qwen3_5Moe"):
        del shape["intermediate_size"]  # no layer is dense
    torch.manual_seed(seed)
    own = {**shape, **settings}
    config = getattr(transformers, f"{prefix}Config")(**(tower_settings(prefix, own) if prefix in SIGHT else own))
    head = "ForConditionalGeneration" if prefix in SIGHT else "ForCausalLM"
    model = getattr(transformers, prefix.removesuffix("Text") + head)(config).eval()
    model.set_experts_implementation("eager")  # the other kernels need sizes that are multiples of 16 bytes
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "sinks")):
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("A_log"):
            parameter.data -= 3  # states that last for several tokens
    return model


def of_model(model: Any, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """Returns a torch model's parameters, or gradients, by our names, without those of a vision tower."""
    if model.config.model_type not in ("mixtral", "qwen3_moe"):
        parameters = [pair for pair in model.named_parameters() if not pair[0].startswith("model.visual.")]
        return {name: (value.grad if gradients else value.detach()).numpy() for name, value in parameters}
    is_mixtral = model.config.model_type == "mixtral"
    block = "block_sparse_moe" if is_mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, parameter in model.named_parameters():
        values = (parameter.grad if gradients else parameter.detach()).numpy()
        experts = name.split(".mlp.")[0] + f".{block}.experts"
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(values):
                parts = zip((gate, up), np.split(both, 2), strict=True)
                found |= {f"{experts}.{expert}.{key}.weight": part for key, part in parts}
        elif name.endswith("experts.down_proj"):
            found |= {f"{experts}.{expert}.{down}.weight": part for expert, part in enumerate(values)}
        else:
            found[name.replace(".mlp.", f".{block}.")] = values
    return found


def make_pairs(rng: np.random.Generator, vocab_size: int) -> list[TokenizedPair]:
    sizes = [(4, 3, 6), (1, 8, 2), (6, 5, 6)]
    return [
        TokenizedPair(*(rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths), origin="")
        for lengths in sizes[:NUM_PAIRS]
    ]


def torch_loss(model: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Computes logits, preference loss and load balancing loss in torch; the reference's log-probs are 0."""
    import torch

    tokens, mask, completion = (torch.tensor(np.asarray(array).reshape(2 * NUM_PAIRS, -1)) for array in batch[:3])
    out = model(tokens.long(), attention_mask=mask.long())
    logps = torch.log_softmax(out.logits[:, :-1], -1).gather(-1, tokens[:, 1:, None].long())[..., 0]
    sums = (logps * completion[:, 1:]).sum(-1).reshape(NUM_PAIRS, 2)
    loss = -torch.nn.functional.logsigmoid(BETA * (sums[:, 0] - sums[:, 1])).mean()
    return out.logits, loss, out.aux_loss


@pytest.mark.parametrize(
    ("seed", "case"), list(enumerate(CASES)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
)
def test_everything_equals_torch(tmp_path: Path, toy_model: Path, seed: int, case: tuple[str, dict[str, Any]]) -> None:
    import transformers

    tokenizer = load_tokenizer(toy_model, chat_template=None).hf
    reference = make_torch(seed, *case, vocab_size=len(tokenizer) + 3)
    source, out = tmp_path / "source", tmp_path / "out"
    reference.save_pretrained(source, max_shard_size="20KB")

    # Every tensor comes back bitwise.
    model = Transformer(read_model_config(source))
    params, expected = load_params(source, model), of_model(reference)
    for name, values in hf_arrays(params, model.config):
        np.testing.assert_array_equal(values, expected.pop(name), err_msg=name)
    assert set(expected) <= {"lm_head.weight"}

    # Logits, losses and gradients.
    rng = np.random.default_rng(seed)
    pairs = make_pairs(rng, model.config.vocab_size)
    batch = collate_pairs(pairs, num_slots=NUM_PAIRS, length=LENGTH, pad_token_id=0)
    logits, loss, aux_loss = torch_loss(reference, batch)
    flat, mask = (np.asarray(array).reshape(2 * NUM_PAIRS, -1) for array in batch[:2])
    routed = jax.jit(make_routed_apply_fn(model))(params, flat, mask)
    assert np.abs(logits.detach().numpy()[mask]).max() > 1
    np.testing.assert_allclose(np.asarray(routed.output)[mask], logits.detach().numpy()[mask], atol=1e-4)
    (loss + COEF * aux_loss).backward()
    objective = PreferenceObjective(make_routed_apply_fn(model), loss_settings("sigmoid", beta=BETA)[0], COEF)
    batch = batch._replace(reference_logps=np.zeros((NUM_PAIRS, 2), np.float32))
    stacked = jax.tree.map(lambda array: jnp.asarray(array)[None], batch)
    found = jax.jit(partial(loss_and_grads, objective))(params, None, stacked)
    assert float(found.loss) == pytest.approx(loss.item(), rel=1e-4)
    assert float(found.aux_loss) == pytest.approx(aux_loss.item(), rel=1e-5)
    gradients = of_model(reference, gradients=True)
    for name, values in hf_arrays(found.grads, model.config):
        scale = np.abs(gradients[name]).max()
        np.testing.assert_allclose(values, gradients[name], atol=1e-4 * scale, err_msg=name)
        assert scale > 0 or "experts" in name, name  # None if an expert had no token

    # Load the exported folder with transformers.
    export_model(
        params, model.config, out, source_folder=source, tokenizer=tokenizer, end_token_ids=[], export_dtype="source"
    )
    again = getattr(transformers, reference.config.architectures[0]).from_pretrained(out)
    again.set_experts_implementation("eager")
    np.testing.assert_array_equal(torch_loss(again, batch)[0].detach().numpy(), logits.detach().numpy())
