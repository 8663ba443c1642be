"""The report of the speed benchmark, as Markdown: the gate, a table of every arm, the ratios and their bars."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence

from speed_arms import GATE
from speed_cases import Case
from speed_verdicts import (
    GATED,
    GateRow,
    Padding,
    Result,
    Verdict,
    all_steps_gate,
    first_steps_gate,
    verdicts,
    worst,
)
from timing import quartiles

TOLD = ("tokens_per_second", "model_tflops_per_second", "mfu", "mfu_executed")
"""The metrics of jdpo's own log that are reported, if the log has them."""


def render_case(
    case: Case,
    results: Mapping[str, Result],
    *,
    facts: Sequence[str],
    notes: Sequence[str],
    wanted: Collection[str],
    padding: Padding | None = None,
) -> tuple[list[str], bool]:
    """Returns a case as Markdown lines, and whether the gate held and every bar was measured and reached.

    Args:
      results: by the key of their arm; an arm that failed is not among them.
      facts: lines about rows and settings.
      notes: what is left out.
      wanted: trainers whose bars count, those that could not run among them.
      padding: of jdpo, where it ran.
    """
    lines = [f"## {case.name}", "", *paragraphs(facts), *paragraphs(f"Left out: {note}" for note in notes)]
    if not results:
        return [*lines, "No arm ran: **nothing was measured**.", ""], False
    gate_lines, held = _gate(case, results, wanted)
    timed = [result for result in results.values() if result.arm.role != GATE]
    lines += [*gate_lines, *_times_table(case, timed), "", *_told(timed)]
    found = verdicts(case, results, padding, wanted)
    lines += ["| ratio | of medians | of totals | of each step, median | bar | |", "|---|---:|---:|---:|---:|---|"]
    lines += [_row(verdict) for verdict in found]
    return [*lines, ""], held and all(verdict.passed for verdict in found)


def paragraphs(lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [part for line in lines for part in (line, "")]


def _row(verdict: Verdict) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}" if verdict.at_most else f"{value:.2f}"

    figure = "not measured" if verdict.figure is None else cell(verdict.figure)
    bar = "" if verdict.bar is None else f"at most {verdict.bar:.0%}" if verdict.at_most else f"{verdict.bar:g}"
    mark = "" if verdict.bar is None else "reached" if verdict.passed else "**missed**"
    if verdict.figure is None:
        mark = "**not measured**"
    return f"| {verdict.what} | {figure} | {cell(verdict.totals)} | {cell(verdict.paired)} | {bar} | {mark} |"


# --- the gate


def _gate(case: Case, results: Mapping[str, Result], wanted: Collection[str]) -> tuple[list[str], bool]:
    listed = list(results.values())
    first, later = first_steps_gate(case, listed), all_steps_gate(case, results)
    lines = ["| first step | " + " | ".join(GATED) + " |", "|---|" + "---:|" * len(GATED)]
    for result in listed:
        line = result.runs[0].lines[0]
        lines.append(f"| {result.arm.name} | " + " | ".join(f"{line[name]:.6f}" for name in GATED) + " |")
    most = worst(value for row in first for value in row.first.values())
    lines += [
        "",
        f"Gate: the first step's loss and mean log-probs differ by at most {most:.1e} relatively "
        f"(allowed {case.tolerance:.0e}): {_mark(first)}.",
        "",
    ]
    if later:
        lines += _later_table(case, later)
    elif {"jdpo", "trl"} <= set(wanted):
        return [*lines, "Gate of all steps: **not measured**.", ""], False
    return lines, all(row.held for row in (*first, *later))


def _later_table(case: Case, rows: Sequence[GateRow]) -> list[str]:
    lines = [
        "| from jdpo on the same file, relatively | "
        + " | ".join(f"{name}: first, later steps" for name in GATED)
        + " |",
        "|---|" + "---:|" * len(GATED),
    ]
    for row in rows:
        cells = (f"{row.first[name]:.1e}, {row.later[name]:.1e}" for name in GATED)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    allowed = f"{case.tolerance:.0e}"
    if case.later_tolerance is not None:
        allowed += f" in the first step; later {case.later_tolerance:.0e} of the loss alone, as bfloat16 runs part"
    return [*lines, "", f"Gate of all steps: allowed {allowed}: {_mark(rows)}.", ""]


def _mark(rows: Sequence[GateRow]) -> str:
    return "equal" if all(row.held for row in rows) else "**NOT EQUAL**"


# --- every arm


def _times_table(case: Case, results: Sequence[Result]) -> list[str]:
    lines = [
        "| arm | step, s: median (quartiles) | all steps of a round, s | pairs/s | first step, s: cold, warm "
        "| peak resident, MiB: steps, whole | GPU, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        seconds = result.flat()
        low, middle, high = quartiles(seconds)
        total = sum(seconds) / len(result.runs)
        pairs = case.batch * len(seconds) / sum(seconds)
        cold, later = result.first_steps()
        warm = "" if later is None else f"{later:.1f}"
        resident = f"{max(run.peak_rss_steps for run in result.runs) / 2**20:.0f}, {result.peak() / 2**20:.0f}"
        device = f"{result.device_peak():.1f}" if case.device == "gpu" else ""
        lines.append(
            f"| {result.arm.name} | {middle:.3g} ({low:.3g} to {high:.3g}) | {total:.2f} | {pairs:.3g} "
            f"| {cold:.1f}, {warm} | {resident} | {device} |"
        )
    return lines


def _told(results: Sequence[Result]) -> list[str]:
    """Returns medians over the measured steps of jdpo's last round, from its own log."""
    lines = []
    for result in results:
        if result.arm.trainer != "jdpo":
            continue
        measured = result.runs[-1].measured
        keys = [key for key in TOLD if all(key in line for line in measured)]
        values = [f"{key} {statistics.median(float(line[key]) for line in measured):.4g}" for key in keys]
        if values:
            lines += [f"{result.arm.name}, by its own log: {', '.join(values)}.", ""]
    return lines
