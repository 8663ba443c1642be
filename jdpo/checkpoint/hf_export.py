"""Exports params as a Hugging Face model folder that transformers, vLLM and others load directly."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.checkpoint.export_plan import ExportDtype, ShardFile, plan_export, plan_shards
from jdpo.checkpoint.output_folders import write_folder
from jdpo.checkpoint.shard_files import write_shards
from jdpo.checkpoint.tokenizer_export import write_tokenizer
from jdpo.json_files import read_json, write_json
from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params
from jdpo.processes import run_jointly

_PROCESSORS = "*processor_config.json"  # preprocessor_config.json and video_preprocessor_config.json among them
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export_model(
    params: Params,
    config: ModelConfig,
    out: Path,
    *,
    source_folder: Path,
    tokenizer: Any,
    tokenizer_folder: Path | None = None,
    end_token_ids: Sequence[int],
    export_dtype: ExportDtype = "source",
    max_shard_size: str = "5GB",
    model_card: str | None = None,
    kept: Sequence[Path] = (),
) -> None:
    """Writes `out`: safetensors, config.json, tokenizer with chat template, generation_config.json, README.md.

    Of a multimodal model `out` is the whole: tensors other than the text part's, and settings of its processor, are
    copied from source_folder as they are.

    The folder appears as a whole or not at all: it is written next to `out` and renamed; an older export is replaced.
    Every process must call this, on a shared file system: the processes take turns with the weight files, and process 0
    writes the rest. If one process fails, all raise and `out` is unchanged.

    Args:
      out: the folder to write.
      source_folder: the model that training started from; its config.json and generation_config.json are carried over.
      tokenizer: a transformers PreTrainedTokenizerBase with its chat_template set.
      tokenizer_folder: the folder that the tokenizer was loaded from, see `write_tokenizer`.
      end_token_ids: tokens that end a completion in addition to the tokenizer's EOS: the chat template's end of turn.
      export_dtype: "source" gives each tensor its dtype in source_folder, and a new tensor the most common dtype there.
        Carried tensors keep theirs.
      max_shard_size: files are split at this size, e.g. "5GB" (decimal units).
      model_card: the text of README.md; None writes no README.md.
      kept: folders besides source_folder that `out` must not touch, such as checkpoints.

    Raises:
      ValueError: export_dtype or max_shard_size is unknown, the tokenizer is larger than the embedding, a value does
        not fit its dtype, `out` is not an export of jdpo, or `out` touches a folder in `kept`.
    """
    plan = run_jointly(lambda: plan_export(config, source_folder, export_dtype))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the embedding only {config.vocab_size} rows")
    shards = plan_shards(plan.tensors, parse_size(max_shard_size))

    def write_weights(staging: Path) -> None:
        write_shards(params, config, plan, shards, staging)

    def write_the_rest(staging: Path) -> None:
        _check_arrived(staging, shards)
        _write_configs(config, source_folder, staging, tokenizer, end_token_ids, plan.main_dtype)
        write_tokenizer(staging, tokenizer, tokenizer_folder)
        # How a multimodal model takes images; of a model of text alone there are none.
        for path in source_folder.glob(_PROCESSORS):
            shutil.copyfile(path, staging / path.name)
        if model_card is not None:
            (staging / "README.md").write_text(model_card, encoding="utf-8")

    write_folder(out, by_all=write_weights, by_first=write_the_rest, kept=(source_folder, *kept))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Returns generation_config.json of a model folder, or {} if there is none; an export carries it over.

    Raises:
      ValueError: the file is not a JSON object.
    """
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def parse_size(text: str) -> int:
    """Returns the number of bytes of a size such as "5GB".

    >>> parse_size("1.5MB")
    1500000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ValueError(f"max_shard_size: expected a size such as 5GB or 500MB, found {text!r}")
    return size


def _check_arrived(staging: Path, shards: Sequence[ShardFile]) -> None:
    missing = [shard.name for shard in shards if not (staging / shard.name).is_file()]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: written by other processes, but not visible in {staging}; "
            "the folder must be on a file system that all processes share"
        )


def _write_configs(
    config: ModelConfig,
    source_folder: Path,
    staging: Path,
    tokenizer: Any,
    end_token_ids: Sequence[int],
    main_dtype: np.dtype,
) -> None:
    generation_json = read_generation_config(source_folder)
    model_json = read_json(source_folder / "config.json")
    # Weights that were quantized have been dequantized, and transformers would look for the others.
    model_json.pop("quantization_config", None)
    # A multimodal model keeps the settings of its text part one level down.
    text_json = model_json["text_config"] if isinstance(model_json.get("text_config"), dict) else model_json
    # Merged and converted models often have no generation_config.json.
    places = (generation_json, model_json, text_json)
    own = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), None)
    ends = [tokenizer.eos_token_id, *map(int, end_token_ids), *(own if isinstance(own, list) else [own])]
    eos_ids = [id for id in dict.fromkeys(ends) if id is not None]
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    special = {key: value for key, value in special.items() if value is not None}
    # transformers 5 writes `dtype`, older ones `torch_dtype`, which is all that some loaders know.
    dtype_key = "torch_dtype" if "torch_dtype" in model_json and "dtype" not in model_json else "dtype"
    # A bare number of EOS where possible, which every loader of config.json reads.
    ends_json = {"eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids} if eos_ids else {}
    settings = {**special, **ends_json, dtype_key: main_dtype.name}
    # A level that has a setting must not keep an older value.
    text_json |= {key: value for key, value in settings.items() if key in text_json}
    model_json |= settings
    # The vocabulary may have grown by the tokens of a chat template.
    text_json["vocab_size"] = config.vocab_size
    if "vocab_size" in model_json:  # transformers 4 wrote some settings at both levels
        model_json["vocab_size"] = config.vocab_size
    generation_json |= special | ({"eos_token_id": eos_ids} if eos_ids else {})
    write_json(staging / "config.json", model_json)
    write_json(staging / "generation_config.json", generation_json)
