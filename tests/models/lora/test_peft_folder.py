"""PEFT's adapter folders: reading, refusals by name, and modules that several projections share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.checkpoint.peft_export import export_adapter
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME, base_of, is_adapter_folder
from jdpo.models.lora.adapters import Lora, abstract_adapters, init_adapters
from jdpo.models.lora.peft_folder import (
    load_adapters,
    peft_config,
    peft_tensors,
    read_adapter,
    target_names,
)
from jdpo.models.lora.targets import choose_sites, find_sites
from jdpo.models.transformer import Transformer
from tests.conftest import small_llama

MODEL = Transformer(small_llama())
SITES = find_sites(MODEL)
LORA = Lora(r=2, alpha=4.0, use_rslora=False, sites=choose_sites(SITES, ["q_proj", "down_proj"]))

Write = Callable[..., Path]


@pytest.fixture
def adapters() -> Any:
    start = init_adapters(LORA, jax.random.key(0), jnp.float32)
    return jax.device_get(jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), start))


@pytest.fixture
def write(adapters: Any, tmp_path: Path) -> Write:
    """Returns a function (config keys) -> adapter folder; keys set to `...` are left out."""

    def write(**changes: Any) -> Path:
        config = {**peft_config(LORA, SITES, "org/base", None), **changes}
        text = json.dumps({key: value for key, value in config.items() if value is not ...})
        (tmp_path / CONFIG_NAME).write_text(text, encoding="utf-8")
        save_file(peft_tensors(LORA, adapters), tmp_path / WEIGHTS_NAME)
        return tmp_path

    return write


def one_device(lora: Lora) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: one, abstract_adapters(lora, np.float32))


def test_a_folder_comes_back_as_it_was_written(write: Write, adapters: Any) -> None:
    folder = write(lora_dropout=0.05, inference_mode=False, megatron_core="megatron.core", loftq_config={})
    assert is_adapter_folder(folder)
    assert base_of(folder) == ("org/base", None)
    found = read_adapter(folder, SITES)
    assert found.lora == LORA
    assert found.targets == ("down_proj", "q_proj")
    back = load_adapters(found, one_device(LORA), np.dtype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    tensors = load_file(folder / WEIGHTS_NAME)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert {kind: tensors[f"{name}{kind}.weight"].shape for kind in "AB"} == {"A": (2, 64), "B": (64, 2)}
    narrow = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()}
    save_file(narrow, folder / WEIGHTS_NAME)
    wide = load_adapters(read_adapter(folder, SITES), one_device(LORA), np.dtype(np.float32))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changes the base weights"),
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS', expected 'CAUSAL_LM'"),
        ({"some_new_feature": 3}, "some_new_feature 3"),
        ({"r": ...}, "no r"),
        ({"target_modules": 7}, "target_modules 7, expected names or one expression"),
        ({"r": 3}, r"q_proj.lora_A has shape \(2, 64\), expected \(3, 64\)"),
    ],
)
def test_unsupported_features_are_refused_by_name(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_adapter(write(**changes), SITES)


def rename(folder: Path, names: Callable[[str], str | None]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    renamed = {new: values for name, values in tensors.items() if (new := names(name)) is not None}
    save_file(renamed, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (lambda name: name.replace("lora_A.weight", "lora_embedding_A"), "tensors other than lora_A and lora_B"),
        (
            lambda name: name.replace("q_proj", "qkv_proj"),
            r"layers\.1\.self_attn\.qkv_proj; in this model",
        ),
        (
            lambda name: None if "layers.1.self_attn" in name else name,
            "not in .*layers.1.self_attn.q_proj",
        ),
        (lambda name: None if name.endswith("1.mlp.down_proj.lora_B.weight") else name, "down_proj.lora_B is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(write: Write, names: Any, message: str) -> None:
    folder = write()
    rename(folder, names)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder, SITES)


def test_damaged_folders_are_refused(write: Write) -> None:
    folder = write(base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"does not name its base model .* set model_name_or_path"):
        base_of(folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"down_proj.lora_B.weight in .* holds NaN or Inf"):
        load_adapters(read_adapter(folder, SITES), one_device(LORA), np.dtype(np.float32))
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[:-4])
    with pytest.raises(ValueError, match="is truncated"):
        read_adapter(folder, SITES)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder, SITES)
    (folder / CONFIG_NAME).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_adapter(folder, SITES)


def test_projections_that_share_a_module_share_its_a() -> None:
    model = Transformer(small_llama(family="phi3"))
    sites = find_sites(model)
    lora = Lora(r=2, alpha=2.0, use_rslora=False, sites=choose_sites(sites, ["qkv_proj"]))
    adapters = init_adapters(lora, jax.random.key(0), jnp.float32)
    of_attention = adapters["stack"]["layer_0"]["attention"]
    assert {name: set(leaves) for name, leaves in of_attention.items()} == {
        "query": {"a", "b"},
        "key": {"b"},
        "value": {"b"},
    }
    filled = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapters)
    tensors = peft_tensors(lora, jax.device_get(filled))
    assert len(tensors) == 2 * 2
    b = tensors["base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"]
    parts = (filled["stack"]["layer_0"]["attention"][name]["b"][1] for name in ("query", "key", "value"))
    np.testing.assert_array_equal(b, np.concatenate([np.asarray(part).reshape(2, -1).T for part in parts]))


def test_target_names_distinguish_modules_of_one_name() -> None:
    sites = find_sites(Transformer(small_llama(family="gpt2", num_kv_heads=4, gated_mlp=False)))
    both, one = (
        Lora(r=1, alpha=1.0, use_rslora=False, sites=choose_sites(sites, targets))
        for targets in (["c_proj"], ["attn.c_proj"])
    )
    assert len(both.sites) == 2 * len(one.sites)
    assert target_names(both, sites) == ["c_proj"]
    assert target_names(one, sites) == ["attn.c_proj"]
    assert peft_config(one, sites, "base", None)["fan_in_fan_out"] is True


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_model_with_an_adapters_config_next_to_it_is_a_model(write: Write, name: str) -> None:
    folder = write()
    (folder / name).write_bytes(b"{}")
    assert not is_adapter_folder(folder)


def test_an_adapter_that_is_not_finite_is_not_exported(adapters: Any, tmp_path: Path) -> None:
    adapters = jax.tree.map(np.array, adapters)
    adapters["stack"]["layer_0"]["mlp"]["down"]["b"][0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"down_proj\.lora_B\.weight holds NaN or Inf"):
        export_adapter(
            jax.device_put(adapters),
            LORA,
            tmp_path / "out",
            sites=SITES,
            base_name="b",
            base_revision=None,
            tokenizer=None,
        )
    assert not (tmp_path / "out").exists()
