"""The section of a model card that shows how to load the model and ask it something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdpo.safe_text import escaped

CODE_ENDS = "<`"
"""Characters that could end a code block, or start HTML in viewers that interpret it there."""

_LOAD_MODEL = """from transformers import pipeline

generate = pipeline("text-generation", model={model}, dtype="auto")
"""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base = AutoModelForCausalLM.from_pretrained({base}, {revision}dtype="auto")
model = PeftModel.from_pretrained(base, {model})
tokenizer = AutoTokenizer.from_pretrained({model})
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
"""

_CHAT = """messages = [{"role": "user", "content": "What is the capital of Ireland?"}]
answer = generate(messages, max_new_tokens=200)[0]["generated_text"][-1]
print(answer["content"])
"""

_CONTINUE = """print(generate("The capital of Ireland is", max_new_tokens=50)[0]["generated_text"])
"""


def usage_section(config: Mapping[str, Any], *, base: str, is_adapter: bool, chats: bool) -> list[str]:
    """Returns the lines of the section.

    Args:
      config: the resolved config.
      base: the model that an adapter belongs to.
      chats: the tokenizer has a chat template.
    """
    pushed = config.get("push_to_hub")
    model = python_string(pushed) if pushed else '"."'
    if is_adapter:
        revision = config.get("model_revision")
        at = f"revision={python_string(revision)}, " if revision else ""
        code = _LOAD_ADAPTER.format(base=python_string(base), revision=at, model=model)
    else:
        code = _LOAD_MODEL.format(model=model)
    code += _CHAT if chats else _CONTINUE
    what = "This is a LoRA adapter, which is loaded onto its base model" if is_adapter else "Load it with transformers"
    where = "" if pushed else ' (`"."` stands for this folder)'
    return ["## Use", "", f"{what}{where}:", "", "```python", *code.rstrip().split("\n"), "```"]


def python_string(text: str) -> str:
    r"""Returns a Python string literal in double quotes that cannot end a code block.

    >>> print(python_string('a"b`c'), python_string("org/name"))
    "a\x22b\x60c" "org/name"
    """
    shown = (one if one.isprintable() and one not in f'"\\{CODE_ENDS}' else escaped(one) for one in text)
    return f'"{"".join(shown)}"'
