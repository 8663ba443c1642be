"""Figures on held-out pairs: what two models make of answers that others wrote.

Axes: b pairs, n=2 sides (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jdpo.comparison.compare_document import Better, CalibrationBin, Figure, Unit, Values
from jdpo.comparison.intervals import Estimate, change_of, mcnemar, mean_of, share_of
from jdpo.types import CHOSEN, REJECTED

NUM_BINS = 10


class PairRows(NamedTuple):
    """Held-out pairs, and the log-probs of their completions under one model or two.

    Attributes:
      datasets: labels of the datasets.
      dataset_of: int [b], the dataset of each pair.
      prompts: uint64 [b], a hash of the prompt.
      origins: file and row of each pair.
      lengths: int [b, 2], learnt tokens of each side.
      before, after: float64 [b, 2], log-probs summed over them.
    """

    datasets: tuple[str, ...]
    dataset_of: np.ndarray
    prompts: np.ndarray
    origins: list[str]
    lengths: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def of(self, rows: np.ndarray) -> PairRows:
        """Selects the given rows, int or bool [b]."""
        return PairRows(
            self.datasets,
            self.dataset_of[rows],
            self.prompts[rows],
            [self.origins[row] for row in np.arange(len(self.origins))[rows].tolist()],
            self.lengths[rows],
            self.before[rows],
            self.after[rows],
        )

    def margins(self, beta: float) -> np.ndarray:
        """Returns the margins of the implicit rewards, with the model before as the reference, [b]."""
        return beta * gap(self.after - self.before)


class _Measure(NamedTuple):
    name: str
    title: str
    unit: Unit
    better: Better
    compute: Callable[[PairRows, float], Values]
    neutral: float | None = 0.0


def pair_figures(rows: PairRows, beta: float) -> Iterator[Figure]:
    """Yields the figures of pairs, over all of them and for each dataset if there are several.

    Args:
      beta: of the implicit reward, beta * log(after / before).
    """
    for measure in _MEASURES:
        by_dataset = {}
        if len(rows.datasets) > 1:
            for number, label in enumerate(rows.datasets):
                if (of_dataset := rows.dataset_of == number).any():
                    by_dataset[label] = measure.compute(rows.of(of_dataset), beta)
        yield Figure(
            name=measure.name,
            title=measure.title,
            section="calibration" if measure.name.startswith("calibration") else "pairs",
            unit=measure.unit,
            better=measure.better,
            all=measure.compute(rows, beta),
            datasets=by_dataset,
            neutral=measure.neutral,
        )


def gap(logps_bn: np.ndarray) -> np.ndarray:
    """Returns chosen minus rejected, [b]."""
    difference: np.ndarray = logps_bn[:, CHOSEN] - logps_bn[:, REJECTED]
    return difference


def is_right(margins_b: np.ndarray) -> np.ndarray:
    """Returns 1 where the chosen answer is preferred, 0 where the rejected one is, and 0.5 for a tie.

    In the metrics of training a tie counts 0. Here two equal models must come out at one half.
    """
    found: np.ndarray = (1 + np.sign(margins_b)) / 2
    return found


def length_rule(rows: PairRows) -> tuple[str, np.ndarray]:
    """Returns the better of "longer" and "shorter" on these rows, and what it gets right: 0, 0.5 or 1 [b]."""
    longer = is_right(gap(rows.lengths.astype(float)))
    return ("longer", longer) if longer.mean() >= 0.5 else ("shorter", 1 - longer)


# --- each measure: (rows, beta) -> values


def _about_both(estimate: Estimate, rows: PairRows) -> Values:
    """Values of a figure about both models at once."""
    return Values(after=estimate, num_prompts=_num_prompts(rows), num_rows=len(rows.origins))


def _num_prompts(rows: PairRows) -> int:
    return len(np.unique(rows.prompts))


def _accuracy(rows: PairRows, beta: float) -> Values:
    return _about_both(share_of(is_right(rows.margins(beta)), rows.prompts), rows)


def _length_only(rows: PairRows, beta: float) -> Values:
    return _about_both(share_of(length_rule(rows)[1], rows.prompts), rows)


def _over_length(rows: PairRows, beta: float) -> Values:
    return _about_both(change_of(length_rule(rows)[1], is_right(rows.margins(beta)), rows.prompts), rows)


def _margin(rows: PairRows, beta: float) -> Values:
    return _about_both(mean_of(rows.margins(beta), rows.prompts), rows)


def _likelier(per_token: bool) -> Callable[[PairRows, float], Values]:
    def compute(rows: PairRows, beta: float) -> Values:
        divisor = rows.lengths if per_token else 1
        before, after = (is_right(gap(logps / divisor)) for logps in (rows.before, rows.after))
        num_prompts = _num_prompts(rows)
        return Values(
            before=share_of(before, rows.prompts),
            after=share_of(after, rows.prompts),
            difference=change_of(before, after, rows.prompts),
            num_prompts=num_prompts,
            num_rows=len(rows.origins),
            # The test assumes independent rows.
            p_value=mcnemar(before == 1, after == 1) if num_prompts == len(rows.origins) else None,
        )

    return compute


def _logps(side: int, per_token: bool) -> Callable[[PairRows, float], Values]:
    def compute(rows: PairRows, beta: float) -> Values:
        # Weighted by tokens, so that the sum over rows is a mean over all tokens.
        tokens = rows.lengths[:, side].astype(float) if per_token else np.ones(len(rows.origins))
        before, after = (logps[:, side] / tokens for logps in (rows.before, rows.after))
        return Values(
            before=mean_of(before, rows.prompts, tokens, at_most=0),
            after=mean_of(after, rows.prompts, tokens, at_most=0),
            difference=mean_of(after - before, rows.prompts, tokens),
            num_prompts=_num_prompts(rows),
            num_rows=len(rows.origins),
        )

    return compute


def _chosen_fell(rows: PairRows, beta: float) -> Values:
    return _about_both(share_of((rows.after < rows.before)[:, CHOSEN], rows.prompts), rows)


# --- calibration: how often the preferred answer is the chosen one, given how sure the model is


def _confidence(rows: PairRows, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns confidence in [0.5, 1], what was right, and the bin, [b] each."""
    margins = rows.margins(beta)
    # The larger of sigmoid(m) and sigmoid(-m); exp of a negative number cannot overflow.
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    return confidence, is_right(margins), bins


