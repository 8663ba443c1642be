"""Writes the README.md of an exported model: what it is, how to use it, how training went, on what, and the recipe."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.reports.cards.card_data import data_section
from jdpo.reports.cards.card_results import results_section
from jdpo.reports.cards.card_usage import CODE_ENDS, usage_section
from jdpo.reports.findings import Finding
from jdpo.safe_text import markdown, markdown_code

__all__ = ["CODE_ENDS", "CardFacts", "model_card"]

METHODS = {
    "dpo": (
        "Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) on pairs of a chosen "
        "and a rejected response"
    ),
    "sft": "supervised fine-tuning on completions",
}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The content of a model card.

    Attributes:
      command: "sft" or "dpo".
      config: the resolved config.
      config_yaml: the same as text, with the characters of `CODE_ENDS` escaped.
      version: version of jdpo.
      base: the model that training started from; for an adapter, the model that it belongs to.
      is_adapter: the folder holds a PEFT adapter instead of a model.
      dequantized: the base has weights in MXFP4, which were dequantized.
      has_chat_template: the tokenizer has one.
      rows: summary of the training rows in lines, for a run without `data`.
      data: content of data.json.
      hub_datasets: names of the datasets of the hub that it was trained on.
      results: name -> value of the last training and evaluation lines.
      verdict, findings: see `jdpo.reports.findings`.
    """

    command: str
    config: Mapping[str, Any]
    config_yaml: str
    version: str
    base: str
    is_adapter: bool = False
    dequantized: bool = False
    has_chat_template: bool = False
    rows: str = ""
    data: Mapping[str, Any] | None = None
    hub_datasets: Sequence[str] = ()
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verdict: Sequence[str] = ()
    findings: Sequence[Finding] = ()


def model_card(facts: CardFacts) -> str:
    """Returns the card as Markdown with the metadata block that model hubs read; foreign text in it is no markup."""
    method = METHODS[facts.command] + (", with LoRA adapters" if _uses_lora(facts) else "")
    sections = [
        _metadata(facts),
        [f"# {markdown(facts.base.rstrip('/').split('/')[-1])}, {facts.command.upper()}"],
        [f"Trained from {markdown_code(facts.base)} with jdpo {facts.version}: {method}.", *_dequantized(facts)],
        usage_section(facts.config, base=facts.base, is_adapter=facts.is_adapter, chats=facts.has_chat_template),
        _training_section(facts.verdict, facts.findings),
        results_section(facts.results, command=facts.command),
        data_section(facts.data, facts.rows),
        _recipe(facts),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _dequantized(facts: CardFacts) -> list[str]:
    if not facts.dequantized:
        return []
    # MXFP4 is read as bfloat16, so that is what "source" exports.
    dtype = facts.config["export_dtype"].replace("source", "bfloat16")
    own = (
        "the adapter was trained next to the result"
        if facts.is_adapter
        else f"this one has them in {dtype}, and no quantization_config"
    )
    return [f"The experts of that model are in MXFP4. They were dequantized: {own}."]


def _uses_lora(facts: CardFacts) -> bool:
    return bool(facts.config.get("lora")) or facts.is_adapter


def _metadata(facts: CardFacts) -> list[str]:
    """Returns the block between `---` lines, as YAML whose texts are all quoted."""
    tags = ["jdpo", facts.command] + (["lora"] if _uses_lora(facts) else [])
    lines = ["---", f"library_name: {'peft' if facts.is_adapter else 'transformers'}", "pipeline_tag: text-generation"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if _is_hub_name(facts.base):
        # The words of the hub: without them it guesses the relation from the files.
        relation = "adapter" if facts.is_adapter else "finetune"
        lines += [f"base_model: {json.dumps(facts.base)}", f"base_model_relation: {relation}"]
    datasets = [name for name in dict.fromkeys(facts.hub_datasets) if _HUB_NAME.fullmatch(name)]
    lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)] if datasets else []
    return [*lines, "---"]


def _is_hub_name(base: str) -> bool:
    """Returns True for a name like `owner/name` or `gpt2` that is not a local folder."""
    # A local folder has a name of the same form; as `base_model` it would link to a stranger's model.
    return _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def _training_section(verdict: Iterable[str], findings: Iterable[Finding]) -> list[str]:
    summary = " ".join(markdown(sentence) for sentence in verdict)
    found = [
        f"- **{finding.level.capitalize()}: {markdown(finding.title)}.** {markdown(finding.evidence)} "
        f"{markdown(finding.advice)}"
        for finding in findings
    ]
    lines = [summary, *([""] if summary and found else []), *found]
    return ["## How training went", "", *lines] if summary or found else []


def _recipe(facts: CardFacts) -> list[str]:
    return [
        "## Recipe",
        "",
        "<details>",
        f"<summary>All settings, for <code>jdpo {facts.command}</code></summary>",
        "",
        "```yaml",
        facts.config_yaml.strip(),
        "```",
        "",
        "</details>",
    ]
