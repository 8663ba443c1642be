"""Every key of every family's config class is read, listed as one that changes nothing, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jdpo.models.families import FAMILIES, read_model_config
from jdpo.models.families.config_keys import CHANGE_NOTHING, MEAN_NOTHING, OF_FAMILY
from jdpo.models.families.hf_config import _hf_config
from jdpo.models.families.recorded_config import RecordedConfig, changes_nothing
from tests.golden_models import GOLDEN_MODELS as GOLDEN


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


FOLDERS = {config_of(name)["model_type"]: name for name in sorted(path.name for path in GOLDEN.iterdir())}
"""A golden folder of each family."""


def write(folder: Path, family: str, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config_of(FOLDERS[family]), **settings}))
    return folder


def all_keys(hf_config: Any) -> dict[str, Any]:
    """Returns a file that sets every key of a class, and of those of its parts."""
    parts = {key: getattr(hf_config, key) for key in vars(type(hf_config)())}
    return {key: all_keys(part) if hasattr(part, "attribute_map") else None for key, part in parts.items()}


def unread_fields(recorded: RecordedConfig) -> Iterator[tuple[str, str, Any]]:
    """Yields family, key and value for each key of a class, or of that of a part, that the reader does not ask for."""
    for key, value in recorded.unread().items():
        if key in recorded.known_keys:
            yield recorded.model_type, key, value
    for part in recorded.parts():
        if isinstance(part, RecordedConfig):
            yield from unread_fields(part)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_of_the_class_is_read_or_listed_or_off(family: str) -> None:
    """Fails with a version of transformers that adds a key: look up what it does, then read, list or refuse it."""
    hf_config = _hf_config(GOLDEN / FOLDERS[family])
    recorded = RecordedConfig(hf_config, all_keys(hf_config))
    FAMILIES[family].read(recorded)
    unread = list(unread_fields(recorded))
    assert [field for field in unread if not changes_nothing(*field)] == []
    # Those that are neither read nor listed are off, and refused with another value.
    for own, key, _ in unread:
        is_listed = key in CHANGE_NOTHING or key in OF_FAMILY.get(own, {})
        assert is_listed or not changes_nothing(own, key, "another value"), (own, key)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("apertus", "qk_norm", False),
        ("cohere2", "position_embedding_type", "alibi"),
        ("cohere2", "use_parallel_block", False),
        ("llama", "alibi", True),
        ("llama", "clip_qkv", 8.0),
        ("llama", "embedding_multiplier", 12.0),
        ("llama", "parallel_residual_blocks", [1]),
        ("mistral", "attention_bias", True),
        ("mixtral", "norm_topk_prob", False),
        ("olmo3", "logits_scaling", 0.0),
        ("qwen3", "use_qk_norm", False),
        ("seed_oss", "sliding_window", 4096),
        ("starcoder2", "norm_type", "rms_norm"),
    ],
)
def test_a_key_that_nobody_reads_is_refused_by_name(tmp_path: Path, family: str, key: str, value: Any) -> None:
    read_model_config(write(tmp_path, family))
    with pytest.raises(ValueError, match=f"{key}: ") as error:
        read_model_config(write(tmp_path, family, **{key: value}))
    assert repr(value) in str(error.value)


def test_keys_that_mean_nothing_are_accepted(tmp_path: Path) -> None:
    of_family = {"is_llama_config": True, "rope_interleaved": False}
    off = {"alibi": False, "clip_qkv": None, "layers_without_norm": [], "attention_multiplier": None}
    about = {"unsloth_version": "2026.1", "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16"}
    plain = read_model_config(write(tmp_path, "llama"))
    assert read_model_config(write(tmp_path, "llama", **of_family, **off, **about, logit_scale=1.0)) == plain
    read_model_config(write(tmp_path, "mixtral", norm_topk_prob=True))  # what Mixtral always does


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "default", "factor": 8.0}, "factor of rope_parameters: 8.0"),
        ({"rope_type": "default", "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta of rope_parameters: 0.1"),
        ({"rope_type": "linear", "factor": 8.0, "attention_factor": 1.2}, "attention_factor of rope_parameters: 1.2"),
    ],
)
def test_a_setting_that_the_type_of_rope_lacks_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_config(write(tmp_path, "llama", rope_parameters={"rope_theta": 1e4, **settings}))
    half = {"full_attention": {"rope_theta": 1e4, **settings}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(ValueError, match=message):
        read_model_config(write(tmp_path, "olmo3", rope_parameters=half))


def test_no_reader_asks_for_a_key_that_changes_nothing() -> None:
    for family, name in FOLDERS.items():
        recorded = RecordedConfig(_hf_config(GOLDEN / name), config_of(name))
        FAMILIES[family].read(recorded)
        # gpt_oss computes the router's loss only if its logits are returned.
        assert CHANGE_NOTHING & recorded.read_keys <= {"output_router_logits"}, family
    assert not CHANGE_NOTHING & set(MEAN_NOTHING)
