"""Adapters against PEFT on transformers' torch classes: logits, gradients, and folders in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jdpo.models.families import read_model_config
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jdpo.models.lora.adapters import Lora, abstract_adapters, init_adapters, weights_of
from jdpo.models.lora.base_weights import Base
from jdpo.models.lora.peft_folder import load_adapters, peft_config, peft_tensors, read_adapter
from jdpo.models.lora.targets import choose_sites, find_sites
from jdpo.models.transformer import Transformer, Weights, make_apply_fn
from jdpo.models.weights.loading import load_params

pytestmark = [
    pytest.mark.torch,
    # peft calls a deprecated function of transformers, and for experts warns of patterns that it wrote itself.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "Llama": ({"attention_bias": True}, "all-linear"),
    "Qwen2": ({"tie_word_embeddings": True}, ["q_proj", "v_proj"]),
    "Qwen3": ({"head_dim": 10}, r".*\.(o_proj|down_proj)"),
    "Mistral": ({"sliding_window": 4}, ["self_attn.k_proj", "up_proj"]),
    "Gemma3": ({"head_dim": 10, "sliding_window": 4, "num_hidden_layers": 7}, ["q_proj", "down_proj"]),
    # Modules that fuse several projections; their adapter has one A for all of them.
    "Phi3": ({}, "all-linear"),
    "GPT2": ({"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}, ["c_attn", "attn.c_proj"]),
    "GPTNeoX": ({"hidden_size": 32}, ["query_key_value", "dense", "dense_4h_to_h"]),
    "Starcoder2": ({"sliding_window": 4}, "all-linear"),
    "Cohere2": ({"sliding_window": 4, "logit_scale": 1.0}, "all-linear"),
    "Apertus": ({}, "all-linear"),
    "Ernie4_5": ({"head_dim": 6}, ["q_proj", "up_proj"]),
}

# The projections of a DeltaNet: apart, and fused by key heads.
DELTA_NET = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
CASES["Qwen3_5"] = (DELTA_NET, "all-linear")
CASES["Qwen3Next"] = (
    DELTA_NET
    | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 12},
    ["in_proj_qkvz", "in_proj_ba", "linear_attn.out_proj", "q_proj"],
)

# Tensors with the maps of all experts, which PEFT adapts as parameters; gate and up share an A.
IN_ONE_TENSOR = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 6, "sliding_window": 4}
_MAPS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PARAMETERS = {"GptOss": _MAPS, "Qwen3_5Moe": _MAPS}
CASES["GptOss"] = (IN_ONE_TENSOR, ["q_proj", "o_proj", *PARAMETERS["GptOss"]])

# Next to experts in one tensor, a shared one whose maps are dense.
SHARED = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 9}
CASES["Qwen3_5Moe"] = (DELTA_NET | SHARED, ["q_proj", "shared_expert.up_proj", "shared_expert_gate", *_MAPS])

EXPERTS = {"num_experts_per_tok": 2, "head_dim": 6, "num_hidden_layers": 2}
OF_EXPERTS: dict[str, tuple[dict[str, Any], Any]] = {
    "Mixtral": (EXPERTS | {"num_local_experts": 3}, "all-linear"),
    "Qwen3Moe": (
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 10},
        ["q_proj", "up_proj", "gate_proj", "down_proj"],
    ),
}
"""PEFT reads adapters of single experts as earlier transformers had them, and makes others itself."""

TOKENS = np.random.default_rng(0).integers(0, 50, (3, 10))


def torch_model(name: str, settings: dict[str, Any], folder: Path) -> Any:
    """Makes a random model of a family and saves it to a folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config_name = f"{name}TextConfig" if name in ("Gemma3", "Qwen3_5", "Qwen3_5Moe") else f"{name}Config"
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    sizes = {**SIZES, **settings}
    # They have no such settings.
    for key in {"GPT2": ("num_key_value_heads", "intermediate_size"), "GPTNeoX": ("num_key_value_heads",)}.get(
        name, ()
    ):
        del sizes[key]
    config = getattr(transformers, config_name)(**sizes)
    model = getattr(transformers, model_name)(config).eval()
    if "num_experts_per_tok" in settings:
        model.set_experts_implementation("eager")  # the other kernels need sizes that are multiples of 16 bytes
    model.save_pretrained(folder)
    return model


