"""The geometry of the plots on the page of a comparison; the page's template draws it.

Drawn as SVG in the page itself, so that they follow its colours, light and dark, and need no other file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jdpo.comparison.compare_document import CalibrationBin, Figure, Values
from jdpo.comparison.figure_words import MINUS
from jdpo.comparison.intervals import Estimate

WIDTH, HEIGHT = 400.0, 270.0
"""Size of a plot in its own units; few, so that its text is readable on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 44.0, 18.0, 26.0, 42.0
BAR_WIDTH = 1000.0
"""Width of the plot in a row of a table."""


class IntervalBar(NamedTuple):
    """An estimate in a row of a table: its interval, its value, and the value of equal models."""

    low: float
    high: float
    value: float
    neutral: float


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class Point(NamedTuple):
    """A point with its vertical interval, and what it is, for the reader's pointer."""

    x: float
    y: float
    low: float
    high: float
    words: str


class Plot(NamedTuple):
    """A plot with axes.

    Attributes:
      title: what it shows.
      x_label, y_label: of the axes.
      x_ticks, y_ticks: marks on the axes.
      points: with intervals.
      bars: (series, x, y, width, height).
      lines: (x1, y1, x2, y2) of reference lines.
      series: names of the series, for the legend; empty if there is one.
      colours: colours of the series: "sides" of a pair, or "models" before and after.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    points: Sequence[Point] = ()
    bars: Sequence[tuple[int, float, float, float, float]] = ()
    lines: Sequence[tuple[float, float, float, float]] = ()
    series: Sequence[str] = ()
    colours: Literal["sides", "models"] = "models"


def tested(values: Values) -> Estimate:
    """Returns the estimate that shows a change: the difference, or else the value after."""
    return values.after if values.difference is None else values.difference


def reach_of(figures: Iterable[Figure]) -> float:
    """Returns how far the widest interval of figures of one unit reaches from the values of equal models."""
    found = [
        abs(end - figure.neutral)
        for figure in figures
        if figure.neutral is not None
        for values in (figure.all, *figure.datasets.values())
        for end in tested(values)
        if end is not None
    ]
    return max(found, default=0.0)


def interval_bar(values: Values, neutral: float, reach: float) -> IntervalBar | None:
    """Places an estimate on a bar whose middle is the value of equal models.

    Args:
      reach: distance from the middle to the ends, in the unit of the figure.

    Returns:
      the places, from 0 to BAR_WIDTH; None if there is no interval.
    """
    value, low, high = tested(values)
    if low is None or high is None or not reach:
        return None

    def place(number: float) -> float:
        # 4 % at each side stay free for the caps.
        return round(BAR_WIDTH * (0.5 + 0.46 * (number - neutral) / reach), 1)

    return IntervalBar(place(low), place(high), place(value), place(neutral))


def calibration_plot(bins: Sequence[CalibrationBin]) -> Plot | None:
    """Plots the accuracy of pairs over their confidence; None if all bins are empty."""
    points = []
    for one in bins:
        if one.confidence is None or one.accuracy is None:
            continue
        value, low, high = one.accuracy
        words = f"{one.num_rows:,} pairs: confidence {one.confidence:.1%}, accuracy {value:.1%}"
        points.append(
            Point(
                _x(2 * one.confidence - 1), _y(value), _y(low if low is not None else value), _y(high or value), words
            )
        )
    if not points:
        return None
    return Plot(
        "Is the model right as often as it is sure?",
        "confidence: sigmoid of the margin",
        "share of pairs ranked right",
        [Tick(_x(2 * share - 1), f"{share:.0%}") for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)],
        [Tick(_y(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        points=points,
        # What a calibrated model would have.
        lines=[(_x(0), _y(0.5), _x(1), _y(1))],
    )


def row_plots(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Plots how log-probs of held-out answers changed, and how long the models' own answers are.

    Args:
      rows: see `Comparison.rows`.
    """
    pairs = [row for row in rows if row["kind"] == "pair"]
    answers = [
        row for row in rows if row["kind"] == "answer" and None not in (row["before_tokens"], row["after_tokens"])
    ]
    plots = []
    if pairs:
        changes = {
            side: [row[f"{side}_logp_after"] - row[f"{side}_logp_before"] for row in pairs]
            for side in ("chosen", "rejected")
        }
        title = "How far did the answers of the pairs move?"
        plots.append(
            histogram(title, "change of the log-probability in nats", changes, of="pairs")._replace(colours="sides")
        )
    if answers:
        lengths = {name: [row[f"{name}_tokens"] for row in answers] for name in ("before", "after")}
        plots.append(histogram("How long are the models' answers?", "tokens of an answer", lengths, of="answers"))
    return plots


def histogram(title: str, x_label: str, series: Mapping[str, Sequence[float]], *, of: str, num_bins: int = 24) -> Plot:
    """Plots how the values of each series are distributed.

    The range covers the middle 98 % of the values and zero; values outside are counted in the outermost bins.

    Args:
      of: what is counted, for the label of the axis.
    """
    arrays = [np.asarray(values, float) for values in series.values()]
    everything = np.concatenate(arrays)
    # Zero, which means no change, is always shown.
    low, high = min(float(np.quantile(everything, 0.01)), 0.0), max(float(np.quantile(everything, 0.99)), 0.0)
    if low == high:
        low, high = -1.0, 1.0
    edges = np.linspace(low, high, num_bins + 1)
    shares = [np.histogram(values.clip(low, high), edges)[0] / values.size for values in arrays]
    most = float(max(each.max() for each in shares))
    # Next to each other, since equal bars would hide one another.
    width = round((_x(1) - _x(0)) / num_bins / len(arrays), 2)
    bars = [
        (
            number,
            round(_x(place / num_bins) + number * width, 1),
            _y(share / most),
            width,
            round(_y(0) - _y(share / most), 1),
        )
        for number, each in enumerate(shares)
        for place, share in enumerate(each.tolist())
        if share > 0
    ]
    zero = _x(-low / (high - low))
    x_ticks = nice_ticks(low, high, whole=all(isinstance(value, int) for values in series.values() for value in values))
    return Plot(
        title,
        x_label,
        f"share of {of}",
        [Tick(_x((tick - low) / (high - low)), f"{tick:g}".replace("-", MINUS)) for tick in x_ticks],
        [Tick(_y(tick / most), f"{tick:.0%}") for tick in nice_ticks(0.0, most)],
        bars=bars,
        lines=[(zero, _y(0), zero, _y(1))] if low < 0 else [],
        series=list(series),
    )


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns a few round numbers within a range.

    Args:
      whole: whole numbers only, as of tokens.

    >>> nice_ticks(-3.2, 7.9)
    [-2.0, 0.0, 2.0, 4.0, 6.0]
    """
    # Imported here, as it takes a while and only pages need it.
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    return [round(float(value), 10) for value in values if low <= value <= high]


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    # SVG counts from the top.
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)
