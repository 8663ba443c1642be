"""The result of a comparison as values: `compare.json` holds them, table and page show them and add nothing.

Every comparison is between the model before and one model after; a document has one per model after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jdpo.comparison.intervals import Estimate

DOCUMENT_VERSION = 1
"""Raise this when a key changes its meaning or is removed."""

Better = Literal["up", "down", "neither"]
Section = Literal["pairs", "calibration", "divergence", "answers", "wins", "facts"]
Unit = Literal["share", "points", "nats", "nats/token", "tokens", "characters", "reward"]
"""Units of values; "points" is a difference of two shares, stored as such and shown as percentage points."""
Finding = Literal["better", "worse", "changed", "unclear", "unchanged"]

SECTIONS: dict[Section, str] = {
    "pairs": "Held-out pairs",
    "calibration": "Calibration of the margin",
    "divergence": "Distance between the models, in nats",
    "answers": "Answers",
    "wins": "Win rate",
    "facts": "Facts",
}
"""Section of figures -> its heading, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """The numbers of a figure, of all rows or of one dataset.

    Attributes:
      before, after: of each model. A figure about both models at once, such as a win rate, has `after` alone.
      difference: after minus before, row by row; None if there is no `before`.
      num_prompts: prompts that the intervals are over.
      num_rows: rows or answers.
      p_value: McNemar's exact test, for a change in accuracy if no prompt has several rows.
    """

    after: Estimate
    num_prompts: int
    num_rows: int
    before: Estimate | None = None
    difference: Estimate | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a comparison.

    Attributes:
      name: stable, for scripts and `--fail_if`: "accuracy", "facts.accuracy".
      title: what it is, in words, starting with a capital letter; at most 33 characters with its unit, so that the
        table in a terminal has one line per figure.
      better: which direction is an improvement.
      all: over all rows.
      datasets: label -> over the rows of one dataset; empty if there is one dataset, or none.
      neutral: the value of `tested` if the models are equal; None: the figure is not tested, such as a distance.
    """

    name: str
    title: str
    section: Section
    unit: Unit
    better: Better
    all: Values
    datasets: Mapping[str, Values] = field(default_factory=dict)
    neutral: float | None = 0.0

    @property
    def tested(self) -> Estimate:
        """The estimate that shows a change, and that `--fail_if` reads: the difference, or else `after`."""
        return self.all.after if self.all.difference is None else self.all.difference

    @property
    def finding(self) -> Finding | None:
        """The finding over all rows; see `finding_of`."""
        return self.finding_of(self.all)

    def finding_of(self, values: Values) -> Finding | None:
        """Returns what an interval says of these values, such as those of one dataset.

        It is unclear if the interval contains `neutral`, and unchanged if it is `neutral` alone: every row is equal.
        None for a figure that is not tested.
        """
        _, low, high = values.after if values.difference is None else values.difference
        if self.neutral is None:
            return None
        if low == high == self.neutral:
            return "unchanged"
        if low is None or high is None or low <= self.neutral <= high:
            return "unclear"
        if self.better == "neither":
            return "changed"
        return "better" if (low > self.neutral) == (self.better == "up") else "worse"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A model: its name, the path as it was given, a digest of its weights, and the dtype of the computation."""

    name: str
    path: str
    digest: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ComparedFact:
    """The probability of the right answer to a question, before and after."""

    question: str
    answer: str
    before: float
    after: float
    fell: bool


@dataclass(frozen=True, kw_only=True)
class FallenPair:
    """A held-out pair whose chosen answer became less likely.

    Attributes:
      origin: file and row.
      num_tokens: learnt tokens of the chosen answer.
      before, after: its log-prob under each model.
    """

    origin: str
    dataset: str
    prompt: str
    chosen: str
    num_tokens: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Pairs whose confidence, the larger of sigmoid(margin) and 1 - sigmoid(margin), is in [low, high).

    Attributes:
      confidence: their mean confidence, or None in an empty bin.
      accuracy: the share of them whose chosen answer has the larger reward.
    """

    low: float
    high: float
    num_rows: int
    confidence: float | None
    accuracy: Estimate | None


@dataclass(frozen=True, kw_only=True)
class AnswerShown:
    """An answer of one model."""

    text: str
    num_tokens: int | None
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class AnswersSideBySide:
    """A prompt with one answer of each model.

    Attributes:
      prompt: its text; of a conversation, each message after its role.
      before, after: the answers with the same number among the samples.
      won: 1 if the answer after won, 0 if it lost, 0.5 for a tie; None if it was not judged, or the verdict is unknown.
    """

    prompt_id: str
    prompt: str
    sample: int
    before: AnswerShown
    after: AnswerShown
    won: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Plain sentences, chosen by the numbers."""

    better: Sequence[str]
    worse: Sequence[str]
    changed: Sequence[str]
    unclear: Sequence[str]
    unchanged: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model after, compared with the model before.

    Attributes:
      figures: by name, in the order in which they are shown.
      facts: all of them, those that fell most first.
      answers: at most a few hundred, of `num_answers`.
      fallen: the pairs whose chosen answers fell most, at most a few.
      rows: the lines of rows.parquet, which are not in `compare.json`.
    """

    after: ComparedModel
    figures: Mapping[str, Figure]
    verdict: Verdict
    calibration: Sequence[CalibrationBin] = ()
    facts: Sequence[ComparedFact] = ()
    answers: Sequence[AnswersSideBySide] = ()
    num_answers: int = 0
    fallen: Sequence[FallenPair] = ()
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class CompareDocument:
    """Everything that `jdpo compare` found.

    Attributes:
      settings: everything that was asked for, and digests of the files.
      warnings: what limits the figures, in sentences.
    """

    before: ComparedModel
    comparisons: Sequence[Comparison]
    settings: Mapping[str, Any]
    warnings: Sequence[str] = ()


NOT_IN_JSON = ("rows",)


def as_json(document: CompareDocument, version: str) -> dict[str, Any]:
    """Returns the content of `compare.json`; docs/compare.md lists its keys. NaN does not occur.

    Args:
      version: of jdpo.
    """
    found: dict[str, Any] = {"jdpo": version, "version": DOCUMENT_VERSION, **plain_values(document)}
    return found


def plain_values(value: Any) -> Any:
    """Returns dataclasses and estimates as JSON has them, without the fields in NOT_IN_JSON."""
    if isinstance(value, Estimate):
        return dict(zip(("value", "low", "high"), value, strict=True))
    if dataclasses.is_dataclass(value):
        own = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.name not in NOT_IN_JSON}
        if isinstance(value, Figure):
            own["finding"] = value.finding
        return plain_values(own)
    if isinstance(value, Mapping):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    return [plain_values(inner) for inner in value] if isinstance(value, list | tuple) else value
