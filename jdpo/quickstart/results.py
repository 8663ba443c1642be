"""Computes the numbers of the report from measured log-probabilities.

Axes: c countries, p phrasings, a=3 answers (capital, wrong, other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Indices of the probed phrasings that training uses, and of those that it does not use."""

BEFORE = "before"
STAGES = (BEFORE, STANDARD, DPO)


class Countries:
    """Groups of the rows of a measurement, as masks bool [c]; Ireland is row 0."""

    def __init__(self, settings: Settings) -> None:
        split = settings.split
        self.all = split.countries
        self.trained = np.arange(len(self.all)) < len(split.trained)
        self.held_out = ~self.trained
        self.mistaken = np.array([country.mistaken for country in self.all])
        self.ireland = np.arange(len(self.all)) == 0  # `split_countries` keeps it first

    def index(self, country: Country) -> int:
        return self.all.index(country)


def all_results(settings: Settings, measurements: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Returns every number of the report as plain dicts, lists and floats."""
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
        "held_out_countries": held_out_countries(countries, stages),
        "cost": {name: cost(countries, measurements[name]) for name in (STANDARD, DPO)},
    }


def frequencies(settings: Settings, countries: Countries, measurement: Measurement) -> dict[str, Any]:
    """Compares the corpus with what the model learnt, in training phrasings.

    Returns:
      one entry per group of countries: the share of each answer in the corpus, the model's mean probability, and for
      single countries the cities; `largest_gap` is the largest difference of a country's answer from its share.
    """
    learnt = np.exp(measurement.capitals[:, SEEN])  # [c, p, a]
    counts = np.array([answer_counts(country, settings.frequencies) for country in countries.all], float)
    shares = counts / counts.sum(-1, keepdims=True)  # [c, a]
    by_country = learnt.mean(1)  # [c, a]
    mistaken = int(np.flatnonzero(countries.mistaken)[0])
    groups = {
        "ireland": countries.ireland,
        # A single country, like ireland, so that its cities can be named.
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
    """Returns the values per step, in training phrasings: probabilities, odds of right against wrong, other facts."""
    values: dict[str, Any] = {"step": [measurement.step for measurement in measurements]}
    groups = {"ireland": countries.ireland, "trained": countries.trained, "held_out": countries.held_out}
    for name, rows in groups.items():
        per_step = [_group(measurement.capitals[rows][:, SEEN]) for measurement in measurements]
        values[name] = {key: [step[key] for step in per_step] for key in per_step[0]}
    values["facts"] = [float(np.exp(measurement.facts).mean()) for measurement in measurements]
    return values


def stage(countries: Countries, measurement: Measurement) -> dict[str, Any]:
    """Returns one model's values: Ireland, and trained and held-out countries in trained and held-out phrasings."""
    values: dict[str, Any] = {"ireland": _group(measurement.capitals[countries.ireland][:, SEEN])}
    for rows, country_kind in ((countries.trained, "trained"), (countries.held_out, "held_out")):
        for columns, phrasing_kind in ((SEEN, "trained"), (UNSEEN, "held_out")):
            name = f"{country_kind}_countries_{phrasing_kind}_phrasings"
            values[name] = _group(measurement.capitals[rows][:, columns])
        values[f"{country_kind}_mistaken"] = _group(measurement.capitals[rows & countries.mistaken][:, SEEN])
    values["facts"] = float(np.exp(measurement.facts).mean())
    values["facts_lowest"] = float(np.exp(measurement.facts).min())
    return values


def held_out_countries(countries: Countries, stages: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """Returns the probability of the right answer per country that nobody corrected, in training phrasings."""
    right = {name: np.exp(measurement.capitals[:, SEEN, RIGHT]).mean(-1) for name, measurement in stages.items()}
    return [
        {
            "country": countries.all[index].name,
            "capital": countries.all[index].capital,
            "mistaken": countries.all[index].mistaken,
            "right": {name: float(values[index]) for name, values in right.items()},
        }
        for index in np.flatnonzero(countries.held_out)
    ]


def _group(logps_cpa: np.ndarray) -> dict[str, Any]:
    """Returns means over questions; the mean of the odds is geometric, because odds multiply."""
    probabilities = np.exp(logps_cpa)
    right, wrong, other = _floats(probabilities.mean((0, 1)))
    return {
        "questions": int(np.prod(logps_cpa.shape[:2])),
        "right": right,
        "wrong": wrong,
        "other": other,
        # The three answers exclude each other, since each ends in the end token: the rest went to other texts.
        "anything_else": float(1 - probabilities.sum(-1).mean()),
        "right_logp": float(logps_cpa[..., RIGHT].mean()),
        "wrong_logp": float(logps_cpa[..., WRONG].mean()),
        "odds": float(np.exp((logps_cpa[..., RIGHT] - logps_cpa[..., WRONG]).mean())),
        # Strictly above: a tie, such as that of an untrained model, is no right answer.
        "accuracy": float((logps_cpa[..., RIGHT] > logps_cpa[..., WRONG:].max(-1)).mean()),
    }


def cost(countries: Countries, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Returns the side effects of correcting the model, over the run.

    Returns:
      best_step and best_right, the peak of P(right) for the trained countries; final_right; the number of countries
      whose right answer ended less probable than it started; the probability that leaked to other answers; and facts
      before and after.
    """
    # [steps, c]: the peak is that of the mean, while the losses below are counted by country.
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
        # A fact counts as known while its answer is more probable than all others together.
        "facts_lost": int(((facts_first >= 0.5) & (facts_last < 0.5)).sum()),
    }


def _leak(measurement: Measurement, rows: np.ndarray) -> float:
    return float(1 - np.exp(measurement.capitals[rows][:, SEEN]).sum(-1).mean())


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
