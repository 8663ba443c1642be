"""The verdicts of the speed benchmark: the gate, the ratios, and the bars they are compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from speed_arms import CHECKPOINTED, GATE, MAIN, ONE_PAIR, WARMUP, Arm
from speed_cases import Case
from speed_run import ArmRun, Before, Line

GATED = ("loss", "logps/chosen", "logps/rejected")
MEMORY_BAR = 2.0
PADDING_BAR = 0.1
REFERENCES = {"trl": ("live", "cached"), "tunix": ("live",)}
NAMES = {"trl": "TRL", "tunix": "Tunix"}


class Result(NamedTuple):
    """An arm with its runs, one per round, the cold run before them if it has one, and its preparation."""

    arm: Arm
    runs: list[ArmRun]
    cold: list[ArmRun]
    before: list[Before]

    def first_steps(self) -> tuple[float, float | None]:
        """Seconds to the first step with nothing compiled, and their median with everything compiled."""
        first, *later = [run.first_step for run in (*self.cold, *self.runs)]
        return first, statistics.median(later) if later else None

    def seconds(self) -> list[list[float]]:
        """Times of the measured steps [rounds][steps]."""
        return [[line["step_seconds"] for line in run.measured] for run in self.runs]

    def flat(self) -> list[float]:
        return [seconds for run in self.seconds() for seconds in run]

    def by_step(self) -> list[float]:
        """The median over rounds of each measured step."""
        return [statistics.median(of_step) for of_step in zip(*self.seconds(), strict=True)]

    def peak(self) -> int:
        """Peak resident bytes of any process that the arm needs."""
        runs = [run.peak_rss for run in (*self.cold, *self.runs)]
        return max([*runs, *(before.peak_rss for before in self.before)])

    def device_peak(self) -> float:
        """GiB on the accelerator as the arm reports them; meaningless or missing on the CPU."""
        return max(line["peak_memory_gib"] for run in self.runs for line in run.lines)


class Verdict(NamedTuple):
    """One line of the ratios.

    Attributes:
      figure: what is compared with the bar: a ratio of medians, or a share; None: not measured.
      totals: ratio of all steps together.
      paired: median over steps of the ratio of that step's times.
      bar: or None, where nothing is asked for.
      at_most: whether the figure is a share that may not be above the bar.
    """

    what: str
    figure: float | None
    totals: float | None = None
    paired: float | None = None
    bar: float | None = None
    at_most: bool = False

    @property
    def passed(self) -> bool:
        if self.bar is None:
            return True
        if self.figure is None or math.isnan(self.figure):
            return False
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


class Padding(NamedTuple):
    """Shares of jdpo's slots that hold no token: of the measured steps, by its log; of all steps, as planned."""

    measured: float
    table: float
    num_steps: int


# --- the gate


class GateRow(NamedTuple):
    """The relative difference of two arms' figures, and whether it is allowed."""

    name: str
    first: dict[str, float]
    later: dict[str, float]
    held: bool


def first_steps_gate(case: Case, results: Sequence[Result]) -> list[GateRow]:
    """Compares the first step of every arm with that of the first arm."""
    base = results[0].runs[0].lines[0]
    rows = []
    for result in results:
        found = differences(result.runs[0].lines[0], base)
        rows.append(GateRow(result.arm.name, found, {}, worst(found.values()) <= case.tolerance))
    return rows


def all_steps_gate(case: Case, results: Mapping[str, Result]) -> list[GateRow]:
    """Compares every step of TRL's arms with jdpo's on the same file; empty if one of them did not run."""
    ours = next((result for result in results.values() if result.arm.role == GATE), None)
    if ours is None:
        return []
    rows = []
    for theirs in (result for result in results.values() if result.arm.trainer == "trl"):
        count = WARMUP + theirs.arm.num_measured  # the first of several passes
        pairs = zip(theirs.runs[0].lines[:count], ours.runs[0].lines[:count], strict=True)
        first, *later = [differences(line, base) for base, line in pairs]
        most = {name: worst(row[name] for row in later) for name in GATED}
        if case.later_tolerance is None:
            held = worst([*first.values(), *most.values()]) <= case.tolerance
        else:
            held = worst(first.values()) <= case.tolerance and most["loss"] <= case.later_tolerance
        rows.append(GateRow(theirs.arm.name, first, most, held))
    return rows


def differences(line: Line, base: Line) -> dict[str, float]:
    """Returns the relative differences of two steps.

    >>> differences({"loss": 1.1, "logps/chosen": -2, "logps/rejected": -3},
    ...             {"loss": 1.0, "logps/chosen": -2, "logps/rejected": -4})
    {'loss': 0.1000..., 'logps/chosen': 0.0, 'logps/rejected': 0.25}
    """
    return {name: abs(line[name] - base[name]) / abs(base[name]) for name in GATED}


