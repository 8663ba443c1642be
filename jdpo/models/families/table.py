"""The table of families: for each a function that reads its config.json, and the layout of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.models.families.config_readers import cohere, gemma, gpt, gpt_oss, llama, mixtral, qwen, qwen_next
from jdpo.models.families.config_readers.towers import reader_of_text
from jdpo.models.families.layouts import Layout
from jdpo.models.families.layouts.expert_names import MIXTRAL, QWEN3_MOE
from jdpo.models.families.layouts.gpt_names import GPT2, GPT_NEOX
from jdpo.models.families.layouts.gpt_oss_names import GPT_OSS
from jdpo.models.families.layouts.llama_names import APERTUS, GEMMA2, LLAMA, OLMO2, PHI3, STARCODER2
from jdpo.models.families.layouts.qwen_next_names import QWEN3_5, QWEN3_NEXT
from jdpo.models.families.layouts.tower_names import in_tower
from jdpo.models.model_config import ModelConfig


class Family(NamedTuple):
    """One family of models.

    Attributes:
      read: converts transformers' config of a model. Raises ValueError for settings that the decoder lacks.
      layout: the tensors of its checkpoints.
    """

    read: Callable[[Any], ModelConfig]
    layout: Layout


def tower(**texts: Family) -> Family:
    """Returns the family of multimodal models whose text part is of one of the given families.

    The text part is trained; all other tensors of a folder, such as those of its vision tower, are carried.

    Args:
      texts: {model_type of text_config: its family}; their layouts are equal.
    """
    (layout,) = {id(text.layout): text.layout for text in texts.values()}.values()
    return Family(reader_of_text({name: text.read for name, text in texts.items()}), in_tower(layout))


FAMILIES: dict[str, Family] = {
    "apertus": Family(llama.apertus, APERTUS),
    "cohere2": Family(cohere.cohere2, LLAMA),
    "ernie4_5": Family(llama.ernie4_5, LLAMA),
    "gemma": Family(gemma.gemma, LLAMA),
    "gemma2": Family(gemma.gemma2, GEMMA2),
    "gemma3": tower(gemma3_text=Family(gemma.gemma3_of_images, GEMMA2)),
    "gemma3_text": Family(gemma.gemma3_text, GEMMA2),
    "gpt2": Family(gpt.gpt2, GPT2),
    "gpt_neox": Family(gpt.gpt_neox, GPT_NEOX),
    "gpt_oss": Family(gpt_oss.gpt_oss, GPT_OSS),
    "granite": Family(llama.granite, LLAMA),
    "llama": Family(llama.llama, LLAMA),
    "ministral3": Family(llama.ministral3, LLAMA),
    "mistral": Family(llama.mistral, LLAMA),
    "mistral3": tower(mistral=Family(llama.mistral, LLAMA), ministral3=Family(llama.ministral3, LLAMA)),
    "mixtral": Family(mixtral.mixtral, MIXTRAL),
    "olmo2": Family(llama.olmo2, OLMO2),
    "olmo3": Family(llama.olmo3, OLMO2),
    "phi3": Family(llama.phi3, PHI3),
    "qwen2": Family(qwen.qwen2, LLAMA),
    "qwen2_5_vl": tower(qwen2_5_vl_text=Family(qwen.qwen2, LLAMA)),
    "qwen3": Family(qwen.qwen3, LLAMA),
    "qwen3_5": tower(qwen3_5_text=Family(qwen_next.qwen3_5_text, QWEN3_5)),
    "qwen3_5_moe": tower(qwen3_5_moe_text=Family(qwen_next.qwen3_5_moe_text, QWEN3_5)),
    "qwen3_5_moe_text": Family(qwen_next.qwen3_5_moe_text, QWEN3_5),
    "qwen3_5_text": Family(qwen_next.qwen3_5_text, QWEN3_5),
    "qwen3_moe": Family(qwen.qwen3_moe, QWEN3_MOE),
    "qwen3_next": Family(qwen_next.qwen3_next, QWEN3_NEXT),
    "qwen3_vl": tower(qwen3_vl_text=Family(qwen.qwen3_vl_text, LLAMA)),
    "seed_oss": Family(llama.seed_oss, LLAMA),
    "smollm3": Family(llama.smollm3, LLAMA),
    "starcoder2": Family(gpt.starcoder2, STARCODER2),
}
