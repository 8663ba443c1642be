"""The outcomes of `mutants.py`: kept from run to run, and rendered as Markdown."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import commit, machine_line
from mutant_targets import Job

VERDICTS = ("killed", "timed out", "survived", "equivalent", "not run")


class Outcome(NamedTuple):
    """The result of a mutant.

    Attributes:
      job: the mutant and its tests.
      verdict: one of VERDICTS; one that timed out counts as killed.
      seconds: that its tests took.
      place: the date and the commit.
    """

    job: Job
    verdict: str
    seconds: float = 0.0
    place: str = ""


class Records:
    """Outcomes in a JSON file, so that a run of some areas or functions brings the report of all up to date."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        self._kept: dict[str, dict[str, Any]] = json.loads(text)
        self._place = f"{datetime.date.today()}, {commit()}"

    def keep(self, outcome: Outcome) -> None:
        """Writes an outcome down at once: a run may be interrupted."""
        kept = {"verdict": outcome.verdict, "seconds": round(outcome.seconds, 1), "place": self._place}
        self._kept[outcome.job.key] = kept
        self._write()

    def drop_all_but(self, jobs: Sequence[Job]) -> None:
        """Forgets mutants that are no longer in the sample."""
        keys = {job.key for job in jobs}
        self._kept = {key: kept for key, kept in self._kept.items() if key in keys}
        self._write()

    def outcomes(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Returns the outcome of every mutant of the sample."""
        return [self._outcome(job) for job in jobs]

    def _outcome(self, job: Job) -> Outcome:
        if job.reason is not None:
            return Outcome(job, "equivalent")
        kept = self._kept.get(job.key)
        return Outcome(job, "not run") if kept is None else Outcome(job, **kept)

    def _write(self) -> None:
        lines = [f"{json.dumps(key)}: {json.dumps(kept)}" for key, kept in sorted(self._kept.items())]
        self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def report(outcomes: Sequence[Outcome], *, seed: int, per_function: int, cpu_seconds: float) -> str:
    """Renders the figures and the survivors as Markdown."""
    areas = dict.fromkeys(outcome.job.target.area for outcome in outcomes)
    rows = [(area, [outcome for outcome in outcomes if outcome.job.target.area == area]) for area in areas]
    tested = [outcome.seconds for outcome in outcomes if outcome.seconds]
    places = sorted({outcome.place for outcome in outcomes if outcome.place})
    survivors = [outcome.job for outcome in outcomes if outcome.verdict == "survived"]
    equivalent = [outcome.job for outcome in outcomes if outcome.verdict == "equivalent"]
    return "\n".join(
        [
            "# Mutants",
            "",
            f"`python benchmarks/mutants.py --record`, {machine_line(('jax', 'pytest'))}; run on {'; '.join(places)}.",
            "",
            f"Seed {seed}, at most {per_function} per function; {sum(tested) / max(len(tested), 1):.0f} s per mutant. "
            f"A mutant whose tests take more than {cpu_seconds:.0f} CPU seconds has timed out and counts as killed.",
            "",
            f"| area | functions | mutants | {' | '.join(VERDICTS)} |",
            "|---|" + "---:|" * (2 + len(VERDICTS)),
            *(_row(area, of_area) for area, of_area in [*rows, ("all", outcomes)]),
            "",
            "## Survivors",
            "",
            *([f"```diff\n{job.diff()}\n```\n" for job in survivors] or ["None.\n"]),
            "## Equivalent mutants",
            "",
            "They change nothing that can be observed.",
            "",
            *(f"```diff\n{job.diff()}\n```\n\n{job.reason}\n" for job in equivalent),
        ]
    )


def _row(area: str, outcomes: Sequence[Outcome]) -> str:
    functions = {(outcome.job.target.module, outcome.job.mutant.function) for outcome in outcomes}
    counts = (sum(outcome.verdict == verdict for outcome in outcomes) for verdict in VERDICTS)
    return f"| {' | '.join(map(str, (area, len(functions), len(outcomes), *counts)))} |"
