"""Renders the page of one run or of several: no script, no network, no other files, and foreign text is never markup.

Checkboxes and style sheet alone hide and show curves. The same function makes the page of a run and a comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jdpo.reports.data_summary.nodes import Section
from jdpo.reports.data_summary.part_tree import part_section
from jdpo.reports.html_files import page_environment
from jdpo.reports.run_page import run_tables
from jdpo.reports.run_page.curve_plots import CurvePlot, Series, curve_plot, last_place
from jdpo.reports.run_page.curves import RunCurves, smoothing_width
from jdpo.reports.run_page.next_commands import next_commands
from jdpo.reports.run_page.page_run import PageRun, RunStatus
from jdpo.reports.run_page.panels import SPEED_PANELS, Panel, main_panels, other_panels, present
from jdpo.reports.run_page.run_samples import samples_of
from jdpo.words import figure, memory

MOST_RUNS = 8
"""Runs of one page: as many colours are easy to distinguish."""

HEAD = 8192
"""The title of a page ends before so many characters."""

MOST_OTHERS = 24
"""Plots of metrics that have no panel of their own, on the page of one run; several share this number."""

COLOURS = {"chosen": "side-chosen", "rejected": "side-rejected", "executed": "side-rejected"}
"""Label of a metric -> class of its colour on the page of one run; all others have that of the first run."""


class _Plots(NamedTuple):
    main: Sequence[CurvePlot]
    speed: Sequence[CurvePlot]
    others: Sequence[CurvePlot]
    num_left_out: int
    smoothed_over: Sequence[int]
    has_held_out: bool


def run_page(runs: Sequence[PageRun]) -> str:
    """Returns the page of at least one run and at most MOST_RUNS, whose names differ."""
    curves = [RunCurves(run.lines) for run in runs]
    values = {
        "runs": runs,
        "is_one": len(runs) == 1,
        "plots": _plots(runs, curves),
        "figures": _figures(runs, curves),
        "same_rows": run_tables.same_rows(runs),
        "not_finite": [one.num_not_finite for one in curves],
        "samples": samples_of(runs),
        "settings": run_tables.settings_of(runs),
        "times": [run_tables.time_spent(run) for run in runs],
        "speed": run_tables.speed(runs, curves),
        "data_sections": (sections := [list(_data_sections(run)) for run in runs]),
        "data_there": any(sections),
        "next": [next_commands(run) for run in runs],
    }
    return _template().render(values).strip() + "\n"


def page_shows(page: Path, status: RunStatus) -> bool:
    """Returns True if a file is the page of one run in this state.

    Raises:
      OSError: the file cannot be read.
    """
    try:
        with page.open(encoding="utf-8", errors="replace") as file:
            beginning = file.read(HEAD)
    except FileNotFoundError:
        return False
    # The title is in front of everything that is long; a name in it has no markup of its own.
    return f": {status}</title>" in beginning


@functools.cache
def _template() -> jinja2.Template:
    environment = page_environment()
    filters: dict[str, Callable[..., str]] = {
        "kind": lambda node: type(node).__name__,
        "steps": lambda count: figure(count, "step"),
        "memory": memory,
        "progress": _progress,
    }
    environment.filters |= filters
    text = resources.files("jdpo.reports.run_page").joinpath("run_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _progress(run: PageRun) -> str:
    return f"step {run.step:,}" + (f" of {run.num_steps:,}" if run.num_steps is not None else "")


def _figures(runs: Sequence[PageRun], curves: Sequence[RunCurves]) -> list[tuple[str, run_tables.Table]]:
    """Returns the tables of figures with their captions."""
    if len(runs) == 1:
        table = run_tables.figures_of_one(curves[0])
        return [] if table is None else [("", table)]
    found = []
    # Means over the same rows, whose noise is largely shared; those over training rows are of other rows each.
    paired = run_tables.same_rows(runs)
    held_out = "Last evaluation, held-out rows" + (" (and the difference from the first run)" if paired else "")
    for prefix, caption in (("eval_", held_out), ("", "Last logged steps, training rows")):
        table = run_tables.figures_of_several(runs, curves, prefix, differences=paired and prefix == "eval_")
        if table is not None:
            found.append((caption, table))
    return found


def _plots(runs: Sequence[PageRun], curves: Sequence[RunCurves]) -> _Plots:
    names = list(dict.fromkeys(name for one in curves for name in one.names()))
    one_each = len(runs) > 1
    norms = {norm if isinstance(norm := run.config.get("max_grad_norm"), float) else None for run in runs}
    losses = {run.start_loss for run in runs}
    main = main_panels(
        names,
        start_loss=losses.pop() if len(losses) == 1 else None,
        max_grad_norm=norms.pop() if len(norms) == 1 else None,
        one_each=one_each,
    )
    others = other_panels(names, main)
    most_others = MOST_OTHERS // len(runs)
    last = last_place(one[name] for one in curves for name in one.names())

    def drawn(panels: Sequence[Panel]) -> list[CurvePlot]:
        found = ((panel, _series(panel, runs, curves)) for panel in panels)
        return [_plot(panel, series, last) for panel, series in found if series]

    return _Plots(
        main=drawn(main),
        speed=drawn(present(SPEED_PANELS, names, one_each=one_each)),
        others=drawn(others[:most_others]),
        num_left_out=max(len(others) - most_others, 0),
        smoothed_over=[smoothing_width(len(one["loss"])) if "loss" in one else 1 for one in curves],
        has_held_out=any(name.startswith("eval_") for name in names),
    )


def _series(panel: Panel, runs: Sequence[PageRun], curves: Sequence[RunCurves]) -> list[Series]:
    found = []
    for number, (run, one) in enumerate(zip(runs, curves, strict=True)):
        for metric, label in panel.metrics.items():
            colour = f"run-{number + 1}" if len(runs) > 1 else COLOURS.get(label, "run-1")
            words = label if len(runs) == 1 else _short(run.name)
            for name, held_out in ((metric, False), (f"eval_{metric}", True)):
                if name in one:
                    found.append(Series(words, colour, one[name], held_out))
    return found


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"


def _plot(panel: Panel, series: Sequence[Series], last: float) -> CurvePlot:
    return curve_plot(
        series,
        title=panel.title,
        unit=panel.unit,
        about=panel.about,
        level=panel.level,
        last=last,
        is_linear=panel.is_linear,
        least=panel.least,
    )


def _data_sections(run: PageRun) -> Any:
    """Yields what `jdpo inspect` says of the rows; nothing if data.json is missing, damaged or of another version."""
    for key, title in (("train", "Training rows"), ("eval", "Held-out rows")):
        part = (run.data or {}).get(key)
        try:
            if part is not None:
                section: Section = part_section(key, title, part)
                yield section
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
