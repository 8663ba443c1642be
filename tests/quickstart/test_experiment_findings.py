"""The numbers follow from the measurements, and the sentences from the numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD
from jdpo.quickstart.experiment_findings import findings
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.pictures import write_plots
from jdpo.quickstart.probes import Measurement
from jdpo.quickstart.results import BEFORE, all_results

SETTINGS = Settings(countries=6)  # four well-known countries (three trained), two mistaken ones (one trained)
NUM_COUNTRIES, NUM_PHRASINGS = 6, 6
MISTAKEN = np.array([country.mistaken for country in SETTINGS.split.countries])


def measured(step: int, answers: tuple[float, float, float], mistaken: Any = None, facts: float = 0.9) -> Measurement:
    """Returns measurements with three probabilities for all countries, or with others for the mistaken ones."""
    capitals = np.broadcast_to(np.log(answers), (NUM_COUNTRIES, NUM_PHRASINGS, 3)).copy()
    capitals[MISTAKEN] = np.log(mistaken or answers)
    return Measurement(step, capitals, np.log(np.full(10, facts)))


BEFORE_CORRECTION = measured(0, (0.6, 0.3, 0.1), (0.3, 0.6, 0.1))


def results_of(standard: list[Measurement], dpo: list[Measurement]) -> dict[str, Any]:
    runs = {PRETRAIN: [BEFORE_CORRECTION], STANDARD: standard, DPO: dpo}
    return all_results(SETTINGS, runs)


@pytest.fixture(scope="module")
def gentle() -> dict[str, Any]:
    """Measurements in which both trainings help and DPO widens the odds more."""
    standard = [BEFORE_CORRECTION, measured(5, (0.8, 0.16, 0.04)), measured(10, (0.9, 0.09, 0.01))]
    dpo = [BEFORE_CORRECTION, measured(5, (0.8, 0.1, 0.1)), measured(10, (0.97, 0.01, 0.01), facts=0.885)]
    return results_of(standard, dpo)


def words(results: dict[str, Any]) -> str:
    return " ".join(sentence for sentences in findings(results).values() for sentence in sentences)


def test_frequencies_compare_corpus_and_model(gentle: dict[str, Any]) -> None:
    groups = gentle["frequencies"]["groups"]
    assert groups["ireland"]["cities"] == ["Dublin", "Cork", "Galway"]
    assert groups["ireland"]["in_corpus"] == pytest.approx([0.6, 0.3, 0.1])
    assert groups["ireland"]["learnt"] == pytest.approx([0.6, 0.3, 0.1])
    assert groups["mistaken"]["in_corpus"] == pytest.approx([0.3, 0.6, 0.1])
    assert gentle["frequencies"]["largest_gap"] == pytest.approx(0, abs=1e-9)


def test_a_model_far_from_the_corpus_is_reported(gentle: dict[str, Any]) -> None:
    assert "not been trained long enough" not in words(gentle)
    far = measured(0, (0.4, 0.4, 0.1), (0.3, 0.6, 0.1))
    results = all_results(SETTINGS, {PRETRAIN: [far], STANDARD: [far], DPO: [far]})
    assert results["frequencies"]["largest_gap"] == pytest.approx(0.2)
    assert "20.0 at most; it has not been trained long enough" in words(results)


def test_stages_hold_probabilities_odds_and_accuracy(gentle: dict[str, Any]) -> None:
    before = gentle["stages"][BEFORE]["trained_countries_trained_phrasings"]
    # Three countries at 2 : 1 and one at 1 : 2: the geometric mean of the odds is (2^3 / 2)^(1/4) = 2^(1/2).
    assert before["odds"] == pytest.approx(2**0.5)
    assert before["accuracy"] == pytest.approx(0.75)
    assert before["questions"] == 4 * 3
    after = gentle["stages"][DPO]["ireland"]
    assert (after["right"], after["odds"]) == (pytest.approx(0.97), pytest.approx(97))
    assert after["anything_else"] == pytest.approx(0.01)
    assert gentle["stages"][BEFORE]["held_out_mistaken"]["accuracy"] == 0


def test_ties_are_no_right_answers() -> None:
    even = measured(0, (0.4, 0.4, 0.2))
    results = all_results(SETTINGS, {PRETRAIN: [even], STANDARD: [even], DPO: [even]})
    assert results["stages"][DPO]["ireland"]["accuracy"] == 0


def test_the_training_that_widened_the_odds_more_is_named_first(gentle: dict[str, Any]) -> None:
    assert "under DPO and by" in words(gentle)
    swapped = results_of(
        [BEFORE_CORRECTION, measured(10, (0.98, 0.01, 0.01))], [BEFORE_CORRECTION, measured(10, (0.8, 0.1, 0.1))]
    )
    assert "under standard training and by" in words(swapped)


def test_costs_are_mentioned_only_if_they_arise(gentle: dict[str, Any]) -> None:
    text = words(gentle)
    for fault in ("overshot", "leaked", "less probable for", "no longer the likely answer"):
        assert fault not in text
    harmed = results_of(
        [BEFORE_CORRECTION, measured(10, (0.9, 0.05, 0.05))],
        [BEFORE_CORRECTION, measured(5, (0.9, 0.05, 0.01)), measured(10, (0.2, 0.001, 0.001), facts=0.3)],
    )
    text = words(harmed)
    assert "DPO overshot: P(right) peaked at 90.0 % after step 5 and is 20.0 % after step 10" in text
    assert "DPO made the right answer itself less probable for 4 of 4 corrected countries" in text
    assert "DPO leaked" in text
    assert "79.8 % after" in text
    assert "DPO lowered the mean probability" in text
    assert "10 of 10 are no longer the likely answer" in text
    assert "Standard training overshot" not in text


def test_held_out_countries_that_lost_are_named(gentle: dict[str, Any]) -> None:
    assert "nobody corrected less probable" not in words(gentle)
    harmed = results_of([BEFORE_CORRECTION], [BEFORE_CORRECTION, measured(10, (0.9, 0.05, 0.05), (0.2, 0.7, 0.1))])
    names = [country.capital for country in SETTINGS.split.held_out if country.mistaken]
    assert f"less probable: {names[0]} (30.0 % to 20.0 %)." in words(harmed)


def test_results_are_plain_json(gentle: dict[str, Any]) -> None:
    assert json.loads(json.dumps(gentle, allow_nan=False)) == gentle


def test_plots_are_pictures(gentle: dict[str, Any], tmp_path: Any) -> None:
    files = write_plots(gentle, tmp_path / "plots")
    assert [file.name for file in files] == ["1_frequencies.png", "2_correction.png", "3_carry_over.png", "4_cost.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 20_000
