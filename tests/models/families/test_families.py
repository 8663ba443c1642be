from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.models.families import FAMILIES, read_model_config
from jdpo.models.families.later_families import MISSING
from jdpo.models.model_config import RopeConfig

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 40,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(folder: Path, model_type: str, **settings: Any) -> Path:
    # GPT-2 and GPT-NeoX have no grouped queries.
    left_out = {"num_key_value_heads"} if model_type in ("gpt2", "gpt_neox") else set()
    shape = {key: value for key, value in SHAPE.items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **shape, **settings}))
    return folder


def test_llama_reads_every_size_and_fills_left_out_defaults(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "llama", num_key_value_heads=None))
    assert (config.vocab_size, config.num_layers, config.d_model, config.d_ff) == (40, 4, 16, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 4)
    assert (config.norm_eps, config.max_positions, config.ropes) == (1e-6, 64, (RopeConfig(theta=10000.0),))
    assert config.layer_windows == (None,) * 4
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias, config.qk_norm) == (False, False, False, None)
    assert hash(config) == hash(read_model_config(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
        {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ],
    ids=["old keys", "new keys", "older still"],
)
def test_old_and_new_rope_keys_mean_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    (rope,) = read_model_config(write(tmp_path, "llama", **settings)).ropes
    assert rope == RopeConfig(
        theta=500.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
    )


def test_linear_rope_in_its_old_spelling(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", rope_scaling={"type": "linear", "factor": 2.0})
    assert read_model_config(folder).ropes == (RopeConfig(theta=10000.0, kind="linear", factor=2.0),)


def test_mistral_window_holds_for_every_layer(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, "mistral", sliding_window=8)).layer_windows == (8,) * 4
    assert read_model_config(write(tmp_path, "mistral", sliding_window=None)).layer_windows == (None,) * 4


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(tmp_path: Path, family: str) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 8}
    assert read_model_config(write(tmp_path, family, sliding_window=8)).layer_windows == (None,) * 4
    by_depth = write(tmp_path, family, max_window_layers=3, **windowed)
    assert read_model_config(by_depth).layer_windows == (None, None, None, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    by_name = write(tmp_path, family, layer_types=kinds, **windowed)
    assert read_model_config(by_name).layer_windows == (8, None, 8, None)


def test_biases_and_qk_norm_by_family(tmp_path: Path) -> None:
    def flags(family: str, **settings: Any) -> tuple[bool, bool, str | None]:
        config = read_model_config(write(tmp_path, family, **settings))
        return config.qkv_bias, config.o_bias, config.qk_norm

    assert flags("llama", attention_bias=True) == (True, True, None)
    assert flags("mistral") == (False, False, None)
    assert flags("qwen2") == (True, False, None)
    assert flags("qwen3", head_dim=8) == (False, False, "head")
    assert flags("qwen3", attention_bias=True) == (True, True, "head")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma7", {}, "model_type 'gemma7' is not supported; supported are "),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is not supported; supported are silu, "),
        ("gemma2", {"hidden_activation": "gelu_fast"}, "hidden_activation: 'gelu_fast' is not supported"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function: 'tanh' is not supported"),
        ("llama", {"is_causal": False}, "is_causal: False is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized weights"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ("phi3", {"partial_rotary_factor": 1.5, "pad_token_id": 0}, "partial_rotary_factor: 1.5 is not supported"),
        ("gpt_neox", {"rotary_pct": 0.3, "hidden_size": 40}, "rotation needs pairs"),
        ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "one rope per layer type (full_attention)",
        ),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: expected a number above 0, found 0.0"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping: expected a number above 0, found -1.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a number above 0, found 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window is not set"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: not a setting that models of"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling: expected a number above 0, found 0.0"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 4, "pad_token_id": 0}, "is false"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 4},
            "no_rope_layers: 2 entries for 4",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not supported"),
        ("gpt_neox", {"head_dim": 8}, "head_dim: 8 is not supported in a model of this family, expected 4"),
        ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported in a model of this family"),
        ("gpt2", {"intermediate_size": 24}, "intermediate_size: 24 is not supported in a model of the family gpt2"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True is not supported"),
        ("olmo2", {"layer_types": ["full_attention"] * 4}, "layer_types: not a setting of the family olmo2"),
        *(
            (family, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized weights")
            for family in ("gemma", "gpt2", "gpt_neox", "phi3")
        ),
        ("llama", {"layer_types": ["full_attention"] * 4}, "layer_types: not a setting of the family llama"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, found 0"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers: expected 1 to 1,000, found 1000000"),
        ("gpt2", {"n_layer": 10**6}, "n_layer: expected 1 to 1,000, found 1000000"),
        ("llama", {"hidden_size": 1e300}, "hidden_size: expected 1 to 1,048,576, found 1e+300"),
        ("llama", {"vocab_size": -5}, "vocab_size: expected 1 to 16,777,216, found -5"),
        ("qwen2", {"layer_types": ["full_attention"] * 10**5}, "layer_types: found 100,000 layers"),
        ("mixtral", {"num_hidden_layers": 1000, "num_local_experts": 4096}, "1,000 layers of 4,096 experts"),
        ("llama", {"rope_theta": 0}, "rope_theta: expected a number above 0, found 0"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 0.0}},
            "factor of rope_parameters: expected a number above 0",
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [2.0],
                    "long_factor": [2.0],
                    "original_max_position_embeddings": 16,
                }
            },
            "short_factor of longrope: expected 2 numbers, one for each rotated pair, found 1",
        ),
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor: expected less than high_freq_factor, 4.0, found 4.0",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected at least 1, found 0"),
        ("mixtral", {"router_aux_loss_coef": -0.5}, "router_aux_loss_coef: expected 0 or more, found -0.5"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("llama", {"head_dim": 3}, "head_dim 3 is odd"),
        ("llama", {"vocab_size": "many"}, "transformers cannot read it"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "must be equal to the number of `layer_types` (3)"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not supported"),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_window is not set"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="config") as error:
        read_model_config(write(tmp_path, family, **settings))
    assert message in str(error.value)


def test_gemma3_with_images_has_no_cap_of_logits(tmp_path: Path) -> None:
    text = {**SHAPE, "model_type": "gemma3_text", "final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    with pytest.raises(ValueError, match=r"final_logit_softcapping: not a setting that models .* gemma3 "):
        read_model_config(tmp_path)


def test_longrope_takes_the_short_factors_and_ends_where_they_do(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    settings = {"original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope", **factors}}
    config = read_model_config(write(tmp_path, "phi3", pad_token_id=0, **settings))
    assert config.ropes[0].divisors == (1.0, 2.0)
    assert config.ropes[0].attention_factor == pytest.approx(
        (1 + 0.5) ** 0.5
    )  # longrope's attention factor: sqrt(1 + log 4 / log 16)
    assert (config.max_positions, config.positions_end) == (16, True)


def test_config_of_gemma2(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "gemma2", sliding_window=8, query_pre_attn_scalar=64))
    assert (config.norm, config.norm_placement, config.activation) == ("rms_offset", "both", "gelu_tanh")
    assert (config.attention_scale, config.attention_softcap, config.logit_softcap) == (0.125, 50.0, 30.0)
    assert (config.embedding_scale, config.tie_embeddings, config.head_dim) == (4.0, True, 256)
    assert config.layer_windows == (8, None, 8, None)


def test_config_of_gpt2(tmp_path: Path) -> None:
    sizes = {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 20, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    config = read_model_config(tmp_path)
    assert (config.d_model, config.d_ff, config.num_kv_heads, config.head_dim) == (12, 48, 3, 4)
    assert (config.norm, config.gated_mlp, config.mlp_bias, config.qkv_bias) == ("layer", False, True, True)
    assert (config.learned_positions, config.positions_end, config.max_positions) == (True, True, 20)
    assert config.ropes == ()


def test_ropes_and_windows_of_gemma3_and_smollm3_by_layer(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "gemma3_text", sliding_window=8, sliding_window_pattern=2))
    near, far = RopeConfig(theta=1e4), RopeConfig(theta=1e6)
    assert [(kind.window, kind.rope) for kind in config.layers] == [(8, near), (None, far)] * 2
    config = read_model_config(write(tmp_path, "smollm3", no_rope_layer_interval=2, pad_token_id=0))
    assert [kind.rope is None for kind in config.layers] == [False, True] * 2


def test_config_of_cohere2(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "cohere2", sliding_window=8, pad_token_id=0, logit_scale=0.25))
    rope = RopeConfig(theta=1e4, interleaved=True)
    assert [(kind.window, kind.rope) for kind in config.layers] == [(8, rope)] * 3 + [(None, None)]
    assert (config.norm, config.parallel_residual, config.shared_norm) == ("layer_no_bias", True, True)
    assert (config.logit_scale, config.tie_embeddings, config.norm_eps) == (0.25, True, 1e-5)
    # As transformers' class builds them, heads need not fill the model's width.
    assert config.head_dim == 4
    assert read_model_config(write(tmp_path, "cohere2", sliding_window=8, pad_token_id=0, head_dim=6)).head_dim == 6


