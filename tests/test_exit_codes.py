"""The table of exit codes in the documentation is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

from jdpo.exit_codes import EXIT_CODES, RESTART_CODES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_documented_exit_codes_are_those_of_the_code() -> None:
    (table,) = [
        found[1]
        for page in DOCS.glob("*.md")
        for found in re.finditer(r"<!-- table: exit codes -->(.*?)<!-- end -->", page.read_text("utf-8"), re.DOTALL)
    ]
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (yes|no) \|$", table, re.MULTILINE)
    assert rows == [(str(each.code), each.meaning, "yes" if each.restart else "no") for each in EXIT_CODES]


def test_launchers_restart_after_these_and_no_other() -> None:
    assert RESTART_CODES == (75, 124, 134, 137, 143)
