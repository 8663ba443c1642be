"""Names of a text model inside a multimodal one."""

from __future__ import annotations

from jdpo.models.families.layouts.tensor_rules import Layout, Rule, Spelling

_PREFIX = "model.language_model."

_SPELLINGS = (
    # Gemma 3 and Mistral Small 3.1 as published, and as save_pretrained writes them.
    Spelling("language_model.model.", "language_model.lm_head.weight"),
    # Qwen2.5-VL, which has its vision tower next to a plain text model.
    Spelling("model.", "lm_head.weight"),
)


def in_tower(layout: Layout) -> Layout:
    """Returns the layout of a text model as the part of a multimodal one, whose other tensors are carried.

    The names are those of the modules of transformers' classes, which adapters refer to as well.
    """

    def renamed(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(rule._replace(hf_name=_PREFIX + rule.hf_name.removeprefix(layout.prefix)) for rule in rules)

    return layout._replace(
        prefix=_PREFIX,
        embedding=renamed((layout.embedding,))[0],
        first=renamed(layout.first),
        last=renamed(layout.last),
        layer=renamed(layout.layer),
        forms=tuple(form._replace(rules=renamed(form.rules)) for form in layout.forms),
        spellings=_SPELLINGS,
        carried=("",),
    )
