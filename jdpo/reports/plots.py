"""Draws the plots of a run from its metrics.jsonl."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.safe_text import terminal


class Panel(NamedTuple):
    """One picture: file name, title, label of the y axis, and metrics with their labels."""

    name: str
    title: str
    y_label: str
    metrics: Mapping[str, str]
    level: tuple[float, str] | None = None  # a horizontal reference line: value, label


LN2 = 0.6931471805599453

PREFERENCE_PANELS = (
    Panel("loss", "Preference loss", "loss per pair", {"loss": "loss"}, (LN2, "ln 2: policy = reference")),
    Panel(
        "rewards",
        "Implicit rewards: beta x (policy - reference) log-prob",
        "reward (nats x beta)",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        (0.0, "reference"),
    ),
    Panel(
        "margins",
        "Reward margin: chosen - rejected",
        "margin (nats x beta)",
        {"rewards/margins": "margin"},
        (0.0, "reference"),
    ),
    Panel(
        "accuracy",
        "Share of pairs whose chosen answer has the higher reward",
        "accuracy",
        {"rewards/accuracies": "accuracy"},
        (0.5, "chance"),
    ),
    Panel("logps", "Log-prob of whole completions", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)
COMPLETION_PANELS = (Panel("loss", "Negative log-likelihood of completion tokens", "nats per token", {"loss": "loss"}),)

COLOURS = {"chosen": "#0072B2", "rejected": "#D55E00"}  # colour-blind readers can distinguish them


def write_plots(lines: Sequence[Mapping[str, Any]], folder: Path, *, title: str) -> list[Path]:
    """Draws training (line) and evaluation (dots) for every panel that has data.

    Args:
      lines: objects of a metrics.jsonl.
      folder: is created if missing; it gets one PNG per panel.
      title: title of every picture.

    Returns:
      the files written.
    """
    panels = PREFERENCE_PANELS if any("rewards/margins" in line for line in lines) else COMPLETION_PANELS
    folder.mkdir(parents=True, exist_ok=True)
    return [path for panel in panels if (path := _draw(panel, lines, folder, title)) is not None]


def _draw(panel: Panel, lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> Path | None:
    # The object interface draws without a display and without a global figure list.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = False
    for index, (metric, label) in enumerate(panel.metrics.items()):
        colour = COLOURS.get(label, f"C{index}")
        # Most evaluation steps are not logged steps, so each curve has its own steps.
        for name in (metric, f"eval_{metric}"):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if not points:
                continue
            drawn = True
            held_out = name.startswith("eval_")
            axes.plot(
                *zip(*points, strict=True),
                linestyle="--" if held_out else "-",
                # Dots show single points of short runs; on a long curve they would hide the line.
                marker="o" if held_out else "." if len(points) < 40 else "None",
                markersize=5,
                markerfacecolor="white" if held_out else colour,
                color=colour,
                alpha=0.9,
                label=f"{label}, {'held-out' if held_out else 'training'}",
            )
    if not drawn:
        return None
    if panel.level is not None:
        value, name = panel.level
        axes.axhline(value, color="grey", linewidth=0.9, linestyle=":", label=name)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(panel.y_label)
    # Dollar signs in the name of a model do not start a formula.
    axes.set_title(f"{panel.title}\n{terminal(title)}", fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    path = folder / f"{panel.name}.png"
    with warnings.catch_warnings():
        # The font lacks some scripts and emoji; a box in a picture's title needs no warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=130)
    return path