def test_missing_folder_missing_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config[.]json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_model_config(tmp_path)


def test_every_family_has_a_golden_folder() -> None:
    golden = Path(__file__).parents[2] / "golden" / "logits"
    families = {read_model_config(folder).family for folder in golden.iterdir()}
    assert families == set(FAMILIES)


def test_python_code_of_the_folder_is_never_run_nor_asked_for(tmp_path: Path) -> None:
    # Instead of config.json, transformers reads the newest of configuration_files that its version supports.
    folder = write(tmp_path, "llama", configuration_files=["config.4.0.0.json"])
    (folder / "config.4.0.0.json").write_text(
        json.dumps({"model_type": "own", **SHAPE, "auto_map": {"AutoConfig": "code.Own"}})
    )
    marker = tmp_path / "it_ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom jdpo.models.families import read_model_config\n"
        "try: read_model_config(Path(sys.argv[1]))\nexcept ValueError as error: print(error)\n"
    )
    root = str(Path(jdpo.__file__).parents[1])
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder)], input="y\n", capture_output=True, text=True, env=environment
    )
    assert not marker.exists()
    assert "needs Python code of its own (auto_map), which jdpo never runs" in run.stdout, run.stderr
    assert "trust_remote_code" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("family", "mechanism"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("gemma4", "keys and values of an earlier layer"),
        ("glm4", "neighbouring elements in one half of each head"),
        ("glm4_moe", "a correction bias"),
        ("granitemoehybrid", "Mamba-2"),
        ("kimi_k2", "multi-head latent attention"),
        ("kimi_linear", "a decay for each channel"),
        ("lfm2", "short convolution"),
        ("nemotron_h", "Mamba-2"),
    ],
)
def test_later_families_are_refused_with_what_is_missing(tmp_path: Path, family: str, mechanism: str) -> None:
    with pytest.raises(ValueError, match=f"model_type '{family}' is not supported: it needs .*{mechanism}"):
        read_model_config(write(tmp_path, family))


def test_a_tower_whose_text_part_comes_later(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_config: model_type 'mistral4' is not supported .* latent attention"):
        read_model_config(write(tmp_path, "mistral3", text_config={"model_type": "mistral4"}))


def test_no_family_is_both_supported_and_missing() -> None:
    assert not set(MISSING) & set(FAMILIES)
    assert all(mechanisms and not isinstance(mechanisms, str) for mechanisms in MISSING.values())
