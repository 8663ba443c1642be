"""Writes the report of a finished experiment: report.json, report.md and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from jdpo._version import __version__
from jdpo.durable import write_durably
from jdpo.quickstart.experiment import PRETRAIN, Workplace
from jdpo.quickstart.experiment_findings import findings
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.pictures import write_plots
from jdpo.quickstart.probes import Measurement
from jdpo.quickstart.results import all_results
from jdpo.quickstart.samples import Sampled
from jdpo.quickstart.tables import Table, all_tables, markdown_table


class Report(NamedTuple):
    """The content of a report, and its files."""

    tables: list[Table]
    sentences: dict[str, list[str]]
    files: list[Path]


def write_report(
    place: Workplace, settings: Settings, measurements: dict[str, list[Measurement]], sampled: Sequence[Sampled]
) -> Report:
    """Writes report.json, report.md and the plots.

    The same measurements give the same report.json byte for byte: it holds no times and no paths.
    """
    results = all_results(settings, measurements)
    sentences = findings(results)
    tables = all_tables(results, sampled)
    plots = write_plots(results, place.path / "plots")
    report = {
        "jdpo": __version__,
        "settings": dataclasses.asdict(settings),
        **results,
        "samples": [row._asdict() for row in sampled],
        "findings": sentences,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_durably(place.report, text)
    page = place.path / "report.md"
    write_durably(page, _page(sentences, tables, [plot.relative_to(place.path) for plot in plots]))
    return Report(tables, sentences, [page, place.report, *plots])


def _page(sentences: Mapping[str, Sequence[str]], tables: Sequence[Table], plots: Sequence[Path]) -> str:
    """Returns each heading with its picture, its sentences and its table, and the sampled answers at the end."""
    *measured, sampled = tables
    parts = ["# Standard training and DPO, side by side\n"]
    # The last heading, on the cost, has a picture and no table.
    for (heading, lines), plot, table in zip_longest(sentences.items(), plots, measured):
        bullets = "\n".join(f"- {line}" for line in lines)
        parts.append(f"## {heading}\n\n![{heading}]({plot.as_posix()})\n\n{bullets}\n")
        if table is not None:
            parts.append(f"{markdown_table(table)}\n")
    parts.append(f"## Sampled answers\n\n{markdown_table(sampled)}\n")
    parts.append(
        f"Every number is in report.json. The models are under runs/; the pre-trained one is runs/{PRETRAIN}/model.\n"
    )
    return "\n".join(parts)
