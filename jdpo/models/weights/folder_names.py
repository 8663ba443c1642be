"""The tensors of a folder by the names that they have in the model, and those that belong to other parts of it.

Some models exist under several names: saved without the head, which leaves out the prefix, or as one part of a
multimodal model, in the spelling of its publisher or that of save_pretrained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from jdpo.models.families.layouts import Layout, Spelling
from jdpo.models.model_config import ModelConfig
from jdpo.models.weights.hf_names import layout_of

Entry = TypeVar("Entry")


def by_model_name(entries: Mapping[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """Returns the tensors of a folder by the names of the family's layout; others keep their names."""
    names = model_names(entries, config)
    return {names.get(name, name): entry for name, entry in entries.items()}


def model_names(names: Collection[str], config: ModelConfig) -> dict[str, str]:
    """Returns {name in a folder: name in the family's layout} for those that differ."""
    layout = layout_of(config)
    own = Spelling(layout.prefix, layout.head.hf_name)
    # The last one: a model that was saved without its head leaves out the prefix, as GPT-2 on the hub does.
    for prefix, head in (own, *layout.spellings, own._replace(prefix="")):
        parts = _parts(layout, prefix)
        of_text = {name: layout.prefix + name.removeprefix(prefix) for name in names if name.startswith(parts)}
        if of_text:
            of_text |= {head: own.head} if head in names else {}
            return {name: renamed for name, renamed in of_text.items() if name != renamed}
    return {}


def is_carried(name: str, config: ModelConfig) -> bool:
    """Returns True for a tensor of another part of the model, which an export has as the source does.

    Args:
      name: as `by_model_name` gives it.
    """
    layout = layout_of(config)
    # The prefixes first: most families have none, and a model may have a hundred thousand tensors of experts.
    return name.startswith(layout.carried) and not (
        name == layout.head.hf_name or name.startswith(_parts(layout, layout.prefix))
    )


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Returns True for tensors that are not weights: old checkpoints store rotary frequencies and masks."""
    return name.endswith(layout_of(config).buffers)


def carried(entries: Mapping[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """Returns the tensors of a folder that belong to other parts of the model, by their names in the folder."""
    return {name: entry for name, entry in by_model_name(entries, config).items() if is_carried(name, config)}


def _parts(layout: Layout, prefix: str) -> tuple[str, ...]:
    """Returns what the names of a model's tensors start with, such as "model.embed_tokens." and "model.layers."."""
    rests = (rule.hf_name.removeprefix(layout.prefix) for rule in layout.rules)
    return tuple(dict.fromkeys(prefix + rest.split(".")[0] + "." for rest in rests))
