"""A pytest plugin that counts the CPU seconds of every test, child processes included.

Wall times depend on what else the machine does; CPU seconds hardly do, so they are what the suite is kept small by.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

NUM_SHOWN = 10


def cpu_seconds() -> float:
    """Returns the user and system seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-table", type=Path, metavar="FILE", help="write the CPU seconds of every test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuSeconds(config.getoption("--cpu-table")), "cpu-seconds-counter")


class CpuSeconds:
    """Attaches its CPU seconds to every report; with xdist, workers send them to the process that sums up."""

    def __init__(self, table: Path | None) -> None:
        self._table = table
        self._seconds: Counter[str] = Counter()
        self._last = cpu_seconds()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self._last = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds = now - self._last  # type: ignore[attr-defined]
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._table is not None:
            rows = (f"{seconds:.2f}\t{test}\n" for test, seconds in self._seconds.most_common())
            self._table.write_text("".join(rows), encoding="utf-8")
        if not self._seconds:  # nothing ran
            return
        files: Counter[str] = Counter()
        for test, seconds in self._seconds.items():
            files[test.split("::")[0]] += seconds
        for title, counts in (("tests", self._seconds), ("files", files)):
            terminalreporter.section(f"CPU seconds: {sum(counts.values()):.0f} in tests; the slowest {title}")
            for name, seconds in counts.most_common(NUM_SHOWN):
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
