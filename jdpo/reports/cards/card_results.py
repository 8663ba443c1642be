"""The section of a model card with the metrics: the few that matter by plain names, all others folded away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdpo.reports.findings.series import figures
from jdpo.safe_text import markdown
from jdpo.words import figure

PREFERENCE = {
    "loss": "Loss",
    "rewards/accuracies": "Accuracy: share of pairs whose chosen answer has the higher reward",
    "rewards/margins": "Margin: reward of the chosen answer minus that of the rejected one",
    "rewards/chosen": "Reward of the chosen answer",
    "rewards/rejected": "Reward of the rejected answer",
}
COMPLETION = {"loss": "Loss (nats per token)"}

REWARDS = (
    "Rewards are measured against the model that training started from. They show how far the model has moved, not how "
    "good its answers are; read some answers before you rely on it."
)


def results_section(results: Mapping[str, Any], *, command: str) -> list[str]:
    """Returns the lines of the section; none without results.

    Args:
      results: name -> value of the last training and evaluation lines.
    """
    values = {name: value for name, value in results.items() if isinstance(value, int | float)}
    shown = {name: label for name, label in (PREFERENCE if command == "dpo" else COMPLETION).items() if name in values}
    lines = ["## Results", ""]
    if not values:
        return [*lines, "No metrics were logged."]
    held_out = any(f"eval_{name}" in values for name in shown)
    heads = ["held-out", "training"] if held_out else ["training"]
    lines += [_amount(values), "", f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, label in shown.items():
        there = [values.get(f"eval_{name}")] if held_out else []
        cells = ["" if value is None else figures(value) for value in [*there, values[name]]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if command == "dpo":
        lines += ["", REWARDS]
    lines += ["", "<details>", "<summary>All metrics</summary>", "", "| metric | value |", "|---|---:|"]
    lines += [f"| {markdown(name)} | {figures(value)} |" for name, value in values.items()]
    return [*lines, "", "</details>"]


def _amount(values: Mapping[str, float]) -> str:
    more = [f"{figures(values['epoch'])} epochs"] if "epoch" in values else []
    more += [figure(values["num_tokens"], "token")] if "num_tokens" in values else []
    amount = f" ({', '.join(more)})" if more else ""
    return f"After {figure(values.get('step', 0), 'step')}{amount}:"
