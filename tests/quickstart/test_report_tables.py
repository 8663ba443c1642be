"""The tables of the report say the same in the terminal and in report.md."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD, Workplace
from jdpo.quickstart.report import write_report
from jdpo.quickstart.samples import Sampled
from jdpo.quickstart.terminal_report import print_report
from tests.quickstart.test_experiment_findings import BEFORE_CORRECTION, SETTINGS, measured

ANSWERS = {PRETRAIN: {"Cork": 19, "a|b [bold] *c*": 1}, STANDARD: {"Dublin": 20}, DPO: {"Dublin": 20}}
SAMPLED = [Sampled("What is the capital of Ireland?", "corrected", "Dublin", ANSWERS)]


def test_terminal_and_page_hold_the_same_figures(tmp_path: Path) -> None:
    after = [BEFORE_CORRECTION, measured(10, (0.9, 0.0999, 0.00005))]
    runs = {PRETRAIN: [BEFORE_CORRECTION], STANDARD: after, DPO: after}
    report = write_report(Workplace(tmp_path), SETTINGS, runs, SAMPLED)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    screen = io.StringIO()
    print_report(Console(file=screen, width=100), *report)
    for text in ("Dublin (right)", "60.0 %", "1 : 2.0", "9.0 : 1", "30.0 % (0 %)", "corrected; right: Dublin"):
        assert text in page, text
        assert text in screen.getvalue(), text
    assert re.search(r"\be[-+]\d", page) is None, "one notation: no exponents"
    # Every line of a table has the cells of its header, whatever a model answered.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "[bold]" in screen.getvalue(), "an answer is no markup"
