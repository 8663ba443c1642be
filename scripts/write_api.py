"""Writes docs/api.md, the page of the public API, from the signatures and docstrings in the code.

python scripts/write_api.py            # after a public name or its docstring was changed
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jdpo
from jdpo.config.keys import CONFIGS
from jdpo.config.value_types import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"

INTRODUCTION = """\
# Public API

After reading this page you can call jdpo from your own Python code: start runs, ask models, and use its losses in other
trainers.

What this page describes is public: the names in `jdpo.__all__` and `jdpo.losses.__all__`. Public are also the keys of
the configs, the commands with their options and exit codes, and the files of a run. Everything else, in whichever
module and with or without an underscore, is private and may change in any version.

This page is written by `scripts/write_api.py` from the code; a test compares the two.
"""

SECTIONS = {
    "Runs": ("train", "RunResult", "Callback", "RunView", "load_config", "DPOConfig", "SFTConfig"),
    "Groups of keys": ("DatasetConfig", "LoraConfig", "MeshConfig", "OptimizerConfig"),
    "Looking at rows": ("inspect", "Inspection"),
    "Asking a model": ("load", "LoadedModel", "Answer", "TokenLogps", "NextToken"),
    "Models to try things out": ("random_model",),
    "Trackers": ("Tracker", "TrackedRun"),
    "Losses on batches": ("dpo_loss", "make_dpo_loss", "PreferenceBatch"),
    "Packed batches": (
        "tokenize_pairs",
        "TokenizedPairs",
        "pack",
        "packed_attention",
        "unpack_logps",
        "PackedBatch",
    ),
}
"""Heading -> the names of `jdpo` under it."""

METHODS = {
    "LoadedModel": ("generate", "stream", "logps", "next_tokens"),
    "Tracker": ("newest_step", "log", "log_samples", "log_report", "finish"),
    "Callback": ("on_start", "on_step", "on_log", "on_evaluate", "on_end"),
    "RunView": ("stop", "sample"),
    "Inspection": ("save",),
}
"""Class -> its public methods."""


def page() -> str:
    """Returns the text of docs/api.md."""
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry("jdpo", name, getattr(jdpo, name)) for name in names]
    parts.append(
        "## jdpo.losses\n\nPure functions on log-probabilities and logits; they import jax, numpy and einops alone.\n"
    )
    for name in jdpo.losses.__all__:
        if name in jdpo.__all__:
            parts.append(f"### `jdpo.losses.{name}`\n\nThe same as `jdpo.{name}`.\n")
        else:
            parts.append(entry("jdpo.losses", name, getattr(jdpo.losses, name)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def entry(module: str, name: str, value: Any) -> str:
    """Returns the heading, signature and description of a name."""
    heading = f"### `{module}.{name}`\n"
    if isinstance(value, dict):
        return f"{heading}\nMaps the name of each loss ([list](losses.md#what-each-one-is)) to its `LossSpec`.\n"
    if isinstance(value, type) and issubclass(value, Settings):
        first, _, _ = (value.__doc__ or "").partition("\n")
        anchor = next((f"jdpo-{command}" for command, cls in CONFIGS.items() if cls is value), name.lower())
        return f"{heading}\n{first} [All keys](keys.md#{anchor}).\n"
    methods = [entry(f"{module}.{name}", one, getattr(value, one)) for one in METHODS.get(name, ())]
    shown = f"{heading}\n```python\n{signature(name, value)}\n```\n\n{prose(inspect.getdoc(value) or '')}"
    return "\n".join([shown, *methods])


def signature(name: str, value: Any) -> str:
    """Returns a signature with one parameter on each line; of a named tuple or dataclass, its fields.

    >>> def double(number: int, *, quickly: bool = True) -> int: ...
    >>> print(signature("double", double))
    def double(
        number: int,
        *,
        quickly: bool = True,
    ) -> int: ...
    """
    if isinstance(value, type):
        hints = inspect.get_annotations(value)
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [*hints]
        return "\n".join([f"class {name}:", *(f"    {field}: {_hint(hints[field])}" for field in fields)])
    found = inspect.signature(value)
    lines = []
    keyword_only = False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("    *,")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        lines.append(f"    {stars}{parameter.name}: {_hint(parameter.annotation)}{default},")
    returned = f" -> {_hint(found.return_annotation)}"
    return "\n".join([f"def {name}(", *lines, f"){returned}: ..."]) if lines else f"def {name}(){returned}: ..."


def _hint(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)
    text = text if isinstance(text, str) else inspect.formatannotation(text)
    return text.strip("'").replace("'", '"')


def _default(value: Any) -> str:
    return (
        f"{value.__name__}"
        if callable(value) and value.__name__ != "<lambda>"
        else "..."
        if callable(value)
        else repr(value).replace("'", '"')
    )


def prose(docstring: str) -> str:
    """Returns a docstring as Markdown: its sections as lists, its examples as code.

    >>> print(prose("Doubles.\\n\\nArgs:\\n  number: what to\\n    double."))
    Doubles.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `number`: what to double.
    <BLANKLINE>
    <BLANKLINE>
    """
    return "\n".join(_markdown(docstring.split("\n\n"))) + "\n"


def _markdown(blocks: list[str]) -> Iterator[str]:
    for block in blocks:
        first, _, rest = block.partition("\n")
        if first == "Returns:":
            yield f"**Returns** {' '.join(line.strip() for line in rest.split(chr(10)))}"
        elif re.fullmatch(r"(Args|Raises|Attributes):", first):
            yield f"**{first.rstrip(':')}**\n"
            yield from (f"- {item}" for item in _items(rest))
        elif first.startswith(">>>"):
            yield f"```python\n{block}\n```"
        elif first.startswith("  "):
            yield f"```text\n{block}\n```"
        else:
            yield block
        yield ""


def _items(text: str) -> Iterator[str]:
    """Yields the entries of a section, each on one line; deeper lines continue one."""
    items: list[str] = []
    for line in text.split("\n"):
        if line.startswith("   ") and items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    for item in items:
        names, colon, shown = item.partition(": ")
        named = colon and re.fullmatch(r"[\w*]+(, [\w*]+)*", names)
        yield f"{', '.join(f'`{name}`' for name in names.split(', '))}: {shown}" if named else item


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
