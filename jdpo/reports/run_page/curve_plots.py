"""The geometry of the curves on the page of a run; the template draws it as SVG in the page itself.

Values are read without a script: a plot is covered by transparent bands, and the one under the pointer or the finger
shows the values at its place. A table next to the plot holds some of them for those who use neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdpo.reports.data_summary.row_statistics import nice_edges
from jdpo.reports.run_page import curves
from jdpo.reports.run_page.curves import Curve
from jdpo.safe_text import terminal

WIDTH, HEIGHT = 400.0, 236.0
"""Size of a plot in its own units; few, so that its text is readable on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 20.0, 34.0
MOST_BANDS = 48
FULL_DETAIL_OF = 6
"""A plot of more curves draws each with fewer points and has fewer bands, so that the page stays small."""
MOST_ROWS = 12
"""Rows of the table of values."""
MOST_DOTS = 40
"""A held-out curve with more points has no dots."""
LOG_FROM = 100.0
"""A curve of positive values whose highest is so many times the lowest has a logarithmic axis."""
TIP_LINE, TIP_LETTER = 12.0, 5.7
"""Height of a line and width of a letter in the box of values."""
MINUS = "−"


class Series(NamedTuple):
    """A curve to draw.

    Attributes:
      label: what it is, in front of a value.
      colour: the class of its colour, such as `run-1`.
      curve: its values.
      held_out: True if they are of evaluations.
    """

    label: str
    colour: str
    curve: Curve
    held_out: bool


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class Line(NamedTuple):
    """A drawn line: its classes, the path, and dots at single values."""

    classes: str
    path: str
    dots: Sequence[tuple[float, float]] = ()


class Band(NamedTuple):
    """A strip of the plot that shows the values at its place.

    Attributes:
      x, width: the strip.
      at: x of the values.
      title: the step.
      values: (class, text) of each series.
      dots: (class, x, y) of each value.
      box: x, width and height of the box with the values.
    """

    x: float
    width: float
    at: float
    title: str
    values: Sequence[tuple[str, str]]
    dots: Sequence[tuple[str, float, float]]
    box: tuple[float, float, float]


class CurvePlot(NamedTuple):
    """A plot with its axes, lines, bands and table.

    Attributes:
      level: y and label of a horizontal line.
      legend: (class, label) of the colours, if there are several in this plot.
      table: titles of its columns, then its rows.
    """

    title: str
    unit: str
    about: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    level: tuple[float, str] | None
    lines: Sequence[Line]
    bands: Sequence[Band]
    legend: Sequence[tuple[str, str]]
    table: Sequence[Sequence[str]]


