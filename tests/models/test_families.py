from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.models.config import RopeConfig
from jdpo.models.families import FAMILIES, read_model_config

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
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **SHAPE, **settings}))
    return folder


def test_llama_reads_every_size_and_fills_left_out_defaults(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "llama", num_key_value_heads=None))
    assert (config.vocab_size, config.num_layers, config.d_model, config.d_ff) == (40, 4, 16, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 4)
    assert (config.norm_eps, config.max_positions, config.ropes) == (1e-6, 64, (RopeConfig(theta=10000.0),))
    assert config.layer_windows == (None,) * 4
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias, config.qk_norm) == (False,) * 4
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
    def flags(family: str, **settings: Any) -> tuple[bool, bool, bool]:
        config = read_model_config(write(tmp_path, family, **settings))
        return config.qkv_bias, config.o_bias, config.qk_norm

    assert flags("llama", attention_bias=True) == (True, True, False)
    assert flags("mistral") == (False, False, False)
    assert flags("qwen2") == (True, False, False)
    assert flags("qwen3", head_dim=8) == (False, False, True)
    assert flags("qwen3", attention_bias=True) == (True, True, True)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, expected 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True is not supported, expected False"),
        ("llama", {"is_causal": False}, "is_causal: False is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized weights"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ("llama", {"layer_types": ["full_attention"] * 4}, "layer_types: not a setting of the family llama"),
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
    golden = Path(__file__).parents[1] / "golden" / "logits"
    families = {read_model_config(folder).family for folder in golden.iterdir()}
    assert families == set(FAMILIES)


def test_python_code_of_the_folder_is_never_run_nor_asked_for(tmp_path: Path) -> None:
    # transformers reads the newest of configuration_files that it is new enough for, in place of config.json.
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
