"""`jdpo eval`: one model on held-out pairs and facts, with or without a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdpo._version import __version__
from jdpo.comparison.compare_document import DOCUMENT_VERSION, ComparedModel, Figure, Values, plain_values
from jdpo.comparison.figures.fact_figures import fact_figures
from jdpo.comparison.figures.pair_figures import pair_figures
from jdpo.comparison.measuring import Log, Material, aligned, measure_model
from jdpo.generation.loaded_model import LoadedModel

WITHOUT_REFERENCE = (
    "accuracy.length_only",
    "accuracy.logps",
    "accuracy.logps_per_token",
    "logps.chosen",
    "logps.rejected",
    "logps_per_token.chosen",
    "logps_per_token.rejected",
    "facts.probability",
    "facts.accuracy",
)
"""Figures that need no second model."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The report of `jdpo eval`.

    Attributes:
      reference: None: figures are those of the model alone.
      beta: of the implicit reward; None without a reference.
      warnings: what limits the figures, in sentences.
    """

    model: ComparedModel
    reference: ComparedModel | None
    beta: float | None
    figures: Sequence[Figure]
    warnings: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON has it, with the figures by name."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        own["figures"] = {figure.name: figure for figure in self.figures}
        return {"jdpo": __version__, "version": DOCUMENT_VERSION, **plain_values(own)}


def evaluate(
    model: str, reference: str | None, material: Material, beta: float, load: Callable[[str], LoadedModel], log: Log
) -> Evaluation:
    """Evaluates a model; with a reference, relative to it.

    Args:
      beta: of the implicit reward.
      load: opens a model; one at a time is in memory.

    Raises:
      ValueError: a model or a file cannot be read.
    """
    before = None if reference is None else measure_model(load(reference), reference, material, log)
    # The reference has been freed: only its values are kept.
    after = measure_model(load(model), model, material, log)
    figures: list[Figure] = []
    warnings: list[str] = []
    if after.pairs is not None:
        # Without a reference the model is on both sides, and only what one model gives is kept below.
        rows, warnings = aligned((before or after).pairs or after.pairs, after.pairs)
        figures += pair_figures(rows, beta)
    if material.facts:
        figures += fact_figures(material.facts, np.exp((before or after).facts), np.exp(after.facts))
    if before is None:
        figures = list(_alone(figures))
    return Evaluation(
        model=after.model,
        reference=None if before is None else before.model,
        beta=None if before is None else beta,
        figures=figures,
        warnings=warnings,
    )


def _alone(figures: Sequence[Figure]) -> Iterator[Figure]:
    """Yields the figures of one model, without a comparison."""
    for figure in figures:
        if figure.name in WITHOUT_REFERENCE:
            datasets = {label: _after_alone(values) for label, values in figure.datasets.items()}
            yield dataclasses.replace(figure, all=_after_alone(figure.all), datasets=datasets, neutral=None)


def _after_alone(values: Values) -> Values:
    return dataclasses.replace(values, before=None, difference=None, p_value=None)
