"""From measured log-probabilities to the numbers of the report.

Axes: c countries, p phrasings, a=3 answers (capital, wrong, other).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jdpo.quickstart.corpus import answer_counts
from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.geography import Country
from jdpo.quickstart.probes import NUM_PROBED_TRAINING, Measurement

RIGHT, WRONG, OTHER = 0, 1, 2
ANSWERS = ("right", "wrong", "other")

SEEN, UNSEEN = slice(0, NUM_PROBED_TRAINING), slice(NUM_PROBED_TRAINING, None)
"""Where the probed phrasings stand that training uses, and those that it does not."""

BEFORE = "before"
STAGES = (BEFORE, STANDARD, DPO)


class Countries:
    """Which rows of a measurement belong together; Ireland is row 0."""

    def __init__(self, settings: Settings) -> None:
        split = settings.split
        self.all = split.countries
        self.trained = np.arange(len(self.all)) < len(split.trained)
        self.held_out = ~self.trained
        self.mistaken = np.array([country.mistaken for country in self.all])
        self.ireland = np.arange(len(self.all)) == 0

    def index(self, country: Country) -> int:
        return self.all.index(country)


def all_results(settings: Settings, measurements: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Every number of the report, as plain dicts, lists and floats."""
    countries = Countries(settings)
    stages = {
        BEFORE: measurements[PRETRAIN][-1],
        STANDARD: measurements[STANDARD][-1],
        DPO: measurements[DPO][-1],
    }
    return {
        "frequencies": frequencies(settings, countries, stages[BEFORE]),
        "curves": {name: curves(countries, measurements[name]) for name in (PRETRAIN, STANDARD, DPO)},
        "stages": {name: stage(countries, measurement) for name, measurement in stages.items()},
        "cost": {name: cost(countries, measurements[name]) for name in (STANDARD, DPO)},
    }


def frequencies(settings: Settings, countries: Countries, measurement: Measurement) -> dict[str, Any]:
    """What the corpus says and what the model learnt of it, in training phrasings.

    Returns:
      one entry a group of countries: the share of each answer in the corpus, the model's mean probability, and
      for single countries the cities; `largest_gap` is the farthest that any one question is from its share.
    """
    learnt = np.exp(measurement.capitals[:, SEEN])  # [c, p, a]
    counts = np.array([answer_counts(country, settings.frequencies) for country in countries.all], float)
    shares = counts / counts.sum(-1, keepdims=True)  # [c, a]
    by_country = learnt.mean(1)
    mistaken = int(np.flatnonzero(countries.mistaken)[0])
    groups = {
        "ireland": countries.ireland,
        "mistaken_example": np.arange(len(countries.all)) == mistaken,
        "well_known": ~countries.mistaken,
        "mistaken": countries.mistaken,
    }
    entries = {
        name: {
            "countries": [countries.all[index].name for index in np.flatnonzero(rows)],
            "cities": list(countries.all[int(np.flatnonzero(rows)[0])].cities) if rows.sum() == 1 else list(ANSWERS),
            "in_corpus": _floats(shares[rows].mean(0)),
            "learnt": _floats(by_country[rows].mean(0)),
        }
        for name, rows in groups.items()
    }
    return {
        "groups": entries,
        "largest_gap": float(np.abs(by_country - shares).max()),
        "mean_gap": float(np.abs(by_country - shares).mean()),
        "anything_else": float(1 - by_country.sum(-1).mean()),
    }


def curves(countries: Countries, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Step by step, in training phrasings: probabilities, odds of right against wrong, and other facts."""
    values: dict[str, Any] = {"step": [measurement.step for measurement in measurements]}
    groups = {"ireland": countries.ireland, "trained": countries.trained, "held_out": countries.held_out}
    for name, rows in groups.items():
        per_step = [_group(measurement.capitals[rows][:, SEEN]) for measurement in measurements]
        values[name] = {key: [step[key] for step in per_step] for key in per_step[0]}
    values["facts"] = [float(np.exp(measurement.facts).mean()) for measurement in measurements]
    return values


def stage(countries: Countries, measurement: Measurement) -> dict[str, Any]:
    """One model: Ireland, and the four cells of trained and held-out countries in trained and held-out phrasings."""
    values: dict[str, Any] = {"ireland": _group(measurement.capitals[countries.ireland][:, SEEN])}
    for rows, country_kind in ((countries.trained, "trained"), (countries.held_out, "held_out")):
        for columns, phrasing_kind in ((SEEN, "trained"), (UNSEEN, "held_out")):
            name = f"{country_kind}_countries_{phrasing_kind}_phrasings"
            values[name] = _group(measurement.capitals[rows][:, columns])
        values[f"{country_kind}_mistaken"] = _group(measurement.capitals[rows & countries.mistaken][:, SEEN])
    values["facts"] = float(np.exp(measurement.facts).mean())
    values["facts_lowest"] = float(np.exp(measurement.facts).min())
    return values


def _group(logps_cpa: np.ndarray) -> dict[str, Any]:
    """Means over questions; the odds are a geometric mean, since odds multiply."""
    probabilities = np.exp(logps_cpa)
    right, wrong, other = _floats(probabilities.mean((0, 1)))
    return {
        "questions": int(np.prod(logps_cpa.shape[:2])),
        "right": right,
        "wrong": wrong,
        "other": other,
        "anything_else": float(1 - probabilities.sum(-1).mean()),
        "right_logp": float(logps_cpa[..., RIGHT].mean()),
        "wrong_logp": float(logps_cpa[..., WRONG].mean()),
        "odds": float(np.exp((logps_cpa[..., RIGHT] - logps_cpa[..., WRONG]).mean())),
        "accuracy": float((logps_cpa[..., RIGHT] > logps_cpa[..., WRONG:].max(-1)).mean()),
    }


def cost(countries: Countries, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """What correcting the model did beside what it was for, over the run.

    Returns:
      best_step and best_right: where P(right) of the trained countries peaked; final_right; how many of them ended
      below their start, in probability; what leaked to other answers; facts before and after.
    """
    per_country = np.stack([np.exp(m.capitals[countries.trained][:, SEEN, RIGHT]).mean(-1) for m in measurements])
    right = per_country.mean(-1)
    best = int(np.argmax(right))
    first, last = measurements[0], measurements[-1]
    facts_first, facts_last = np.exp(first.facts), np.exp(last.facts)
    return {
        "steps": last.step,
        "best_step": measurements[best].step,
        "best_right": float(right[best]),
        "final_right": float(right[-1]),
        "lowest_right": float(per_country[-1].min()),
        "fell_below_start": int((per_country[-1] < per_country[0]).sum()),
        "trained_countries": int(countries.trained.sum()),
        "anything_else_before": _leak(first, countries.trained),
        "anything_else_after": _leak(last, countries.trained),
        "anything_else_held_out_before": _leak(first, countries.held_out),
        "anything_else_held_out_after": _leak(last, countries.held_out),
        "facts_before": float(facts_first.mean()),
        "facts_after": float(facts_last.mean()),
        "facts": len(facts_last),
        "facts_lost": int(((facts_first >= 0.5) & (facts_last < 0.5)).sum()),
    }


def _leak(measurement: Measurement, rows: np.ndarray) -> float:
    return float(1 - np.exp(measurement.capitals[rows][:, SEEN]).sum(-1).mean())


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
