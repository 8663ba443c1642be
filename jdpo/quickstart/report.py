"""Writes the report of a finished experiment: report.json, report.md and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo._version import __version__
from jdpo.durable import write_durably
from jdpo.quickstart.experiment import PRETRAIN, Workplace
from jdpo.quickstart.experiment_findings import findings
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.pictures import write_plots
from jdpo.quickstart.probes import Measurement
from jdpo.quickstart.results import all_results
from jdpo.quickstart.samples import Sampled


def write_report(
    place: Workplace, settings: Settings, measurements: dict[str, list[Measurement]], sampled: Sequence[Sampled]
) -> tuple[dict[str, Any], dict[str, list[str]], list[Path]]:
    """Writes the report; returns the results, the sentences and the files.

    The same measurements give the same report.json byte for byte: it holds no times and no paths.
    """
    results = all_results(settings, measurements)
    sentences = findings(results)
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
    markdown = place.path / "report.md"
    write_durably(markdown, _markdown(sentences, [plot.relative_to(place.path) for plot in plots]))
    return results, sentences, [markdown, place.report, *plots]


def _markdown(sentences: Mapping[str, Sequence[str]], plots: Sequence[Path]) -> str:
    """Returns each heading with its picture and its sentences."""
    parts = ["# Standard training and DPO, side by side\n"]
    for (heading, lines), plot in zip(sentences.items(), plots, strict=True):
        bullets = "\n".join(f"- {line}" for line in lines)
        parts.append(f"## {heading}\n\n![{heading}]({plot.as_posix()})\n\n{bullets}\n")
    parts.append(
        f"Every number is in report.json. The models are under runs/; the pre-trained one is runs/{PRETRAIN}/model.\n"
    )
    return "\n".join(parts)