class _Axes(NamedTuple):
    """Maps values to places."""

    last: float  # x begins at 0
    low: float
    high: float
    is_log: bool

    def x(self, value: float) -> float:
        return round(LEFT + value / self.last * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log(value) if self.is_log else value) - low) / (high - low)
        # SVG counts from the top.
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def curve_plot(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    about: str,
    level: tuple[float, str] | None,
    last: float,
    is_linear: bool = False,
    least: float = 0.0,
) -> CurvePlot:
    """Draws curves into one plot.

    Args:
      series: at least one, none of them empty.
      level: a value with a horizontal line, and its label.
      last: the largest x.
      is_linear: True keeps the y axis linear whatever the values.
      least: the smallest range of the y axis.
    """
    axes = _axes(series, level, last, is_linear=is_linear, least=least)
    if level is not None and not axes.low <= level[0] <= axes.high:
        level = None
    crowd = math.ceil(len(series) / FULL_DETAIL_OF)
    colours = dict.fromkeys((one.colour, one.label) for one in series)
    ticks = _log_ticks(axes.low, axes.high) if axes.is_log else _ticks(axes.low, axes.high)
    return CurvePlot(
        title=title,
        unit=f"{unit} (log scale)".strip() if axes.is_log else unit,
        about=about,
        x_ticks=[Tick(axes.x(tick), number_words(tick)) for tick in _ticks(0.0, last, whole=True)],
        y_ticks=[Tick(axes.y(tick), number_words(tick)) for tick in ticks],
        level=None if level is None else (axes.y(level[0]), level[1]),
        lines=[line for one in series for line in _lines(one, axes, curves.MOST_BUCKETS // crowd)],
        bands=list(_bands(series, axes, MOST_BANDS // crowd)),
        legend=list(colours) if len(colours) > 1 else [],
        table=_table(series),
    )


def number_words(value: float) -> str:
    """Returns a value with at most 4 significant digits.

    >>> number_words(-0.69314), number_words(12000), number_words(0.000025), number_words(3e7), number_words(0)
    ('−0.6931', '12,000', '2.5e-5', '3e7', '0')
    """
    size = abs(value)
    text = f"{size:,.0f}" if 1000 <= size < 1e6 else f"{size:.4g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{MINUS}{text}" if value < 0 else text


def _axes(
    series: Sequence[Series], level: tuple[float, str] | None, last: float, *, is_linear: bool, least: float
) -> _Axes:
    low = min(float(one.curve.y.min()) for one in series)
    high = max(float(one.curve.y.max()) for one in series)
    if low > 0 and high / low >= LOG_FROM and not is_linear:
        return _Axes(last, low / 1.1, high * 1.1, True)
    if level is not None:
        # A level far away would press the curve flat, so it is then left out of the range, and not seen.
        reach = 3 * (high - low) or 1.0
        if low - reach <= level[0] <= high + reach:
            low, high = min(low, level[0]), max(high, level[0])
    if (missing := least - (high - low)) > 0:
        low, high = low - missing / 2, high + missing / 2
    if low == high:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    margin = 0.05 * (high - low)
    return _Axes(last, low - margin, high + margin, False)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    edges = nice_edges(low, high, whole=whole, most=6).tolist()
    return [round(edge, 12) for edge in edges if low <= edge <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # At most about 6 powers of ten.
    ticks = [10.0**power for power in powers if power % max(1, len(powers) // 6) == 0]
    return [tick for tick in ticks if low <= tick <= high]


def _lines(one: Series, axes: _Axes, buckets: int) -> Iterator[Line]:
    whole = one.curve
    if one.held_out:
        drawn = curves.thinned(whole, buckets)
        dots = (
            [(axes.x(x), axes.y(y)) for x, y in zip(drawn.x, drawn.y, strict=True)] if len(whole) <= MOST_DOTS else []
        )
        yield Line(f"held-out {one.colour}", _path(drawn, axes), dots)
        return
    is_smoothed = curves.smoothing_width(len(whole)) > 1
    drawn = curves.thinned(whole, buckets)
    dots = [(axes.x(x), axes.y(y)) for x, y in zip(drawn.x, drawn.y, strict=True)] if len(whole) == 1 else []
    yield Line(f"training {'raw' if is_smoothed else 'mean'} {one.colour}", _path(drawn, axes), dots)
    if is_smoothed:
        # Half as many parts: there are no peaks left to keep.
        means = curves.thinned(curves.smoothed(whole), buckets // 2)
        yield Line(f"training mean {one.colour}", _path(means, axes))


def _path(curve: Curve, axes: _Axes) -> str:
    return "M" + "L".join(f"{axes.x(x):g} {axes.y(y):g}" for x, y in zip(curve.x, curve.y, strict=True))


def _bands(series: Sequence[Series], axes: _Axes, most: int) -> Iterator[Band]:
    places = _places(series, most)
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), axes.last]
    means = [None if one.held_out else curves.smoothed(one.curve) for one in series]
    for number, place in enumerate(places):
        values, dots, step = [], [], None
        for one, mean in zip(series, means, strict=True):
            at = curves.nearest(one.curve, place)
            if not one.held_out and step is None:
                step = int(one.curve.steps[at])
            values.append((one.colour, _value_words(one, mean, at)))
            dots.append((one.colour, axes.x(one.curve.x[at]), axes.y(one.curve.y[at])))
        title = f"step {step:,}" if step is not None else f"after step {round(place):,}"
        letters = max(map(len, (title, *(text for _, text in values))))
        width = round(letters * TIP_LETTER + 12, 1)
        at_x = axes.x(place)
        # On the wider side of the place.
        box_x = at_x + 6 if at_x < WIDTH / 2 else at_x - 6 - width
        box_x = round(min(max(box_x, 1.0), WIDTH - width - 1), 1)
        x, end = axes.x(edges[number]), axes.x(edges[number + 1])
        height = TIP_LINE * (len(values) + 1) + 7
        yield Band(x, round(end - x, 1), at_x, title, values, dots, (box_x, width, height))


def _places(series: Sequence[Series], most: int) -> list[float]:
    """Returns at most `most` places at which there are values, from the first to the last."""
    longest = max(series, key=lambda one: len(one.curve)).curve
    every = np.unique(np.concatenate([longest.x, *(one.curve.x for one in series if len(one.curve) <= most)]))
    if len(every) <= most:
        return [float(place) for place in every]
    at = np.linspace(longest.x[0], longest.x[-1], most)
    return sorted({float(longest.x[curves.nearest(longest, float(place))]) for place in at})


def _value_words(one: Series, mean: Curve | None, at: int) -> str:
    label = f"{one.label} " if one.label else ""
    value = number_words(float(one.curve.y[at]))
    if one.held_out:
        return f"{label}held-out {value} (step {one.curve.steps[at]:,.0f})"
    if mean is None or curves.smoothing_width(len(one.curve)) == 1:
        return f"{label}{value}"
    return f"{label}{value}, mean {number_words(float(mean.y[at]))}"


def _table(series: Sequence[Series]) -> list[list[str]]:
    names = [f"{one.label} held-out".strip() if one.held_out else one.label or "training" for one in series]
    rows = [["step", *map(terminal, names)]]
    for place in _places(series, MOST_ROWS):
        cells: list[str] = []
        step = None
        for one in series:
            at = curves.nearest(one.curve, place)
            if step is None and not one.held_out:
                step = int(one.curve.steps[at])
            near = not one.held_out or abs(one.curve.x[at] - place) <= _spacing(one.curve) / 2
            cells.append(number_words(float(one.curve.y[at])) if near else "")
        rows.append([f"{round(place) if step is None else step:,}", *cells])
    return rows


def _spacing(curve: Curve) -> float:
    return float(np.diff(curve.x).mean()) if len(curve) > 1 else 1.0


def last_place(found: Iterable[Curve]) -> float:
    """Returns the largest x of curves, at least 1."""
    return max([1.0, *(float(curve.x[-1]) for curve in found if len(curve))])
