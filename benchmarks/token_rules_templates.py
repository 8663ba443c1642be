"""The chat templates that token_rules.py checks, with the variables that switch thinking on and off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "tests" / "data" / "templates"

SWITCHES: dict[str, Sequence[dict[str, Any]]] = {
    "apertus": [{"enable_thinking": True}],
    "cohere2_reasoning": [{"reasoning": False}],
    "gpt_oss": [{"reasoning_effort": "high"}],
    "qwen3_5": [{"enable_thinking": False}],
    "qwen3_reasoning": [{"enable_thinking": False}],
    "seed_oss": [{"thinking_budget": 0}, {"thinking_budget": 512}],
    "smollm3": [{"enable_thinking": False}],
}
"""Variables with which a template is checked once more, as `chat_template_kwargs` gives them."""


def templates_of(names: Sequence[str] | None) -> list[Path]:
    """The templates to check: the built-in one and those of the tests.

    Raises:
      ValueError: a name is not one of them.
    """
    every = [ROOT / "jdpo" / "data" / "templates" / "chatml.jinja", *sorted(TEMPLATES.glob("*.jinja"))]
    unknown = set(names or ()) - {path.stem for path in every}
    if unknown:
        raise ValueError(f"no templates named {', '.join(sorted(unknown))}")
    return [path for path in every if not names or path.stem in names]


def with_switches(template: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the names under which a template is checked, with its variables."""
    yield template.stem, {}
    for kwargs in SWITCHES.get(template.stem, ()):
        yield f"{template.stem} {' '.join(f'{key}={value}' for key, value in kwargs.items())}", kwargs
