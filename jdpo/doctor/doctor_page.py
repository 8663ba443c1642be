"""The page of `jdpo doctor`: a line per finding, for a terminal and for the log of a job."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from jdpo.config import public_text
from jdpo.doctor.finding import Finding
from jdpo.safe_text import terminal
from jdpo.words import figure

WIDTH = 118
_LEVEL_WIDTH, _SUBJECT_WIDTH = 9, 17


def page(findings: Sequence[Finding]) -> str:
    """Returns the page: a heading that counts what is wrong, a line per finding, and what to do after each fault."""
    return "\n".join([f"jdpo doctor: {summary(findings)}", "", *map(_lines, findings), ""])


def summary(findings: Sequence[Finding]) -> str:
    """Returns the number of problems and warnings in words."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    return " and ".join(figure(count, level) for level, count in counts.items() if count) or "all is well"


def first_problem(findings: Sequence[Finding]) -> str:
    """Returns the first problem in one line; "" if there is none."""
    problems = [finding for finding in findings if finding.level == "problem"]
    return terminal(public_text(f"{problems[0].subject}: {problems[0].text}")) if problems else ""


def _lines(finding: Finding) -> str:
    indent = " " * (_LEVEL_WIDTH + _SUBJECT_WIDTH)
    head = f"{finding.level:<{_LEVEL_WIDTH}}{finding.subject:<{_SUBJECT_WIDTH}}"
    # Names of hosts and files, and errors of libraries, are foreign text.
    text = " ".join(terminal(public_text(finding.text)).split())
    lines = [textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)]
    if finding.advice:
        lines.append(
            textwrap.fill(
                f"-> {finding.advice}",
                WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}   ",
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)
