"""Reads config.json into a `ModelConfig`.

A setting that changes the arithmetic and that the decoder lacks is refused by name: see
`jdpo.models.families.config_readers.shared` for settings that families share, and its neighbours for each family.
Settings that do not change a forward pass are ignored: initializer_range, use_cache, pretraining_tp, output_*,
summary_*, and dropout, which preference training does not use.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.json_files import read_json
from jdpo.models.families.config_readers.towers import is_tied
from jdpo.models.families.later_families import missing_from
from jdpo.models.families.recorded_config import RecordedConfig, refuse_unread
from jdpo.models.families.table import FAMILIES
from jdpo.models.model_config import ModelConfig
from jdpo.quiet_transformers import be_quiet
from jdpo.safe_text import terminal


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json of the old style (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`).

    Raises:
      ValueError: no folder, no config.json, broken JSON, an unsupported family, a setting the decoder lacks, or a
        reward model.
    """
    hf_config = _hf_config(folder)
    if any(str(name).endswith("ForSequenceClassification") for name in hf_config.architectures or []):
        raise ValueError(
            f"{folder}/config.json: architectures {terminal(hf_config.architectures)}: a classifier or reward model, "
            f"which gives no answers; expected *ForCausalLM. A reward model is for `jdpo score --by reward:{folder}`"
        )
    return _model_config(folder, hf_config)


def image_tokens(folder: Path) -> tuple[int, ...]:
    """Returns the tokens in whose place a multimodal model gets an image or a video; none for a model of text alone.

    Raises:
      ValueError: as for `read_model_config`.
    """
    hf_config = _hf_config(folder)
    found = [getattr(hf_config, key, None) for key in ("image_token_id", "video_token_id")]
    return tuple(token for token in found if isinstance(token, int))


class RewardConfig(NamedTuple):
    """The configuration of a reward model.

    Attributes:
      model: the decoder, with a reward head.
      pad_token_id: the reward is that of the last token other than this one; None: of the last token.
    """

    model: ModelConfig
    pad_token_id: int | None


def read_reward_config(folder: Path) -> RewardConfig:
    """Reads `folder`/config.json of a reward model, a `*ForSequenceClassification` with one label.

    Raises:
      ValueError: as for `read_model_config`; or the model has another head, or several labels.
    """
    hf_config = _hf_config(folder)
    architectures = hf_config.architectures or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(
            f"{folder}/config.json: architectures {terminal(architectures)}: not a reward model; expected "
            "*ForSequenceClassification with one label"
        )
    if hf_config.num_labels != 1:
        raise ValueError(
            f"{folder}/config.json: a classifier of {hf_config.num_labels} labels (id2label): not a reward model, "
            "which has one label"
        )
    model = _model_config(folder, hf_config)
    pad = getattr(hf_config, "pad_token_id", None)
    # Scales and caps are those of logits; transformers applies none to the output of this head.
    own = dataclasses.replace(model, reward_head=True, tie_embeddings=False, logit_scale=1.0, logit_softcap=None)
    return RewardConfig(own, pad if isinstance(pad, int) else None)


def _hf_config(folder: Path) -> Any:
    """Returns transformers' config of a folder of one of the families."""
    raw = _read_config(folder)
    # Before transformers reads the file: its classes make lists with an entry per layer.
    for sizes in (raw, raw.get("text_config")):
        _refuse_sizes(sizes if isinstance(sizes, dict) else {}, folder / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder}/config.json: model_type {terminal(repr(family))} is not supported{missing_from(family)}; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    # transformers fills in the defaults that save_pretrained omits, and converts old rope keys to the new form.
    be_quiet()
    from transformers import AutoConfig

    try:
        # If unset, transformers asks for trust_remote_code on the terminal, and "y" runs Python files of the folder.
        found = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise their own types, KeyError and bare TypeError among them
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}/config.json: this model needs Python code of its own (auto_map), which jdpo never runs; "
                f"supported are {', '.join(sorted(FAMILIES))} as transformers has them"
            ) from None
        raise ValueError(f"{folder}/config.json: transformers cannot read it: {error}") from error
    if hasattr(found, "text_config"):
        # A setting of the whole model, which text_config may lack.
        found.text_config.tie_word_embeddings = is_tied(raw, found)
    return found


def _model_config(folder: Path, hf_config: Any) -> ModelConfig:
    recorded = RecordedConfig(hf_config, _read_config(folder))
    try:
        config = FAMILIES[hf_config.model_type].read(recorded)
        refuse_unread(recorded)
        return config
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


MOST_OF = {
    ("num_hidden_layers", "n_layer"): 1_000,
    ("hidden_size", "n_embd", "head_dim"): 2**20,
    ("intermediate_size", "moe_intermediate_size", "n_inner"): 2**22,
    ("num_attention_heads", "num_key_value_heads", "n_head"): 2**16,
    ("num_experts", "num_local_experts", "num_experts_per_tok"): 2**12,
    ("vocab_size",): 2**24,
    ("max_position_embeddings", "n_positions"): 2**31,
}
"""Limits of sizes by their names in config.json: several times those of the largest models."""

MOST_EXPERTS = 2**17
"""Limit of the number of experts in all layers, each of which has tensors of its own."""


def _refuse_sizes(raw: dict[str, Any], path: Path) -> None:
    """Refuses impossible sizes before anything is built from them: a million layers take minutes to list.

    Raises:
      ValueError: a size is above its limit; file, key and size are named.
    """
    for keys, most in MOST_OF.items():
        for key in keys:
            value = raw.get(key)
            if isinstance(value, int | float) and not 0 <= value <= most:
                raise ValueError(f"{path}: {key}: expected 1 to {most:,}, found {value}; the file is damaged")
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) > MOST_OF["num_hidden_layers", "n_layer"]:
        raise ValueError(f"{path}: layer_types: found {len(kinds):,} layers; the file is damaged")
    num_experts = max((raw[key] for key in ("num_experts", "num_local_experts") if _is_int(raw.get(key))), default=0)
    num_layers = max((raw[key] for key in ("num_hidden_layers", "n_layer") if _is_int(raw.get(key))), default=0)
    if num_layers * num_experts > MOST_EXPERTS:
        raise ValueError(
            f"{path}: {num_layers:,} layers of {num_experts:,} experts: expected at most {MOST_EXPERTS:,} experts in "
            "all; the file is damaged"
        )


def _is_int(value: Any) -> bool:
    # In Python True is the integer 1.
    return isinstance(value, int) and not isinstance(value, bool)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist (or is not a folder)")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    return read_json(path)
