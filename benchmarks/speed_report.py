"""What the speed benchmark found, as Markdown: the gate, a table of every arm, the ratios and their bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from speed_arms import Arm, ArmRun, Line
from speed_cases import Case

GATED = ("loss", "logps/chosen", "logps/rejected")
MEMORY_BAR = 2.0
TOLD = ("mfu", "padding", "real")
"""What of jdpo's own metrics is reported: keys with one of these in them."""


class Result(NamedTuple):
    """An arm, its runs, one a round, and the cold run before them, where it has one."""

    arm: Arm
    runs: list[ArmRun]
    cold: list[ArmRun]

    def first_steps(self) -> tuple[float, float | None]:
        """Seconds to the first step with nothing compiled, and the median of those with everything compiled."""
        first, *later = [run.first_step for run in (*self.cold, *self.runs)]
        return first, statistics.median(later) if later else None

    def seconds(self, warmup: int) -> list[list[float]]:
        """Step times [rounds][steps] without the warm-up."""
        return [[line["step_seconds"] for line in run.lines[warmup:]] for run in self.runs]

    def flat(self, warmup: int) -> list[float]:
        return [seconds for run in self.seconds(warmup) for seconds in run]

    def peak(self) -> int:
        return max(run.peak_rss for run in (*self.cold, *self.runs))

    def device_peak(self) -> float:
        """GiB on the accelerator as the arm itself tells them: on the CPU that is no measure, or none at all."""
        return max(line["peak_memory_gib"] for run in self.runs for line in run.lines)


class Verdict(NamedTuple):
    """One line of the ratios.

    Attributes:
      bar: least value of `medians`, or None.
    """

    what: str
    medians: float
    totals: float | None
    bar: float | None

    @property
    def passed(self) -> bool:
        return self.bar is None or self.medians >= self.bar


def gate(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """How far the first step's loss and mean log-probs of each arm are from the first arm's, relatively.

    Each arm has the figures of its first round; they do not change from round to round.
    """
    base = results[0].runs[0].lines[0]
    return {result.arm.name: differences(result.runs[0].lines[0], base) for result in results}


def differences(line: Line, base: Line) -> dict[str, float]:
    """Relative differences of two first steps.

    >>> differences({"loss": 1.1, "logps/chosen": -2, "logps/rejected": -3},
    ...             {"loss": 1.0, "logps/chosen": -2, "logps/rejected": -4})
    {'loss': 0.1000..., 'logps/chosen': 0.0, 'logps/rejected': 0.25}
    """
    return {name: abs(line[name] - base[name]) / abs(base[name]) for name in GATED}


def compare(other: Result, ours: Result, warmup: int, bar: float | None, what: str = "") -> Verdict:
    """Another arm's step times over ours, on the same steps."""
    medians = [statistics.median(result.flat(warmup)) for result in (other, ours)]
    totals = [sum(result.flat(warmup)) / len(result.runs) for result in (other, ours)]
    what = what or f"{other.arm.name} / {ours.arm.name}"
    return Verdict(what, medians[0] / medians[1], totals[0] / totals[1], bar)


def verdicts(case: Case, results: Mapping[str, Result], warmup: int) -> list[Verdict]:
    """Step time against the trainer of the same reference, memory, and each trainer's best arm against jdpo's best."""
    bars, found = dict(case.bars), []
    for key, result in results.items():
        trainer, reference = key.split()
        ours = results.get(f"jdpo {reference}")
        if trainer != "jdpo" and ours is not None:
            found.append(compare(result, ours, warmup, bars.get(trainer)))
    ours = [result for result in results.values() if result.arm.trainer == "jdpo"]
    others = [result for result in results.values() if result.arm.trainer == "trl"]
    if ours and others:
        best = [min(arms, key=lambda arm: statistics.median(arm.flat(warmup))) for arms in (others, ours)]
        found.append(compare(best[0], best[1], warmup, None, "the faster of each: TRL / jdpo"))
    for theirs in others:
        mine = results.get(f"jdpo {theirs.arm.reference}")
        if mine is not None:
            found.append(_memory(theirs, mine, case))
    return found


def _memory(theirs: Result, mine: Result, case: Case) -> Verdict:
    what = f"{theirs.arm.name} / {mine.arm.name}"
    if case.device == "gpu":
        return Verdict(f"peak memory of the GPU: {what}", theirs.device_peak() / mine.device_peak(), None, None)
    bar = MEMORY_BAR if case.bars else None
    return Verdict(f"peak resident memory: {what}", theirs.peak() / mine.peak(), None, bar)


def render_case(
    case: Case, results: Mapping[str, Result], warmup: int, facts: Sequence[str], notes: Sequence[str]
) -> tuple[list[str], bool]:
    """A case as Markdown lines, and whether the gate held and every bar was reached."""
    listed = list(results.values())
    distances = gate(listed)
    distances_of_all = [value for row in distances.values() for value in row.values()]
    worst = max(math.inf if math.isnan(value) else value for value in distances_of_all)
    held = worst <= case.tolerance
    lines = [f"## {case.name}", "", *facts, *(f"Left out: {note}" for note in notes), "", *_gate_table(listed)]
    lines += [
        "",
        f"Gate: the first step's loss and mean log-probs differ by at most {worst:.1e} relatively "
        f"(allowed {case.tolerance:.0e}): {'equal' if held else '**NOT EQUAL**'}.",
        "",
        *_times_table(case, listed, warmup),
        "",
        *_told(listed),
    ]
    found = verdicts(case, results, warmup)
    lines += ["| ratio | of medians | of totals | bar | |", "|---|---:|---:|---:|---|"]
    for verdict in found:
        totals = "" if verdict.totals is None else f"{verdict.totals:.2f}"
        bar = "" if verdict.bar is None else f"{verdict.bar:g}"
        mark = "" if verdict.bar is None else "reached" if verdict.passed else "**missed**"
        lines.append(f"| {verdict.what} | {verdict.medians:.2f} | {totals} | {bar} | {mark} |")
    return [*lines, ""], held and all(verdict.passed for verdict in found)


def _gate_table(results: Sequence[Result]) -> list[str]:
    lines = ["| first step | " + " | ".join(GATED) + " |", "|---|" + "---:|" * len(GATED)]
    for result in results:
        first = result.runs[0].lines[0]
        lines.append(f"| {result.arm.name} | " + " | ".join(f"{first[name]:.6f}" for name in GATED) + " |")
    return lines


def _times_table(case: Case, results: Sequence[Result], warmup: int) -> list[str]:
    lines = [
        "| arm | step, s: median (quartiles) | all steps of a round, s | pairs/s | first step, s: cold, warm "
        "| peak resident, MiB: steps, whole | GPU, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        seconds = result.flat(warmup)
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


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile, interpolated.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _told(results: Sequence[Result]) -> list[str]:
    """What jdpo's own log says: medians over the steps of its last round, and of the whole epoch for padding."""
    lines = []
    for result in results:
        if result.arm.trainer != "jdpo":
            continue
        last = result.runs[-1].lines
        keys = [key for key in last[-1] if any(word in key for word in TOLD)]
        values = [f"{key} {statistics.median(float(line[key]) for line in last if key in line):.4g}" for key in keys]
        shares = [float(line["padding"]) for run in result.cold for line in run.lines if "padding" in line]
        if shares:
            values.append(f"padding over the {len(shares)} steps of its epoch {statistics.mean(shares):.1%}")
        if values:
            lines += [f"{result.arm.name}, by its own log: {', '.join(values)}.", ""]
    return lines
