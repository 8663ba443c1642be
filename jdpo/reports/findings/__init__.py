"""Findings of a run about itself, for its terminal, report.html and the model card.

`findings_of(lines, facts)` turns the lines of metrics.jsonl and a few facts about the run into findings, each with a
level, the figures that show it and advice; `verdict` sums them up in a few sentences. Both are pure: the same files
give the same findings, so that they are computed again wherever they are shown, and not stored.
"""

from jdpo.reports.findings.all_findings import findings_of
from jdpo.reports.findings.run_facts import LEVELS, Finding, Level, RunFacts, Status
from jdpo.reports.findings.verdicts import finding_lines, verdict

__all__ = ["LEVELS", "Finding", "Level", "RunFacts", "Status", "finding_lines", "findings_of", "verdict"]