def worst(values: Iterable[float]) -> float:
    """Returns the largest value; NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


# --- ratios and bars


def compare(other: Result, ours: Result, bar: float | None, what: str = "") -> Verdict:
    """Returns the ratios of another arm's step times to ours, on the same steps."""
    medians = [statistics.median(result.flat()) for result in (other, ours)]
    totals = [sum(result.flat()) / len(result.runs) for result in (other, ours)]
    paired = [theirs / mine for theirs, mine in zip(other.by_step(), ours.by_step(), strict=True)]
    what = what or f"{other.arm.name} / {ours.arm.name}"
    return Verdict(what, medians[0] / medians[1], totals[0] / totals[1], statistics.median(paired), bar)


def verdicts(
    case: Case, results: Mapping[str, Result], padding: Padding | None, wanted: Collection[str]
) -> list[Verdict]:
    """Returns all ratios of a case; a bar without the arm of a wanted trainer is not measured and not passed."""
    found = _times(case, results, wanted)
    if {"jdpo", "trl"} <= set(wanted):
        found += _memory(case, results)
    if "jdpo" in wanted:
        bar = PADDING_BAR if case.bars else None
        found += _padding(padding, bar)
    return found


def _times(case: Case, results: Mapping[str, Result], wanted: Collection[str]) -> list[Verdict]:
    """Compares the main arms with jdpo under the same reference, which have bars; then TRL's further arms."""
    bars, found = dict(case.bars), []
    for trainer, references in REFERENCES.items():
        if trainer not in wanted or "jdpo" not in wanted:
            continue
        for reference in references:
            theirs, ours = results.get(f"{trainer} {reference} {MAIN}"), results.get(f"jdpo {reference} {MAIN}")
            if theirs is not None and ours is not None:
                found.append(compare(theirs, ours, bars.get(trainer)))
            elif trainer in bars:
                what = f"{NAMES[trainer]} / jdpo, {reference} reference"
                found.append(Verdict(what, None, bar=bars[trainer]))
    live = results.get(f"jdpo live {MAIN}")
    if live is not None:
        more = [results.get(f"trl live {role}") for role in (ONE_PAIR, CHECKPOINTED)]
        found += [compare(theirs, live, None) for theirs in more if theirs is not None]
    mine = [result for result in results.values() if result.arm.trainer == "jdpo" and result.arm.role != GATE]
    others = [result for result in results.values() if result.arm.trainer == "trl"]
    if mine and others:
        best, own = (min(arms, key=lambda arm: statistics.median(arm.flat())) for arms in (others, mine))
        what = f"the faster of each: TRL / jdpo: {best.arm.name} / {own.arm.name}"
        found.append(compare(best, own, None, what))
    return found


def _memory(case: Case, results: Mapping[str, Result]) -> list[Verdict]:
    """Compares the memory of TRL as configured with jdpo's, then that of TRL's whole-step arm with least memory."""
    on_gpu = case.device == "gpu"
    bar = MEMORY_BAR if case.bars and not on_gpu else None
    kind = "peak memory of the GPU" if on_gpu else "peak resident memory"

    def peak(result: Result) -> float:
        return result.device_peak() if on_gpu else result.peak()

    def ratio(what: str, theirs: Result | None, mine: Result | None, bar: float | None) -> list[Verdict]:
        if theirs is None or mine is None:
            return [] if bar is None else [Verdict(f"{kind}: {what}", None, bar=bar)]
        names = f"{theirs.arm.name} / {mine.arm.name}"
        return [Verdict(f"{kind}: {what}{names}", peak(theirs) / peak(mine), bar=bar)]

    found = []
    for reference in REFERENCES["trl"]:
        mine = results.get(f"jdpo {reference} {MAIN}")
        found += ratio("", results.get(f"trl {reference} {MAIN}"), mine, bar)
    if not case.more_trl:
        return found
    keys = [f"trl live {MAIN}", f"trl cached {MAIN}", f"trl live {CHECKPOINTED}"]
    whole = [results[key] for key in keys if key in results]
    least = min(whole, key=peak) if len(whole) == len(keys) else None
    mine = None if least is None else results.get(f"jdpo {least.arm.reference} {MAIN}")
    found += ratio("TRL's least at a whole step: ", least, mine, bar)
    return found + ratio("", results.get(f"trl live {ONE_PAIR}"), results.get(f"jdpo live {MAIN}"), None)


def _padding(padding: Padding | None, bar: float | None) -> list[Verdict]:
    if padding is None:
        return [] if bar is None else [Verdict("padding of jdpo", None, bar=bar, at_most=True)]
    return [
        Verdict("padding of jdpo's measured steps, by its log", padding.measured, at_most=True),
        Verdict(
            f"padding of jdpo's {padding.num_steps} steps of the whole table", padding.table, bar=bar, at_most=True
        ),
    ]
