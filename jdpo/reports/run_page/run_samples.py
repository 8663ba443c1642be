"""The sampled answers on the page of a run: those to one prompt next to each other, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jdpo.reports.run_page.page_run import PageRun

MOST_PROMPTS, MOST_STEPS, MOST_LETTERS = 20, 10, 2000


class StepAnswer(NamedTuple):
    """An answer, which the model may have given several times in a row.

    Attributes:
      first, last: the steps after which it was given first and last.
      text: cut at MOST_LETTERS.
      is_cut_off: True if it reached the maximum of tokens.
    """

    first: int
    last: int
    text: str
    is_cut_off: bool


class PromptAnswers(NamedTuple):
    """A prompt and its answers: (number of the run, its answers), one for each run that was asked."""

    prompt: str
    of_runs: Sequence[tuple[int, Sequence[StepAnswer]]]


class SamplesShown(NamedTuple):
    """The prompts that are shown, and how many there are."""

    prompts: Sequence[PromptAnswers]
    num_prompts: int


def samples_of(runs: Sequence[PageRun]) -> SamplesShown:
    """Returns the answers to the first prompts: at most MOST_STEPS of each run, the first and the last among them."""
    texts: dict[str, str] = {}
    answers: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for number, run in enumerate(runs):
        for line in run.samples:
            # The same prompt is the same text, whatever its number in a run.
            text = prompt_text(line.get("prompt"))
            texts.setdefault(text, text)
            answers.setdefault(text, {}).setdefault(number, []).append(line)
    shown = []
    for text in list(texts)[:MOST_PROMPTS]:
        of_runs = [(number, _answers(lines, only_last=len(runs) > 1)) for number, lines in answers[text].items()]
        shown.append(PromptAnswers(shortened(text), of_runs))
    return SamplesShown(shown, len(texts))


def _answers(lines: Sequence[Mapping[str, Any]], *, only_last: bool) -> list[StepAnswer]:
    lines = sorted(lines, key=lambda line: line["step"])
    found: list[StepAnswer] = []
    for line in lines:
        message = line.get("message")
        text = shortened(message_shown(message if isinstance(message, Mapping) else {}))
        answer = StepAnswer(line["step"], line["step"], text, line.get("finish_reason") == "length")
        if found and found[-1][2:] == answer[2:]:
            answer = answer._replace(first=found.pop().first)
        found.append(answer)
    if only_last or len(found) <= MOST_STEPS:
        return found[-1:] if only_last else found
    # Evenly spaced, from the first to the last.
    return [found[round(place * (len(found) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]


def prompt_text(prompt: Any) -> str:
    """Returns a prompt as text, with the role before each message."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else []
    return "\n".join(
        f"{message.get('role', '')}: {message_shown(message)}" for message in messages if isinstance(message, Mapping)
    )


def message_shown(message: Mapping[str, Any]) -> str:
    """Returns a message as text: its thought, which may be all of it if it is cut off, its content and its calls.

    >>> message_shown({"role": "assistant", "content": "Dublin.", "reasoning_content": "Of Ireland."})
    'thought: Of Ireland.\\nDublin.'
    """
    thought, content, calls = (message.get(key) for key in ("reasoning_content", "content", "tool_calls"))
    parts = [f"thought: {thought}"] if isinstance(thought, str) and thought else []
    parts += [content] if isinstance(content, str) and content else []
    return "\n".join([*parts, *([f"tool calls: {calls}"] if calls else [])])


def shortened(text: str) -> str:
    """Returns a text that is cut after MOST_LETTERS."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
