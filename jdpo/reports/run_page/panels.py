"""The pictures of the page of a run: which metrics are in each, what they are called, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Panel(NamedTuple):
    """A picture of one metric or of a few with one unit.

    Attributes:
      title: what it shows.
      unit: of the y axis.
      metrics: metric -> its label, which is empty for a picture of one.
      about: how to read it.
      level: a horizontal line: its value and its label.
      is_linear: True if the axis is never logarithmic.
      least: the smallest range of the axis; rounding must not look like a curve.
    """

    title: str
    unit: str
    metrics: Mapping[str, str]
    about: str = ""
    level: tuple[float, str] | None = None
    is_linear: bool = False
    least: float = 0.0


PREFERENCE_PANELS = (
    Panel("Loss", "per pair", {"loss": ""}, "Below the line, the policy prefers the chosen answers.", least=0.01),
    Panel(
        "Pairs ranked right",
        "share",
        {"rewards/accuracies": ""},
        "Share of pairs whose chosen answer gained more than the rejected one. At the start, all are ties.",
        (0.5, "chance"),
        least=0.2,
    ),
    Panel(
        "Reward margin",
        "beta x nats",
        {"rewards/margins": ""},
        "How much more the chosen answers gained than the rejected ones.",
        (0.0, "reference"),
        least=0.01,
    ),
    Panel(
        "Rewards",
        "beta x nats",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        "How far the policy moved from the reference. Both often fall; the difference is what is trained.",
        (0.0, "reference"),
        least=0.01,
    ),
    Panel(
        "Log-probability of the answers",
        "nats",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        "If the chosen answers fall for long, the model unlearns what it could answer before.",
        least=0.1,
    ),
)
COMPLETION_PANELS = (
    Panel("Loss", "nats per token", {"loss": ""}, "Negative log-likelihood of the tokens that are learnt.", least=0.01),
)
STEP_PANELS = (
    Panel("Gradient norm", "", {"grad_norm": ""}, "Before clipping."),
    Panel("Learning rate", "", {"learning_rate": ""}, is_linear=True),
)
SPEED_PANELS = (
    Panel("Tokens per second", "tokens/s", {"tokens_per_second": ""}, "Without padding."),
    Panel("Model FLOP utilization", "share", {"mfu": "needed", "mfu_executed": "executed"}),
    Panel("Padding", "share", {"padding": ""}, "Share of the computed positions that hold no token."),
)
NOT_DRAWN = ("num_tokens", "peak_memory_gib", "step_seconds", "model_tflops_per_second")
"""Metrics that the page gives as figures; also every rate in rows per second."""


def main_panels(
    names: Iterable[str], *, start_loss: float | None, max_grad_norm: float | None, one_each: bool
) -> list[Panel]:
    """Returns the panels of the metrics that all readers look at, of those that there are.

    Args:
      names: of all curves.
      start_loss: the loss where policy and reference are equal, if that is a constant.
      max_grad_norm: at which gradients are clipped, if they are.
      one_each: one metric per panel, as the colours are those of runs.
    """
    there = {name.removeprefix("eval_") for name in names}
    panels: Sequence[Panel] = (*(PREFERENCE_PANELS if "rewards/margins" in there else COMPLETION_PANELS), *STEP_PANELS)
    if "rewards/margins" in there and start_loss is not None:
        named = "ln 2: policy = reference" if math.isclose(start_loss, math.log(2), rel_tol=1e-4) else "at the start"
        panels = (panels[0]._replace(level=(start_loss, named)), *panels[1:])
    elif "rewards/margins" in there:
        panels = (panels[0]._replace(about=""), *panels[1:])
    if max_grad_norm is not None:
        level = (max_grad_norm, "clipped above")
        panels = [panel._replace(level=level) if "grad_norm" in panel.metrics else panel for panel in panels]
    return present(panels, there, one_each=one_each)


def present(panels: Iterable[Panel], names: Iterable[str], *, one_each: bool) -> list[Panel]:
    """Returns the panels with the metrics that there are, without empty ones."""
    there, found = set(names), []
    for panel in panels:
        metrics = {name: label for name, label in panel.metrics.items() if name in there}
        if one_each:
            for name, label in metrics.items():
                title = f"{panel.title}: {label}" if label else panel.title
                found.append(panel._replace(title=title, metrics={name: ""}))
        elif metrics:
            found.append(panel._replace(metrics=metrics))
    return found


def other_panels(names: Iterable[str], drawn: Iterable[Panel]) -> list[Panel]:
    """Returns a panel for each metric that no other panel draws, such as those of single datasets."""
    taken = {name for panel in (*drawn, *SPEED_PANELS) for name in panel.metrics}
    left = dict.fromkeys(name.removeprefix("eval_") for name in names)
    return [
        Panel(name, "", {name: ""})
        for name in left
        if name not in taken and name not in NOT_DRAWN and not name.endswith("_per_second")
    ]
