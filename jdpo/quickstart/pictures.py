"""Draws the report's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.quickstart.experiment import DPO, STANDARD
from jdpo.quickstart.results import BEFORE, STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Results = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_ANSWER_COLOURS = {"right": "#0072B2", "wrong": "#D55E00", "other": "#CC79A7", "anything_else": "#888888"}
_STAGE_COLOURS = {BEFORE: "#999999", STANDARD: "#E69F00", DPO: "#009E73"}
_STAGE_LABELS = {BEFORE: "before", STANDARD: "standard training", DPO: "DPO"}
_STAGE_MARKERS = {STANDARD: "s", DPO: "o"}


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draws every picture into `folder` and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "frequencies": _frequencies(results),
        "correction": _correction(results),
        "carry_over": _carry_over(results),
        "cost": _cost(results),
    }
    files = []
    for number, (name, figure) in enumerate(pictures.items(), 1):
        path = folder / f"{number}_{name}.png"
        figure.savefig(path, dpi=130)
        files.append(path)
    return files


def _figure(width: float, height: float, title: str) -> Figure:
    # The object interface draws without a display and without a global list of figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _legend_below(axis: Axes) -> None:
    """Puts a legend below an axis, where no curve can be under it."""
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _clean(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _frequencies(results: Results) -> Figure:
    """Draws bars of each answer's frequency in the corpus and its probability under the model."""
    import numpy as np

    groups = results["frequencies"]["groups"]
    figure = _figure(12, 4.2, "Pre-training: the model learns how often each answer was given, true or not")
    axes = figure.subplots(1, len(groups), sharey=True)
    titles = {
        "ireland": "capital of {name}",
        "mistaken_example": "capital of {name}",
        "well_known": "{count} countries whose capital\nis the best-known city",
        "mistaken": "{count} countries whose capital\nis not the best-known city",
    }
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        places = np.arange(3)
        colours = [_ANSWER_COLOURS[answer] for answer in ("right", "wrong", "other")]
        corpus = axis.bar(places - 0.2, group["in_corpus"], 0.38, color="none", edgecolor=colours, hatch="///")
        learnt = axis.bar(places + 0.2, group["learnt"], 0.38, color=colours)
        for bars in (corpus, learnt):
            axis.bar_label(bars, labels=[f"{100 * bar.get_height():.0f}" for bar in bars], fontsize=8, padding=1)
        names = [
            f"{city}\n(right)" if row == 0 and city != "right" else city for row, city in enumerate(group["cities"])
        ]
        axis.set_xticks(places, names)
        axis.set_ylim(0, 1)
        _in_percent(axis.yaxis)
        title = titles[name].format(name=group["countries"][0], count=len(group["countries"]))
        _clean(axis, title, "answer", "share of answers / probability" if axis is axes[0] else "")
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor="#444444", hatch="///", label="in the corpus"),
        Patch(facecolor="#444444", label="learnt by the model"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _correction(results: Results) -> Figure:
    """Draws the curves of Ireland's answers in both runs, and of the odds of right against wrong."""
    cities = results["frequencies"]["groups"]["ireland"]["cities"]
    right, wrong, _ = cities
    figure = _figure(14, 4.6, f"Correcting the model: repeat {right}, or prefer {right} to {wrong}")
    axes = figure.subplots(1, 3)
    labels = dict(zip(("right", "wrong", "other"), cities, strict=True)) | {"anything_else": "anything else"}
    for axis, name in zip(axes, (STANDARD, DPO), strict=False):  # the third axis is drawn below
        curve = results["curves"][name]
        for answer, label in labels.items():
            style = ":" if answer == "anything_else" else "-"
            shown = f"{label} (right)" if answer == "right" else label
            axis.plot(curve["step"], curve["ireland"][answer], style, color=_ANSWER_COLOURS[answer], lw=2, label=shown)
        axis.set_ylim(-0.02, 1.02)
        _in_percent(axis.yaxis)
        how = f"sees only {right}" if name == STANDARD else f"sees {right} preferred to the others"
        _clean(axis, f"{_STAGE_LABELS[name]}: {how}", "step", "probability of the answer")
        axis.legend(frameon=False, loc="center right")
    axis = axes[2]
    for name in (STANDARD, DPO):
        curve = results["curves"][name]
        for group, label, style in (("ireland", "Ireland", "-"), ("held_out", "countries nobody corrected", "--")):
            axis.plot(
                curve["step"],
                curve[group]["odds"],
                style,
                color=_STAGE_COLOURS[name],
                lw=2,
                label=f"{_STAGE_LABELS[name]}, {label}",
            )
    axis.set_yscale("log")  # odds multiply, so equal factors have equal heights
    axis.yaxis.set_major_formatter("{x:,.0f} : 1")
    axis.yaxis.set_minor_formatter("")
    axis.axhline(1, color="#444444", lw=0.8)
    _clean(axis, "odds of right against wrong (log scale)", "step", "P(right) : P(wrong)")
    _legend_below(axis)
    return figure


def _carry_over(results: Results) -> Figure:
    """Draws where each country that nobody corrected went, and the means of all kinds of questions."""
    figure = _figure(13, 5.2, "Does it carry over to countries and phrasings that no correction mentioned?")
    by_country, by_kind = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _dumbbells(by_country, results["held_out_countries"])
    cells = {
        "trained_countries_trained_phrasings": "corrected\ncountries",
        "trained_countries_held_out_phrasings": "corrected\ncountries,\nnew phrasings",
        "held_out_countries_trained_phrasings": "countries\nnobody\ncorrected",
        "held_out_countries_held_out_phrasings": "countries\nnobody corrected,\nnew phrasings",
        "held_out_mistaken": "those of them\ncommonly\nmistaken",
    }
    heights = {name: [results["stages"][name][cell]["right"] for cell in cells] for name in STAGES}
    _grouped_bars(by_kind, heights, list(cells.values()))
    _clean(by_kind, "all kinds of questions: mean probability of the right answer", "questions about", "")
    handles, labels = by_kind.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _dumbbells(axis: Axes, countries: Sequence[Mapping[str, Any]]) -> None:
    """Draws a line per country, from its lowest to its highest probability, with a mark for each stage."""
    # The commonly mistaken ones at the top, and in each kind the one that gained most from DPO first.
    ordered = sorted(countries, key=lambda one: (one["mistaken"], one["right"][DPO]))
    for place, country in enumerate(ordered):
        values = country["right"]
        axis.plot([min(values.values()), max(values.values())], [place, place], color="#cccccc", lw=2, zorder=1)
        for name, size in ((BEFORE, 40), (STANDARD, 60), (DPO, 45)):
            marker = _STAGE_MARKERS.get(name, "D")
            axis.scatter(values[name], place, size, color=_STAGE_COLOURS[name], marker=marker, zorder=2)
    labels = [f"{country['capital']}, {country['country']}{'*' if country['mistaken'] else ''}" for country in ordered]
    axis.set_yticks(range(len(ordered)), labels, fontsize=9)
    axis.set_xlim(0, 1.02)
    _in_percent(axis.xaxis)
    note = "probability of the capital (*: another city is better known)"
    _clean(axis, "each country nobody corrected", note, "")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.3)


