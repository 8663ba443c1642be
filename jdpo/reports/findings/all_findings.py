"""All findings about a run, the most serious first."""

from __future__ import annotations

import itertools

from jdpo.reports.findings.chosen_fall import chosen_fall
from jdpo.reports.findings.cost_findings import cost_findings
from jdpo.reports.findings.data_findings import data_findings
from jdpo.reports.findings.held_out_findings import held_out_findings
from jdpo.reports.findings.learnt_nothing import dead_gradients, learnt_nothing, size_findings
from jdpo.reports.findings.mirror_findings import mirror_findings
from jdpo.reports.findings.optimizer_findings import optimizer_findings
from jdpo.reports.findings.run_facts import LEVELS, Finding, RunFacts
from jdpo.reports.findings.saturation import saturation
from jdpo.reports.findings.series import Lines, RunMetrics


def findings_of(lines: Lines, facts: RunFacts) -> list[Finding]:
    """Returns what the lines of metrics.jsonl and the facts show, the most serious first.

    Args:
      lines: the objects of a metrics.jsonl, up to the step that the findings are about.
    """
    metrics = RunMetrics(lines, has_reference=facts.has_reference)
    found = itertools.chain(
        # Without gradients nothing is learnt, and the advice is another one.
        list(dead_gradients(metrics, facts)) or learnt_nothing(metrics, facts),
        held_out_findings(metrics, facts),
        chosen_fall(metrics, facts),
        saturation(metrics, facts),
        size_findings(metrics, facts),
        optimizer_findings(metrics, facts),
        data_findings(metrics, facts),
        cost_findings(metrics, facts),
        mirror_findings(facts),
    )
    # The sort is stable: findings of one level keep the order above.
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))
