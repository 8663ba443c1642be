"""Exports of multimodal models: the text part is written, and all other tensors are those of the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.models.families import read_model_config
from jdpo.models.lora.adapters import Lora
from jdpo.models.lora.peft_folder import peft_config
from jdpo.models.lora.targets import choose_sites, find_sites, frozen_modules
from jdpo.models.transformer import Transformer
from jdpo.models.weights.embedding_rows import started_rows
from jdpo.models.weights.hf_names import layout_of
from jdpo.models.weights.loading import load_params
from jdpo.models.weights.resize import resize_embeddings
from jdpo.models.weights.safetensors_folder import tensor_entries
from tests.golden_models import GOLDEN_MODELS

SPELLINGS = {
    "as published": ("language_model.model.", "language_model.lm_head.weight"),
    "as modules": ("model.language_model.", "lm_head.weight"),
    "beside": ("model.", "lm_head.weight"),
}


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns dtype, shape and bytes of every tensor of a folder, also of dtypes that numpy lacks."""
    found = {}
    for name, entry in tensor_entries(folder).items():
        data = entry.file.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
        found[name] = (entry.dtype, entry.shape, data)
    return found


def source_of(case: str, folder: Path, *, rename: Callable[[str], str] = str, **more: np.ndarray) -> Path:
    """Copies a golden folder with other names and further tensors."""
    shutil.copytree(GOLDEN_MODELS / case, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): values for name, values in tensors.items()} | more, folder / "model.safetensors")
    return folder


def is_text(name: str) -> bool:
    return not any(part in name for part in ("vision_tower", "multi_modal_projector", "visual", "mtp."))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_are_those_of_the_source(export: Callable[..., Path], tmp_path: Path, spelling: str) -> None:
    prefix, head = SPELLINGS[spelling]

    def rename(name: str) -> str:
        return head if name.endswith("lm_head.weight") else name.replace("language_model.model.", prefix)

    source = source_of("mistral3", tmp_path / "source", rename=rename)
    config = read_model_config(source)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(source, config),
        load_params(GOLDEN_MODELS / "mistral3", config),
    )
    assert raw_tensors(export(source=source)) == raw_tensors(source)


def test_only_the_text_part_changes(export: Callable[..., Path], tmp_path: Path) -> None:
    more = {
        "mtp.layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) * np.nan,  # which nothing computes with
        "visual.counts": np.array([2**40, -1]),
        "visual.flags": np.array([True, False, True]),
        "visual.empty": np.zeros((0, 4), np.float16),
        "visual.scalar": np.array(7, np.uint8),
    }
    source = source_of("gemma3", tmp_path / "source", **more)
    (source / "preprocessor_config.json").write_text('{ "size": 4 }')
    params = jax.tree.map(lambda leaf: leaf + 1, load_params(source, read_model_config(source)))
    out = export(source=source, params=params, export_dtype="float32", max_shard_size="1KB")
    before, after = raw_tensors(source), raw_tensors(out)
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] == after[name]) == (not is_text(name)), name
    assert after["language_model.model.norm.weight"][0] == "F32"
    assert len(list(out.glob("*.safetensors"))) > 10
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())
    assert (out / "preprocessor_config.json").read_text() == '{ "size": 4 }'
    # Another export starts from this one.
    again = export(source=out, out=tmp_path / "again")
    assert raw_tensors(again) == after


def test_settings_of_the_text_part_are_one_level_down(export: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of("qwen3_vl", tmp_path / "source")
    model = Transformer(read_model_config(source))
    rows = started_rows(source, model.config, np.arange(40, 44), np.ones(40, bool), 0)
    params, grown = resize_embeddings(load_params(source, model), model, 44, rows)
    before = json.loads((source / "config.json").read_text())
    before["text_config"] |= {"eos_token_id": 3, "dtype": "bfloat16", "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(before))
    out = export(source=source, params=params, config=grown.config, export_dtype="float32")
    after = json.loads((out / "config.json").read_text())
    text = {"vocab_size": 44, "eos_token_id": [0, 1, 3], "pad_token_id": 2, "dtype": "float32"}
    assert after["text_config"] == before["text_config"] | text
    assert "vocab_size" not in after
    assert after["vision_config"] == before["vision_config"]
    assert read_model_config(out) == grown.config


def test_a_weight_that_the_text_part_lacks_is_refused(tmp_path: Path) -> None:
    name = "language_model.model.layers.0.self_attn.gate.weight"
    source = source_of("gemma3", tmp_path / "source", **{name: np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"extra tensor model[.]language_model[.]layers[.]0[.]self_attn[.]gate"):
        load_params(source, read_model_config(source))
    pure = source_of("llama", tmp_path / "pure", **{"mtp.weight": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=r"extra tensor mtp[.]weight"):
        load_params(pure, read_model_config(pure))


@pytest.mark.parametrize(
    ("upper", "text", "is_tied"),
    [
        ({}, {}, False),
        ({}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True}, {}, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False),
    ],
)
def test_a_tied_head_of_mistral3(tmp_path: Path, upper: dict[str, Any], text: dict[str, Any], is_tied: bool) -> None:
    config = json.loads((GOLDEN_MODELS / "mistral3" / "config.json").read_text())
    for level in (config, config["text_config"]):
        level.pop("tie_word_embeddings", None)
    config |= upper
    config["text_config"] |= text
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path).tie_embeddings == is_tied


@pytest.mark.parametrize(
    ("level", "settings", "message"),
    [
        ("text_config", {"model_type": "llama"}, "model_type 'llama' is not supported in a model of the family gemma3"),
        ("text_config", {"hidden_activation": "tanh"}, "text_config: hidden_activation: 'tanh' is not supported"),
        ("text_config", {"num_hidden_layers": 10**6}, "num_hidden_layers: expected 1 to 1,000"),
        ("text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        (None, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantized weights"),
    ],
)
def test_settings_are_refused_at_both_levels(
    tmp_path: Path, level: str | None, settings: dict[str, Any], message: str
) -> None:
    config = json.loads((GOLDEN_MODELS / "gemma3" / "config.json").read_text())
    (config if level is None else config[level]).update(settings)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config[.]json") as error:
        read_model_config(tmp_path)
    assert message in str(error.value)


def test_adapters_name_no_module_of_another_part() -> None:
    import re

    model = Transformer(read_model_config(GOLDEN_MODELS / "gemma3"))
    sites = choose_sites(find_sites(model), ["q_proj", "down_proj"])
    lora, is_part = Lora(r=2, alpha=2.0, use_rslora=False, sites=sites), layout_of(model.config).is_part
    pattern = re.compile(peft_config(lora, find_sites(model), "base", None, is_part=is_part)["target_modules"])
    names = [module.name for site in find_sites(model) for module in site.modules]
    assert {name for name in names if pattern.fullmatch(name)} == {
        name for name in names if name.endswith(("q_proj", "down_proj"))
    }
    assert not pattern.fullmatch("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    # Training can continue from such an adapter, whose expression selects the same modules.
    assert choose_sites(find_sites(model), pattern.pattern, frozen_modules(model, find_sites(model))) == sites