def calibration_bins(rows: PairRows, beta: float) -> list[CalibrationBin]:
    """Returns confidence and accuracy in bins of equal width between 0.5 and 1."""
    confidence, right, bins = _confidence(rows, beta)
    found = []
    for number in range(NUM_BINS):
        inside = bins == number
        low, high = (0.5 + 0.5 * (number + end) / NUM_BINS for end in (0, 1))
        some = bool(inside.any())
        found.append(
            CalibrationBin(
                low=low,
                high=high,
                num_rows=int(inside.sum()),
                confidence=float(confidence[inside].mean()) if some else None,
                accuracy=share_of(right[inside], rows.prompts[inside]) if some else None,
            )
        )
    return found


def _calibration_error(rows: PairRows, beta: float) -> Values:
    confidence, right, bins = _confidence(rows, beta)
    missed = confidence - right
    # The error is the mean of the rows' misses, each with the sign of its bin; signs are taken as given.
    signs = np.sign(np.bincount(bins, missed, minlength=NUM_BINS))
    found = mean_of(signs[bins] * missed, rows.prompts)
    low = None if found.low is None else max(found.low, 0.0)
    return _about_both(found._replace(low=low), rows)


def _overconfidence(rows: PairRows, beta: float) -> Values:
    confidence, right, _ = _confidence(rows, beta)
    return _about_both(mean_of(confidence - right, rows.prompts), rows)


_MEASURES = (
    _Measure("accuracy", "Accuracy of the implicit reward", "share", "up", _accuracy, 0.5),
    _Measure("accuracy.length_only", "Accuracy of a rule on lengths", "share", "neither", _length_only, None),
    _Measure("accuracy.over_length", "Accuracy above that rule", "points", "up", _over_length, None),
    _Measure("accuracy.logps", "Chosen likelier than rejected", "share", "up", _likelier(False)),
    _Measure("accuracy.logps_per_token", "Chosen likelier per token", "share", "up", _likelier(True)),
    _Measure("margin", "Margin of the implicit reward", "reward", "up", _margin),
    _Measure("logps.chosen", "Chosen log-prob", "nats", "up", _logps(CHOSEN, False)),
    _Measure("logps.rejected", "Rejected log-prob", "nats", "neither", _logps(REJECTED, False)),
    _Measure("logps_per_token.chosen", "Chosen log-prob per token", "nats/token", "up", _logps(CHOSEN, True)),
    _Measure(
        "logps_per_token.rejected",
        "Rejected log-prob per token",
        "nats/token",
        "neither",
        _logps(REJECTED, True),
    ),
    _Measure("chosen_fell", "Chosen became less likely", "share", "down", _chosen_fell, None),
    _Measure("calibration.error", "Expected calibration error", "share", "down", _calibration_error, None),
    _Measure("calibration.overconfidence", "Confidence above accuracy", "points", "neither", _overconfidence),
)
