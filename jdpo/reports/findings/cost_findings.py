"""Findings about time that a run did not need to spend."""

from __future__ import annotations

from collections.abc import Iterator

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.words import figure, percent

LONG_WAIT = 0.05
"""Share of the time of the steps that the devices may wait for batches."""

SHORT = 60.0
"""Seconds of steps and waiting; in less time than this nothing is lost that matters."""


def cost_findings(facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about late compilations and waiting for data."""
    timing = facts.timing
    if facts.late_programs:
        yield Finding(
            "late_compilation",
            "note",
            "Some programs were compiled while the devices waited",
            f"{figure(facts.late_programs, 'shape')} of batches.",
            "jdpo plans all shapes before the first step, so this is a fault of jdpo; please report it with the run's "
            "resolved_config.yaml. The results are not affected.",
        )
    wait = timing.get("data_wait", 0.0)
    total = wait + timing.get("step", 0.0)
    if total < SHORT or wait <= LONG_WAIT * total:
        return
    yield Finding(
        "data_wait",
        "warning",
        "The devices waited for data",
        f"{wait:,.0f} of {total:,.0f} seconds of training ({percent(wait / total)}).",
        "Batches are packed on the host: give it more cores, or read from a local disk. With micro_batch_size or "
        "max_tokens_per_device larger, a batch costs less work on the host.",
    )
