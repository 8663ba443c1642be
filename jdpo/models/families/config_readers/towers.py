"""Reads config.json of multimodal models, as far as their text part is concerned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jdpo.models.families.config_readers.shared import refuse_unsupported
from jdpo.models.families.later_families import missing_from
from jdpo.models.model_config import ModelConfig

Reader = Callable[[Any], ModelConfig]


def reader_of_text(readers: Mapping[str, Reader]) -> Reader:
    """Returns a function that reads the text part of a multimodal model.

    Args:
      readers: {model_type of text_config: function that reads it}.
    """

    def read(hf_config: Any) -> ModelConfig:
        refuse_unsupported(hf_config)
        text = hf_config.text_config
        if text.model_type not in readers:
            raise ValueError(
                f"text_config: model_type {text.model_type!r} is not supported in a model of the family "
                f"{hf_config.model_type}{missing_from(text.model_type)}; supported are {', '.join(readers)}"
            )
        try:
            return dataclasses.replace(readers[text.model_type](text), family=hf_config.model_type)
        except ValueError as error:
            raise ValueError(f"text_config: {error}") from error

    return read


def is_tied(raw: Mapping[str, Any], hf_config: Any) -> bool:
    """Returns True if the output head of a multimodal model is its embedding.

    Both levels of config.json may say so, the upper one with precedence. If neither does, the default is that of the
    text part: the class of Mistral 3 is tied by default, while Mistral Small 3.1 says nothing and is not.

    Args:
      raw: config.json, which tells the settings of a model from defaults.
      hf_config: the same as transformers reads it.
    """
    key, text = "tie_word_embeddings", raw.get("text_config")
    for level in (raw, text):
        if isinstance(level, dict) and isinstance(level.get(key), bool):
            return bool(level[key])
    return bool(getattr(hf_config.text_config, key, hf_config.tie_word_embeddings))
