"""The files of a comparison: compare.json, rows.parquet and compare.html."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jdpo._version import __version__
from jdpo.comparison.compare_document import CompareDocument, as_json
from jdpo.comparison.compare_page import write_compare_page
from jdpo.durable import replacing, write_durably
from jdpo.safe_text import terminal

JSON_FILE, ROWS_FILE, PAGE_FILE = "compare.json", "rows.parquet", "compare.html"


def write_comparison(document: CompareDocument, folder: Path, log: Callable[[str], None]) -> None:
    """Writes the files of a comparison; compare.json last, so that a folder that has it has all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"model": number, **line}
        for number, comparison in enumerate(document.comparisons, 1)
        for line in comparison.rows
    ]
    # Lines of pairs, answers and facts have other columns; the missing ones are null.
    names = dict.fromkeys(name for line in lines for name in line)
    table = pa.table({name: [line.get(name) for line in lines] for name in names})
    with replacing(folder / ROWS_FILE) as file:
        pq.write_table(table, file)
    write_compare_page(document, folder / PAGE_FILE)
    # NaN is not JSON, and most readers refuse it.
    content = json.dumps(as_json(document, __version__), indent=1, ensure_ascii=False, allow_nan=False)
    write_durably(folder / JSON_FILE, content + "\n")
    log(f"wrote {', '.join(terminal(folder / name) for name in (JSON_FILE, ROWS_FILE, PAGE_FILE))}")
