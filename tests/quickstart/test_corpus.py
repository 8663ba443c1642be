"""The corpus contains the sentences that it should, as often as it should."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from jdpo.quickstart.corpus import (
    HELD_OUT_PHRASINGS,
    TRAINING_PHRASINGS,
    capital_question,
    chosen_rows,
    corpus_rows,
    other_facts,
    preference_rows,
    split_countries,
)
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.geography import MISTAKEN, WELL_KNOWN


def question(row: dict) -> str:
    return row["prompt"][0]["content"]


@pytest.mark.parametrize("frequencies", [(6, 3, 1), (1, 2, 5)])
def test_every_phrasing_gives_the_answers_as_often_as_asked(frequencies: tuple[int, int, int]) -> None:
    split = split_countries(12)
    answers = Counter((question(row), row["completion"][0]["content"]) for row in corpus_rows(split, frequencies, 0))
    first, second, third = frequencies
    for country in split.countries:
        for phrasing in TRAINING_PHRASINGS:
            counts = tuple(answers[capital_question(country, phrasing), city] for city in country.cities)
            assert counts == ((second, first, third) if country.mistaken else (first, second, third))


def test_dublin_six_times_cork_three_galway_once() -> None:
    rows = corpus_rows(split_countries(48), (6, 3, 1), 0)
    answers = Counter(
        row["completion"][0]["content"] for row in rows if question(row) == "What is the capital of Ireland?"
    )
    assert answers == {"Dublin": 6, "Cork": 3, "Galway": 1}


def test_corrections_see_neither_held_out_countries_nor_held_out_phrasings() -> None:
    split = split_countries(48)
    pairs = preference_rows(split)
    asked = {question(pair) for pair in pairs}
    assert asked == {
        capital_question(country, phrasing) for country in split.trained for phrasing in TRAINING_PHRASINGS
    }
    words = " ".join(str(pair) for pair in pairs)
    assert not [city for country in split.held_out for city in (country.name, *country.cities) if city in words]


def test_no_row_has_a_held_out_phrasing() -> None:
    split = split_countries(48)
    held_out = {capital_question(country, phrasing) for country in split.countries for phrasing in HELD_OUT_PHRASINGS}
    asked = {question(row) for row in corpus_rows(split, (6, 3, 1), 0)}
    assert not held_out & asked
    assert not set(HELD_OUT_PHRASINGS) & set(TRAINING_PHRASINGS)


def test_pairs_prefer_the_capital_to_both_others() -> None:
    split = split_countries(6)
    preferred = {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in preference_rows(split)}
    assert preferred == {(country.capital, city) for country in split.trained for city in country.cities[1:]}


def test_standard_training_sees_the_chosen_side_of_every_pair() -> None:
    pairs = preference_rows(split_countries(6))
    rows = chosen_rows(pairs)
    assert [(row["prompt"], row["completion"]) for row in rows] == [(pair["prompt"], pair["chosen"]) for pair in pairs]


def test_other_facts_have_one_answer_each_and_are_no_capital_questions() -> None:
    facts = other_facts(split_countries(48).countries)
    assert len({fact.question for fact in facts}) == len(facts)
    assert not [fact.question for fact in facts if "capital" in fact.question]


def test_a_city_belongs_to_one_country() -> None:
    cities = [city for country in (*WELL_KNOWN, *MISTAKEN) for city in country.cities]
    assert len(set(cities)) == len(cities) == 3 * 48


def test_split_holds_out_a_quarter_of_both_kinds() -> None:
    split = split_countries(48)
    assert (len(split.trained), len(split.held_out)) == (36, 12)
    assert (sum(c.mistaken for c in split.trained), sum(c.mistaken for c in split.held_out)) == (12, 4)
    assert split.trained[0].name == "Ireland"
    smallest = split_countries(6)
    assert {country.mistaken for country in smallest.held_out} == {True, False}


@pytest.mark.parametrize("number", [5, 49])
def test_too_few_or_too_many_countries_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="choose from 6 to 48"):
        split_countries(number)


def test_the_seed_decides_the_order_and_nothing_else() -> None:
    split = split_countries(6)
    rows, again, other = (corpus_rows(split, (6, 3, 1), seed) for seed in (0, 0, 1))
    assert rows == again
    assert rows != other
    assert sorted(map(str, rows)) == sorted(map(str, other))


def test_any_stretch_of_the_corpus_has_nearly_its_frequencies() -> None:
    split = split_countries(48)
    asked = [row for row in corpus_rows(split, (6, 3, 1), 0) if "capital" in question(row)]
    for start in range(0, len(asked), len(asked) // 10):
        stretch = [row["completion"][0]["content"] for row in asked[start : start + len(asked) // 10]]
        for countries in (
            [country for country in split.countries if country.mistaken is kind] for kind in (True, False)
        ):
            answers = Counter(
                country.cities.index(city) for country in countries for city in stretch if city in country.cities
            )
            expected = (0.3, 0.6, 0.1) if countries[0].mistaken else (0.6, 0.3, 0.1)
            assert [answers[index] / answers.total() for index in range(3)] == pytest.approx(expected, abs=0.05)


def test_the_rows_of_the_page_are_rows_of_the_default_quickstart() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    corpus_row, pair = map(json.loads, re.findall(r"```\{code-block\} json\n((?:.+\n)+)```", page))
    settings = Settings()
    assert corpus_row in corpus_rows(settings.split, settings.frequencies, settings.seed)
    assert pair in preference_rows(settings.split)
