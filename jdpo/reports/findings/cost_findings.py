"""Findings about time that a run did not need to spend."""

from __future__ import annotations

from collections.abc import Iterator

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.reports.findings.series import RunMetrics, mean_of
from jdpo.words import figure, percent

LONG_WAIT = 0.05
"""Share of the time of the steps that the devices may wait for batches."""

SHORT = 60.0
"""Seconds of steps and waiting; in less time than this nothing is lost that matters."""

MOSTLY_WASTED = 0.25
"""Share of padding, where pairs are packed, from which a batch is too small for its devices."""

FEW_ROWS = 8
"""With more rows per device than this, padding has another cause."""


def cost_findings(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about late compilations, waiting for data, and batches too small for the devices."""
    yield from _padding(metrics, facts)
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


def _padding(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    points = metrics.training("padding")
    parts = facts.batch_parts or 1
    # On one device a larger batch pads as much; with many rows per device it is not the batch.
    if parts == 1 or not points or facts.batch_size > FEW_ROWS * parts:
        return
    padding = mean_of(points)
    if padding.value <= MOSTLY_WASTED:
        return
    rows = figure(facts.batch_size / parts, "pair" if facts.command == "dpo" else "row")
    yield Finding(
        "mostly_padding",
        "note",
        "Much of what the devices computed was padding",
        f"{percent(padding.value)} of the slots {padding.where}; a device has {rows} per step.",
        "A device waits for the one with the longest rows. Use a larger global_batch_size, fewer devices, or a larger "
        "mesh.tensor; the log of the run's start says what these would save.",
    )
