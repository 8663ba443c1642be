"""Writes the README.md of an exported model: its base model, how it was trained, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdpo.safe_text import escaped, markdown, markdown_code

METHODS = {
    "dpo": (
        "Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) on pairs of a chosen "
        "and a rejected response"
    ),
    "sft": "supervised fine-tuning on completions",
}


_LOADING = """This is a LoRA adapter. Load it onto its base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "THIS_FOLDER")
```

"""


CODE_ENDS = "<`"
"""Characters that could end a code block, or start HTML in viewers that interpret it there."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _is_hub_name(base: str) -> bool:
    """Returns True for a name like `owner/name` or `gpt2` that is not a local folder."""
    # A local folder has a name of the same form; as `base_model` it would link to a stranger's model.
    return _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def _python_string(text: str) -> str:
    """Returns a Python string literal in double quotes.

    >>> print(_python_string('a"b`c'), _python_string("org/name"))
    "a\\x22b\\x60c" "org/name"
    """
    shown = (one if one.isprintable() and one not in f'"\\{CODE_ENDS}' else escaped(one) for one in text)
    return f'"{"".join(shown)}"'


def model_card(
    *,
    command: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    rows: str,
    version: str,
    config_yaml: str,
    base: str,
    is_adapter: bool = False,
) -> str:
    """Returns the card as Markdown with the metadata block that model hubs read.

    Args:
      command: "sft" or "dpo".
      config: the resolved config.
      results: name -> value of the last training and evaluation lines.
      rows: summary of the training rows.
      version: version of jdpo.
      config_yaml: the resolved config as text, with the characters of `CODE_ENDS` escaped.
      base: the model that training started from; for an adapter, the model that it belongs to.
      is_adapter: the folder holds a PEFT adapter instead of a model.
    """
    figures = "\n".join(
        f"| {markdown(name)} | {value:.4g} |" for name, value in results.items() if isinstance(value, int | float)
    )
    library = "peft" if is_adapter else "transformers"
    metadata = ["---", f"library_name: {library}", "tags:", "- jdpo", f"- {command}"]
    metadata += ["- lora"] if config.get("lora") or is_adapter else []
    metadata += [f"base_model: {base}"] if _is_hub_name(base) else []
    return "\n".join(
        [
            *metadata,
            "---",
            "",
            f"# {markdown(base.rstrip('/').split('/')[-1])}, {command.upper()}",
            "",
            f"Trained from {markdown_code(base)} with jdpo {version}: {METHODS[command]}.",
            "",
            *(_LOADING.format(base=_python_string(base)).splitlines() if is_adapter else ()),
            "## Data",
            "",
            # Indentation makes nested lists, so it must survive the escaping.
            *(" " * (len(line) - len(line.lstrip())) + markdown(line.strip()) for line in rows.strip().split("\n")),
            "",
            "## Results",
            "",
            "| metric | value |",
            "|---|---|",
            figures,
            "",
            "Rewards are measured against the model that training started from. They show how far the model has moved,",
            "not how good its answers are; read some answers before you rely on it.",
            "",
            "## Recipe",
            "",
            f"`jdpo {command}` with:",
            "",
            "```yaml",
            config_yaml.strip(),
            "```",
            "",
        ]
    )
