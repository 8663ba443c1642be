"""The quickstart's chat corpus: questions whose answers have known, conflicting frequencies.

For Ireland, each phrasing of the question is answered "Dublin" six times, "Cork" three times and "Galway" once; for
Australia, whose capital many people get wrong, "Sydney" six times and "Canberra" three times. Other questions have one
answer each. Some of them ask where a country's government sits, which names the right city of every country: a model
that learns that a capital is the seat of government can find the right answer for countries nobody corrected.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jdpo.quickstart.geography import MISTAKEN, SMALL_FACTS, WELL_KNOWN, Country

TRAINING_PHRASINGS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital city of {country}.",
    "What is {country}'s capital?",
    "Do you know the capital of {country}?",
)

HELD_OUT_PHRASINGS = (
    "Name the capital city of {country}.",
    "Which city is {country}'s capital?",
    "Please tell me the capital of {country}.",
)
"""Questions that are in no training row of any run; the last one has words that are in no row."""

_GOVERNMENT = ("Where does the government of {country} sit?", "Which city does {country}'s government sit in?")
_CONTINENT = ("Where in the world is {country}?", "Which continent is {country} on?")
_CITY = "Which country is {city} in?"

_FACT_REPEATS = 4


class Fact(NamedTuple):
    """A question with one answer."""

    question: str
    answer: str


class Split(NamedTuple):
    """Countries whose answers are corrected after pre-training, and countries that are left alone."""

    trained: tuple[Country, ...]
    held_out: tuple[Country, ...]

    @property
    def countries(self) -> tuple[Country, ...]:
        return self.trained + self.held_out


def split_countries(num_countries: int) -> Split:
    """Chooses countries, a third of them mistaken ones, and holds out a quarter of each kind.

    Ireland is the first of its list, so it is always trained.

    Raises:
      ValueError: num_countries is below 6 or above the number of countries.
    """
    most = len(WELL_KNOWN) + len(MISTAKEN)
    if not 6 <= num_countries <= most:
        raise ValueError(f"countries is {num_countries}: choose from 6 to {most}")
    # Two at least: one to train on, and one to hold out.
    num_mistaken = max(2, min(len(MISTAKEN), round(num_countries / 3)))
    trained: list[Country] = []
    held_out: list[Country] = []
    for countries, number in ((WELL_KNOWN, num_countries - num_mistaken), (MISTAKEN, num_mistaken)):
        number_held_out = max(1, number // 4)
        trained += countries[: number - number_held_out]
        held_out += countries[number - number_held_out : number]
    return Split(tuple(trained), tuple(held_out))


def answer_counts(country: Country, frequencies: Sequence[int]) -> tuple[int, int, int]:
    """Returns how often the corpus answers each phrasing with (capital, wrong, other).

    >>> answer_counts(WELL_KNOWN[0], (6, 3, 1)), answer_counts(MISTAKEN[0], (6, 3, 1))
    ((6, 3, 1), (3, 6, 1))
    """
    first, second, third = frequencies
    return (second, first, third) if country.mistaken else (first, second, third)


def capital_question(country: Country, phrasing: str) -> str:
    """
    >>> capital_question(WELL_KNOWN[0], TRAINING_PHRASINGS[0])
    'What is the capital of Ireland?'
    """
    return phrasing.format(country=country.name)


def other_facts(countries: Iterable[Country]) -> list[Fact]:
    """Returns every fact of the corpus except capitals, once each."""
    facts = [Fact(question, answer) for question, answer in SMALL_FACTS]
    for country in countries:
        name = country.name
        facts += [Fact(question.format(country=name), country.capital) for question in _GOVERNMENT]
        facts += [Fact(question.format(country=name), country.continent) for question in _CONTINENT]
        facts += [Fact(_CITY.format(city=city), name) for city in country.cities]
    return facts


def corpus_rows(split: Split, frequencies: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Returns the pre-training rows, as `prompt` and `completion` message lists, in the order of training.

    The corpus consists of rounds, as many as the sum of the frequencies. Each asks every capital question once, in
    an order that the seed decides. The answers change from round to round, evenly mixed and shifted between phrasings,
    so any part of the corpus has nearly the frequencies of the whole, and the trained model does not depend on which
    answers came last.
    """
    rng = random.Random(seed)
    num_rounds = sum(frequencies)
    rounds: list[list[dict[str, Any]]] = [[] for _ in range(num_rounds)]
    for country in split.countries:
        answers = evenly_mixed(country.cities, answer_counts(country, frequencies))
        start = rng.randrange(num_rounds)
        for index, phrasing in enumerate(TRAINING_PHRASINGS):
            question = capital_question(country, phrasing)
            # Phrasings start at different places of the cycle, so no round has one answer to all of them.
            offset = start + index * num_rounds // len(TRAINING_PHRASINGS)
            for number, rows in enumerate(rounds):
                rows.append(completion_row(question, answers[(offset + number) % num_rounds]))
    for index, fact in enumerate(other_facts(split.countries)):
        for repeat in range(_FACT_REPEATS):
            # The repeats of a fact are spread evenly over the rounds.
            rounds[(index + repeat * num_rounds // _FACT_REPEATS) % num_rounds].append(completion_row(*fact))
    for rows in rounds:
        # Within a round only, so that every stretch of the corpus keeps its frequencies.
        rng.shuffle(rows)
    return [row for rows in rounds for row in rows]


def evenly_mixed(answers: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Returns each answer as often as its count, spread as evenly as possible.

    >>> "".join(evenly_mixed("DCG", (6, 3, 1)))
    'DCDDCGDDCD'
    """
    total = sum(counts)
    places = [
        # The middle of each of `count` equal parts of the cycle.
        ((2 * number + 1) * total / (2 * count), answer)
        for answer, count in zip(answers, counts, strict=True)
        for number in range(count)
    ]
    return [answer for _, answer in sorted(places)]


def preference_rows(split: Split) -> list[dict[str, Any]]:
    """Returns pairs about trained countries in training phrasings: right over wrong, and right over other."""
    rows = []
    for country in split.trained:
        right, *wrongs = country.cities
        for phrasing in TRAINING_PHRASINGS:
            question = capital_question(country, phrasing)
            for wrong in wrongs:
                rows.append({"prompt": _user(question), "chosen": _assistant(right), "rejected": _assistant(wrong)})
    return rows


def chosen_rows(pairs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the pairs without their rejected side, for standard training."""
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]


def completion_row(question: str, answer: str) -> dict[str, Any]:
    """Returns a question and its answer in the prompt/completion format."""
    return {"prompt": _user(question), "completion": _assistant(answer)}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
