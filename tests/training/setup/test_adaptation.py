"""The `lora` settings before training starts: how they are resolved, and which are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

from jdpo.config import LORA_DEFAULTS, DPOConfig, LoraConfig, changed_keys, differences, load_config, to_dict
from jdpo.config.resuming import EXPORT_KEYS
from jdpo.models.families import read_model_config
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jdpo.models.lora.adapters import Lora, init_adapters
from jdpo.models.lora.peft_folder import peft_config, peft_tensors
from jdpo.models.lora.targets import choose_sites, find_sites
from jdpo.models.transformer import Transformer
from jdpo.training.reference.cache_entries import weights_of_reference
from jdpo.training.setup.numerics import resolve_dtype
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.setup.weight_placement import abstract_frozen, load_reference

Words = Callable[..., list[str]]
REQUIRED = ["model_name_or_path=m", "output_dir=o", "datasets=d"]


def config_of(*words: str) -> DPOConfig:
    return load_config(DPOConfig, None, [*REQUIRED, *words])


@pytest.fixture
def build_with(run_words: Words) -> Callable[..., Setup]:
    """Returns a function (overrides) -> the Setup of a run, which does not load weights."""

    def made(**overrides: Any) -> Setup:
        config = load_config(DPOConfig, None, run_words(**overrides))
        return build(resolve_dtype(config), lambda text: None)

    return made


def test_the_group_is_read_as_it_is_written() -> None:
    assert config_of().lora is None
    assert config_of("lora=false").lora is False
    assert config_of("lora=true").lora == config_of("lora={}").lora == LoraConfig()
    asked = config_of("--lora.r", "8", "lora.target_modules=[q_proj, v_proj]", "lora.use_rslora=true").lora
    assert asked == LoraConfig(r=8, target_modules=("q_proj", "v_proj"), use_rslora=True)
    assert config_of("lora.target_modules=.*mlp.*").lora == LoraConfig(target_modules=".*mlp.*")


def test_true_turns_the_group_on_and_keeps_its_settings(tmp_path: Path) -> None:
    def read(text: str, *words: str) -> Any:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config(DPOConfig, tmp_path / "run.yaml", [*REQUIRED, *words]).lora

    for off_or_on in ("lora: true", "lora: false", "lora: null"):
        assert read(off_or_on, "--lora.r", "8") == LoraConfig(r=8), "the command line has the last word"
    assert read("lora: {r: 8}", "--lora", "true") == LoraConfig(r=8)
    assert read("", "--lora", "true", "--lora.r", "8") == read("", "--lora.r", "8", "--lora", "true") == LoraConfig(r=8)
    assert read("lora: {r: 8}", "--lora", "false") is False
    with pytest.raises(ValueError, match="not a group of keys but 5"):
        read("lora: 5", "--lora.r", "8")


def test_explicit_defaults_of_adapters_are_no_difference() -> None:
    saved = to_dict(config_of("lora=true"))
    assert differences(saved, config_of("lora.r=16", "lora.alpha=32", "lora.target_modules=all-linear")) == []
    assert differences(saved, config_of("lora.alpha=16"))
    going_on = to_dict(config_of("lora.adapter=a"))
    assert differences(going_on, config_of("lora.adapter=a", "lora.r=2")) == [], "the adapter's own, or refused"
    assert differences(going_on, config_of("lora.adapter=b"))
    assert differences(to_dict(config_of("lora=false")), config_of()) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.dropout=0.1", "dropout 0.1 is not supported"),
        ("lora.r=0", "at least 1"),
        ("lora_alpha=16", "here it is called 'lora.alpha'"),
        ("lora.lora_dropout=0.1", "here it is called 'lora.dropout'"),
        ("lora.base_dtype=int4", "float32, bfloat16 or int8"),
    ],
)
def test_impossible_values_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(word)


def test_a_resumed_run_may_change_its_export() -> None:
    saved = to_dict(config_of("lora.r=4"))
    merged = config_of("lora.r=4", "lora.merge=true")
    assert differences(saved, merged) == []
    assert changed_keys(saved, merged, EXPORT_KEYS) == ["lora.merge"]
    assert differences(saved, config_of("lora.r=8"))[0].startswith("lora: ")
    assert differences(to_dict(config_of()), config_of("lora=true")), "adapters are another run than all weights"
    assert changed_keys(to_dict(config_of()), config_of(), EXPORT_KEYS) == []


def test_defaults_are_logged(build_with: Callable[..., Setup]) -> None:
    adaptation = build_with(lora="true").adaptation
    assert adaptation is not None
    assert (adaptation.lora.r, adaptation.lora.scale, adaptation.targets) == (16, 2.0, LORA_DEFAULTS["target_modules"])
    assert adaptation.base_dtype.name == "float32", "that of computation"
    assert adaptation.describe(120_128) == [
        "lora: 38,912 trained parameters (24.47 %) next to 120,128 frozen ones in float32; r 16, scale 2, on q_proj, "
        "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.target_modules": "[qproj]"}, "no module is called 'qproj'; the modules that can be adapted are q_proj"),
        (
            {"lora": "true", "sync_ref_model": "true"},
            "ref_model_mixup_alpha 0.6 with lora: a mix of two adapters is not an adapter",
        ),
        ({"lora.adapter": "nowhere/at/all"}, "does not exist"),
    ],
)
def test_settings_that_adapters_do_not_support_are_refused(
    build_with: Callable[..., Setup], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_with(**overrides)


def test_a_template_that_adds_tokens_needs_their_rows_trained(
    build_with: Callable[..., Setup], toy_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "new.jinja"
    text = json.loads((toy_model / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    end = re.findall(r"<\|[^|]*\|>", text)[-1]
    template.write_text(text.replace(end, "<|brand_new|>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"chat_template adds tokens \(<\|brand_new\|>\).*embed_tokens"):
        build_with(lora="true", chat_template=template)


def test_an_adapter_names_its_base(build_with: Callable[..., Setup], toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"names '.*gone' as its base: .* and the adapter as lora\.adapter"):
        build_with(model_name_or_path=folder)
    with pytest.raises(ValueError, match=r"is an adapter, and lora\.adapter names another"):
        build_with(model_name_or_path=folder, **{"lora.adapter": folder})
    with pytest.raises(ValueError, match=r"is not a PEFT adapter folder: it has no adapter_config\.json"):
        build_with(**{"lora.adapter": toy_model})


@pytest.fixture
def adapter(toy_model: Path, tmp_path: Path) -> Path:
    """An adapter on the toy model."""
    sites = find_sites(Transformer(read_model_config(toy_model)))
    lora = Lora(r=2, alpha=4.0, use_rslora=False, sites=choose_sites(sites, ["q_proj"]))
    start = init_adapters(lora, jax.random.key(0), jnp.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(peft_tensors(lora, jax.device_get(start)), folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(peft_config(lora, sites, str(toy_model), None)))
    return folder


def test_a_reference_named_as_the_base_is_the_base_without_the_initial_adapter(
    build_with: Callable[..., Setup], toy_model: Path, adapter: Path
) -> None:
    fresh = build_with(lora="true")
    for overrides in ({"lora.adapter": adapter}, {"model_name_or_path": adapter}):
        own = build_with(**overrides)
        assert own.reference_is_start
        named = build_with(**overrides, reference_model=toy_model)
        assert not named.reference_is_start
        assert named.reference_folder is None, "no second copy of the base"
        assert load_reference(named, None) == {} == abstract_frozen(named, live=True, moves=False).reference
        assert weights_of_reference(named) == weights_of_reference(fresh) != weights_of_reference(own)
        again = build_with(**overrides, reference_model=adapter)
        assert again.reference_is_start
        assert weights_of_reference(again) == weights_of_reference(own)
    assert build_with(lora="true", reference_model=toy_model).reference_is_start


@pytest.mark.parametrize("overrides", [{}, {"lora": "true"}])
def test_a_reference_is_no_adapter_but_the_one_that_training_starts_from(
    build_with: Callable[..., Setup], adapter: Path, overrides: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"reference_model .*adapter is an adapter other than the one"):
        build_with(**overrides, reference_model=adapter)


def test_an_adapter_is_recognized_by_its_content(
    build_with: Callable[..., Setup], adapter: Path, tmp_path: Path
) -> None:
    before = build_with(**{"lora.adapter": adapter}).inputs()
    moved = adapter.rename(tmp_path / "moved")
    assert build_with(**{"lora.adapter": moved}).inputs() == before


@pytest.mark.parametrize("targets", [".*(q_proj|lm_head)", ".*(embed_tokens|q_proj)", r".*layers\..*"])
def test_an_expression_that_means_more_than_can_be_adapted_is_refused(
    build_with: Callable[..., Setup], targets: str
) -> None:
    with pytest.raises(
        ValueError, match=r"also matches (lm_head|model\.embed_tokens|model\.layers\.0\..*norm).*; the mod"
    ):
        build_with(**{"lora.target_modules": targets})


def test_an_adapter_cannot_be_trained_whole(build_with: Callable[..., Setup], adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"lora is false, and model_name_or_path .*adapter is an adapter"):
        build_with(model_name_or_path=adapter, lora="false")
