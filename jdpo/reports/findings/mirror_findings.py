"""Findings about the copy of a run in an object store."""

from __future__ import annotations

from collections.abc import Iterator

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.words import figure


def mirror_findings(facts: RunFacts) -> Iterator[Finding]:
    """Yields a finding if uploads to the mirror have failed."""
    mirror = facts.mirror
    if not mirror.get("failures"):
        return
    newest = f"its newest checkpoint is step {mirror['step']:,}" if "step" in mirror else "it has no checkpoint"
    error = f" The last error: {mirror['error']}." if mirror.get("error") else " Later ones succeeded."
    is_behind = bool(mirror.get("error"))
    yield Finding(
        "mirror_failed",
        "warning" if is_behind else "note",
        "The mirror is not up to date" if is_behind else "Some uploads to the mirror failed at first",
        f"{figure(mirror['failures'], 'upload')} to {mirror.get('address')} failed; {newest}.{error}",
        "Check that the bucket exists, and that this machine may write and delete in it. The same command uploads what "
        "is missing, also after the run is finished.",
    )
