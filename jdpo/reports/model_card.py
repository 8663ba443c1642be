"""The README.md of an exported model: what it came from, how it was made, what was measured."""

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


_LOADING = """A LoRA adapter, to be loaded onto that model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "THIS_FOLDER")
```

"""


CODE_ENDS = "<`"
"""Characters that could end a block of code, or begin HTML in viewers that look for it there too."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _is_hub_name(base: str) -> bool:
    """Whether that is `owner/name`, or `gpt2`, and no folder here."""
    return _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def _python_string(text: str) -> str:
    """A literal of Python, in double quotes.

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
    """Markdown with the metadata block that model hubs read.

    Args:
      command: "sft" or "dpo".
      config: the resolved config.
      results: name -> value of the last training and evaluation lines.
      rows: what the data report said of the training rows.
      version: of jdpo.
      config_yaml: the resolved config as text, with what is in `CODE_ENDS` escaped.
      base: the model that it came from; for an adapter, that it belongs on.
      is_adapter: whether the folder holds a PEFT adapter, and not a model.
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
            f"Made from {markdown_code(base)} with jdpo {version}: {METHODS[command]}.",
            "",
            *(_LOADING.format(base=_python_string(base)).splitlines() if is_adapter else ()),
            "## Data",
            "",
            *(" " * (len(line) - len(line.lstrip())) + markdown(line.strip()) for line in rows.strip().split("\n")),
            "",
            "## Results",
            "",
            "| metric | value |",
            "|---|---|",
            figures,
            "",
            "Rewards are measured against the model that training started from; they say how far the model moved,",
            "not how good its answers are. Read some answers before you rely on it.",
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
