"""The lines of a run up to a step, read from its files, for a tracker that does not have them yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.run_page.run_samples import message_shown
from jdpo.reports.trackers.delivery import Line


def line_of(metrics: Mapping[str, Any]) -> Line:
    """Returns a line of metrics.jsonl as trackers get it."""
    return Line(metrics["step"], {name: value for name, value in metrics.items() if name != "step"})


def line_of_samples(step: int, answers: Sequence[Mapping[str, Any]]) -> Line:
    """Returns lines of samples.jsonl that belong to one step as trackers get them."""
    return Line(step, samples=[(_readable(line["prompt"]), message_shown(line["message"])) for line in answers])


def lines_until(last_step: int | None, metrics: Path, samples: Path) -> Iterator[Line]:
    """Yields the lines of both files in the order of their steps.

    Args:
      last_step: step of the checkpoint that the run continues from; None: none, and there are no lines.
    """
    if last_step is None:
        return
    answers: dict[int, list[dict[str, Any]]] = {}
    for answer in _read_samples(samples):
        answers.setdefault(answer["step"], []).append(answer)
    of_steps = [line_of(line) for line in read_metrics(metrics)]
    # Lines of one step may come in any order.
    for line in sorted([*(line_of_samples(*one) for one in answers.items()), *of_steps], key=lambda one: one.step):
        if line.step <= last_step:
            yield line


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the answers of samples.jsonl; a line that a crash has damaged is not one."""
    if not path.is_file():
        return
    for text in path.read_bytes().splitlines():
        try:
            answer = json.loads(text)
            line_of_samples(answer["step"], [answer])
        except (ValueError, TypeError, KeyError):
            continue
        yield answer


def _readable(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
