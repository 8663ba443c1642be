"""The settings of published config.json files, in their old and new spellings, mean what their models compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jdpo.models.families import read_model_config
from jdpo.models.families.config_readers.gpt_oss import gpt_oss
from jdpo.models.families.config_readers.ropes import rope_of
from jdpo.models.model_config import ClampedGate, LayerKind, ModelConfig, QueryScaling, RopeConfig
from tests.golden_models import GOLDEN_MODELS

ABOUT = {"torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True, "initializer_range": 0.02}
OLMO3_YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
MINISTRAL3_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}


def read(folder: Path, model_type: str, **settings: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **ABOUT, **settings}))
    return read_model_config(folder)


def test_phi_4_mini(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "phi3",
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=199999,
        embd_pdrop=0.0,
        eos_token_id=199999,
        full_attn_mod=1,
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=8192,
        interpolate_factor=1,
        lm_head_bias=False,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=24,
        num_hidden_layers=32,
        num_key_value_heads=8,
        original_max_position_embeddings=4096,
        pad_token_id=199999,
        partial_rotary_factor=0.75,
        resid_pdrop=0.0,
        rms_norm_eps=1e-5,
        rope_scaling={"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=True,
        vocab_size=200064,
    )
    (rope,) = config.ropes
    assert (rope.kind, rope.rotated_dims(config.head_dim), len(rope.divisors)) == ("longrope", 96, 48)
    # sqrt(1 + log(131072 / 4096) / log(4096))
    assert rope.attention_factor == pytest.approx(1.190238, abs=1e-6)
    assert (config.max_positions, config.positions_end, config.tie_embeddings) == (4096, True, True)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (24, 8, 128)


def test_olmo3_has_yarn_in_full_layers_only(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "olmo3",
        hidden_size=4096,
        intermediate_size=11008,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        max_position_embeddings=65536,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-6,
        rope_scaling=OLMO3_YARN,
        rope_theta=500000,
        sliding_window=4096,
        vocab_size=100278,
    )
    near = LayerKind(rope=RopeConfig(theta=500000.0), window=4096)
    stretched = RopeConfig(
        theta=500000.0, kind="yarn", factor=8.0, attention_factor=1.2079441541679836, original_max_positions=8192
    )
    assert config.layers == ((near,) * 3 + (LayerKind(rope=stretched),)) * 8
    assert (config.norm_placement, config.qk_norm, config.num_kv_heads) == ("after", "width", 32)


def test_a_type_of_layer_without_a_rope() -> None:
    # As transformers 5.0 reads Olmo 3: one rope for all layers.
    found = SimpleNamespace(rope_parameters={"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0})
    with pytest.raises(ValueError, match="none for sliding_attention; upgrade transformers"):
        rope_of(found, "sliding_attention")


def test_gpt_oss_before_its_gate_had_settings() -> None:
    from transformers import GptOssConfig

    # The class of transformers 5.0 has neither.
    settings = {key: value for key, value in vars(GptOssConfig()).items() if not key.startswith("swiglu")}
    config = gpt_oss(SimpleNamespace(model_type="gpt_oss", **settings))
    assert config.moe is not None
    assert config.moe.clamped_gate == ClampedGate(alpha=1.702, limit=7.0)


def test_ministral3_scales_queries_by_position(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "ministral3",
        head_dim=128,
        hidden_size=3072,
        intermediate_size=9216,
        max_position_embeddings=262144,
        num_attention_heads=32,
        num_hidden_layers=26,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_parameters=MINISTRAL3_YARN,
        sliding_window=None,
        tie_word_embeddings=True,
        vocab_size=131072,
    )
    assert config.query_scaling == QueryScaling(beta=0.1, length=16384)
    # Equal mscale and mscale_all_dim: the angles are stretched, and the scores are not.
    assert (config.ropes[0].kind, config.ropes[0].attention_factor) == ("yarn", 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama_4_scaling_beta": None}, "llama_4_scaling_beta of rope_parameters: expected a number of 0 or more"),
        ({"llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta of rope_parameters: expected a number of 0 or more"),
        ({"llama_4_scaling_beta": "0.1"}, "llama_4_scaling_beta of rope_parameters: expected a number of 0 or more"),
        (
            {"rope_type": "default", "type": "default", "original_max_position_embeddings": 0},
            "original_max_position_embeddings: expected a number above 0",
        ),
    ],
)
def test_a_scaling_of_queries_that_is_no_number(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "ministral3", rope_parameters={**MINISTRAL3_YARN, **change})


def test_seed_oss_and_starcoder2(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "seed_oss",
        attention_bias=True,
        attention_dropout=0.1,
        attention_out_bias=False,
        head_dim=128,
        hidden_size=5120,
        intermediate_size=27648,
        max_position_embeddings=524288,
        mlp_bias=False,
        num_attention_heads=80,
        num_hidden_layers=64,
        num_key_value_heads=8,
        residual_dropout=0.1,
        rope_scaling={"rope_type": "default"},
        rope_theta=10000000.0,
        vocab_size=155136,
    )
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.head_dim) == (True, False, False, 128)
    assert config.ropes == (RopeConfig(theta=1e7),)

    config = read(
        tmp_path,
        "starcoder2",
        activation_function="gelu",
        attention_softmax_in_fp32=True,
        embedding_dropout=0.1,
        hidden_act="gelu_pytorch_tanh",
        hidden_size=3072,
        intermediate_size=12288,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=16384,
        mlp_type="default",
        norm_epsilon=1e-5,
        norm_type="layer_norm",
        num_attention_heads=24,
        num_hidden_layers=30,
        num_key_value_heads=2,
        residual_dropout=0.1,
        rope_theta=999999.4420358813,
        scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
        sliding_window=4096,
        use_bias=True,
        vocab_size=49152,
    )
    assert (config.norm, config.activation, config.gated_mlp, config.mlp_bias) == ("layer", "gelu_tanh", False, True)
    assert (config.windows, config.tie_embeddings, config.num_kv_heads) == ((4096,), True, 2)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {"cache_implementation": "hybrid", "rope_local_base_freq": 10000, "rope_scaling": None}),
        ("gpt2", {"n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}),
        ("gpt_neox", {"gradient_checkpointing": False, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": {}}}),
        ("llama", {"pretraining_tp": 1, "rope_scaling": None, "unsloth_fixed": True, "_name_or_path": "elsewhere"}),
        ("llama", {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "temperature": 0.6, "do_sample": True}),
        ("qwen2", {"use_mrope": False, "attention_bias": False, "rope_scaling": None}),
        (
            "qwen3_moe",
            {"max_window_layers": 28, "qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        ),
        ("apertus", {"post_norm": False, "qk_norm": True, "hidden_dropout": 0.0, "mlp_bias": False}),
        (
            "cohere2",
            {
                "cache_implementation": "hybrid",
                "layer_switch": 4,
                "order_of_interleaved_layers": "local_attn_first",
                "position_embedding_type": "rope_gptj",
                "rotary_pct": 1.0,
                "use_embedding_sharing": True,
                "use_gated_activation": True,
                "use_parallel_block": True,
                "use_parallel_embedding": True,
                "use_qk_norm": False,
            },
        ),
        ("ernie4_5", {"use_rmsnorm": True, "compression_ratio": 1.0, "hidden_dropout_prob": 0.0, "rope_scaling": None}),
        ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 4096, "pad_token_id": 5}),
        ("qwen3_5", {"model_name": "elsewhere", "unsloth_version": "2026.3.3", "use_cache": False}),
        ("qwen3_next", {"full_attention_interval": 4, "rope_scaling": None, "use_sliding_window": False}),
        ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2, "_attn_implementation_autoset": True}),
    ],
)
def test_settings_of_published_files_that_change_nothing(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    golden = json.loads((GOLDEN_MODELS / family / "config.json").read_text())
    assert read(tmp_path, **{**golden, **settings}) == read_model_config(GOLDEN_MODELS / family)


def test_command_r7b(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "cohere2",
        attention_bias=False,
        cache_implementation="hybrid",
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        layer_norm_eps=1e-05,
        layer_switch=4,
        logit_scale=0.25,
        max_position_embeddings=132096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        order_of_interleaved_layers="local_attn_first",
        pad_token_id=0,
        position_embedding_type="rope_gptj",
        rope_scaling=None,
        rope_theta=50000,
        rotary_pct=1.0,
        sliding_window=4096,
        sliding_window_pattern=4,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=True,
        vocab_size=256000,
    )
    near = LayerKind(rope=RopeConfig(theta=5e4, interleaved=True), window=4096)
    assert config.layers == (near, near, near, LayerKind(rope=None)) * 8
    assert (config.logit_scale, config.shared_norm, config.tie_embeddings) == (0.25, True, True)


def test_apertus_8b(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = read(
        tmp_path,
        "apertus",
        attention_bias=False,
        hidden_act="xielu",
        hidden_size=4096,
        intermediate_size=21504,
        max_position_embeddings=65536,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        post_norm=False,
        qk_norm=True,
        rms_norm_eps=1e-05,
        rope_scaling={**llama3, "original_max_position_embeddings": 8192, "rope_type": "llama3", "type": "llama3"},
        rope_theta=12000000,
        tie_word_embeddings=False,
        vocab_size=131072,
    )
    assert config.ropes == (RopeConfig(theta=1.2e7, kind="llama3", original_max_positions=8192, **llama3),)
    assert (config.activation, config.gated_mlp, config.qk_norm) == ("xielu", False, "head")