def _in_percent(axis: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _grouped_bars(axis: Axes, heights: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    for offset, (stage, values) in zip((-0.27, 0.0, 0.27), heights.items(), strict=True):
        places = [place + offset for place in range(len(names))]
        bars = axis.bar(places, values, 0.25, color=_STAGE_COLOURS[stage], label=_STAGE_LABELS[stage])
        axis.bar_label(bars, labels=[f"{100 * value:.0f}" for value in values], fontsize=8, padding=1)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(0, 1.08)
    _in_percent(axis.yaxis)


def _cost(results: Results) -> Figure:
    """Draws the curves of right answers, of answers other than the three cities, and of unrelated facts."""
    figure = _figure(14, 4.4, "What the correction cost")
    panels = (
        (
            "right answers of corrected countries:\ndo they stay probable?",
            "mean probability",
            ("trained", "right"),
            (0, 1.02),
        ),
        (
            "answers other than the three cities:\ndoes probability leak to nonsense?",
            "mean probability",
            ("trained", "anything_else"),
            None,
        ),
        ("right answers to other questions:\nis anything forgotten?", "mean probability", None, (0, 1.02)),
    )
    for axis, (title, y_label, where, limits) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in (STANDARD, DPO):
            curve = results["curves"][name]
            values = curve["facts"] if where is None else curve[where[0]][where[1]]
            axis.plot(
                curve["step"],
                values,
                color=_STAGE_COLOURS[name],
                marker=_STAGE_MARKERS[name],
                ms=3,
                lw=2,
                label=_STAGE_LABELS[name],
            )
            if where == ("trained", "anything_else"):
                held_out = curve["held_out"]["anything_else"]
                label = f"{_STAGE_LABELS[name]}, countries nobody corrected"
                axis.plot(curve["step"], held_out, "--", color=_STAGE_COLOURS[name], lw=1.5, label=label)
        # At least 0 to 0.1, so that a leak of a hundredth does not look large.
        axis.set_ylim(*(limits or (0, max(0.1, axis.get_ylim()[1]))))
        _in_percent(axis.yaxis)
        _clean(axis, title, "step", y_label)
        _legend_below(axis)
    return figure