def sharded_nowhere(model: Transformer, lora: Lora) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: one, abstract_adapters(lora, jnp.float32))


def torch_loss(model: Any) -> Any:
    import torch

    tokens = torch.tensor(TOKENS)
    logps = model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    signs = torch.tensor([1.0, -1.0, 0.5])
    return -torch.nn.functional.logsigmoid(0.1 * (logps.sum(-1) * signs).sum())


def own_loss(model: Transformer, weights: Weights) -> Any:
    logits = make_apply_fn(model)(weights, TOKENS, np.ones(TOKENS.shape, bool))
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
    return -jax.nn.log_sigmoid(0.1 * (logps.sum(-1) * jnp.array([1.0, -1.0, 0.5])).sum())


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_its_logits_and_gradients(name: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    settings, targets = CASES[name]
    reference = torch_model(name, settings, tmp_path / "base")
    parameters = PARAMETERS.get(name)
    modules = [target for target in targets if target not in parameters] if parameters else targets
    peft_model = get_peft_model(
        reference,
        LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=name == "Qwen2",
            target_modules=modules,
            target_parameters=parameters,
            task_type="CAUSAL_LM",
            init_lora_weights=False,  # so that B is not zero
            fan_in_fan_out=name == "GPT2",
        ),
    )
    peft_model.save_pretrained(str(tmp_path / "adapter"))

    model = Transformer(read_model_config(tmp_path / "base"))
    base = Base(load_params(tmp_path / "base", model), {})
    adapter = read_adapter(tmp_path / "adapter", find_sites(model))
    adapters = load_adapters(adapter, sharded_nowhere(model, adapter.lora), np.dtype(np.float32))
    with torch.no_grad():
        expected, alone = peft_model(torch.tensor(TOKENS)).logits.numpy(), None
        with peft_model.disable_adapter():
            alone = peft_model(torch.tensor(TOKENS)).logits.numpy()
    apply = jax.jit(make_apply_fn(model))
    mask = np.ones(TOKENS.shape, bool)
    found = apply(weights_of(adapter.lora, base, adapters), TOKENS, mask)
    assert np.abs(expected - alone).max() > 0.1, "the adapter does something"
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(apply(weights_of(adapter.lora, base, {}), TOKENS, mask), alone, atol=1e-4)

    torch_loss(peft_model).backward()
    grads = jax.jit(jax.grad(lambda adapters: own_loss(model, weights_of(adapter.lora, base, adapters))))(adapters)
    theirs = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in peft_model.named_parameters()
        if parameter.grad is not None
    }
    ours = peft_tensors(adapter.lora, jax.device_get(grads))
    assert set(ours) == set(theirs)
    for name_of_tensor, values in ours.items():
        scale = np.abs(theirs[name_of_tensor]).max()
        np.testing.assert_allclose(values, theirs[name_of_tensor], atol=1e-4 * scale, err_msg=name_of_tensor)


@pytest.mark.parametrize("name", [*CASES, *OF_EXPERTS])
def test_peft_loads_what_jdpo_writes(name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    settings, targets = (CASES | OF_EXPERTS)[name]
    reference = torch_model(name, settings, tmp_path / "base")
    model = Transformer(read_model_config(tmp_path / "base"))
    sites = find_sites(model)
    lora = Lora(r=2, alpha=3.0, use_rslora=True, sites=choose_sites(sites, targets))
    adapters = init_adapters(lora, jax.random.key(0), jnp.float32)
    adapters = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(peft_tensors(lora, jax.device_get(adapters)), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(peft_config(lora, sites, str(tmp_path / "base"), None)))

    peft_model = PeftModel.from_pretrained(reference, str(folder))
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert sum(p.numel() for key, p in peft_model.named_parameters() if "lora_" in key) >= num_trained
    with torch.no_grad():
        expected = peft_model(torch.tensor(TOKENS)).logits.numpy()
    base = Base(load_params(tmp_path / "base", model), {})
    found = jax.jit(make_apply_fn(model))(weights_of(lora, base, adapters), TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    again = read_adapter(folder, sites)
    assert again.lora.sites == lora.sites
    assert again.lora.scale == pytest.approx(lora.scale)
    back = load_adapters(again, sharded_nowhere(model, lora), np.dtype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
