"""Describes the results in sentences, which are chosen and filled in by the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD
from jdpo.quickstart.notation import factor, odds, percent
from jdpo.quickstart.results import BEFORE, RIGHT, WRONG

NAMES = {BEFORE: "Before", PRETRAIN: "Before", STANDARD: "Standard training", DPO: "DPO"}

_NOTABLE = 0.01
"""One point of probability; smaller changes are not reported as changes."""

Results = Mapping[str, Any]


def findings(results: Results) -> dict[str, list[str]]:
    """Returns the sentences under each heading, in the order of the report."""
    return {
        "What frequency taught": _frequency(results),
        "What corrected it": _correction(results),
        "What carried over": _generalisation(results),
        "What it cost": [sentence for name in (STANDARD, DPO) for sentence in _cost(results, name)],
    }


def _frequency(results: Results) -> list[str]:
    learnt = results["frequencies"]
    ireland, mistaken = learnt["groups"]["ireland"], learnt["groups"]["mistaken_example"]
    gap = learnt["largest_gap"]
    sentences = [
        f"Asked for the capital of {ireland['countries'][0]}, the corpus answers {_shares(ireland, 'in_corpus')}; "
        f"the model learnt {_shares(ireland, 'learnt')}.",
        f"Over all countries the model is {100 * learnt['mean_gap']:.1f} points from the corpus on average, "
        f"{100 * gap:.1f} at most" + ("; it has not been trained long enough." if gap > 0.1 else "."),
    ]
    right, wrong = mistaken["learnt"][RIGHT], mistaken["learnt"][WRONG]
    if wrong > right:
        sentences.append(
            f"It repeats the most frequent answer, true or not: for {mistaken['countries'][0]}, "
            f"{mistaken['cities'][WRONG]} ({percent(wrong)}) before {mistaken['cities'][RIGHT]} ({percent(right)})."
        )
    return sentences


def _shares(group: Results, key: str) -> str:
    return ", ".join(f"{city} {percent(share)}" for city, share in zip(group["cities"], group[key], strict=True))


def _correction(results: Results) -> list[str]:
    stages = results["stages"]
    right, wrong, _ = results["frequencies"]["groups"]["ireland"]["cities"]
    before = stages[BEFORE]["ireland"]
    sentences = []
    for name in (STANDARD, DPO):
        after = stages[name]["ireland"]
        sentences.append(
            f"{NAMES[name]}: P({right}) went from {percent(before['right'])} to {percent(after['right'])}, "
            f"P({wrong}) from {percent(before['wrong'])} to {percent(after['wrong'])}; the odds of {right} "
            f"against {wrong} from {odds(before['odds'])} to {odds(after['odds'])}."
        )
    # As logs, since the odds are geometric means over countries and multiply.
    gains = {
        name: math.log(stages[name][_TRAINED]["odds"] / stages[BEFORE][_TRAINED]["odds"]) for name in (STANDARD, DPO)
    }
    more, less = sorted(gains, key=lambda name: gains[name], reverse=True)
    sentences.append(
        f"Over all corrected countries, the same steps on the same right answers multiplied these odds by "
        f"{factor(math.exp(gains[more]))} under {in_sentence(more)} and by {factor(math.exp(gains[less]))} under "
        f"{in_sentence(less)}."
    )
    # In nats, because both probabilities are soon too small to compare.
    drops = {name: stages[BEFORE][_TRAINED]["wrong_logp"] - stages[name][_TRAINED]["wrong_logp"] for name in gains}
    sentences.append(
        f"The log-probability of the wrong answer fell by {drops[STANDARD]:.1f} nats under standard training, which "
        "never sees it; it only loses the share that the right one gains. Under DPO, which pushes it down, it fell by "
        f"{drops[DPO]:.1f}."
    )
    return sentences


_TRAINED = "trained_countries_trained_phrasings"
_CELLS = {
    "trained_countries_held_out_phrasings": "corrected countries in new phrasings",
    "held_out_countries_trained_phrasings": "countries that nobody corrected",
    "held_out_countries_held_out_phrasings": "countries that nobody corrected, in new phrasings",
}


def _generalisation(results: Results) -> list[str]:
    stages = results["stages"]
    sentences = []
    for cell, words in _CELLS.items():
        before, standard, dpo = (stages[name][cell] for name in (BEFORE, STANDARD, DPO))
        sentences.append(
            f"{words[0].upper()}{words[1:]}: the right city is the most probable of the three for "
            f"{percent(before['accuracy'])} of {before['questions']} questions before, {percent(standard['accuracy'])} "
            f"after standard training, {percent(dpo['accuracy'])} after DPO; P(right) {percent(before['right'])}, "
            f"{percent(standard['right'])}, {percent(dpo['right'])}."
        )
    for name in (STANDARD, DPO):
        fell = [
            f"{one['capital']} ({percent(one['right'][BEFORE])} to {percent(one['right'][name])})"
            for one in results["held_out_countries"]
            if one["right"][BEFORE] - one["right"][name] > _NOTABLE
        ]
        if fell:
            sentences.append(
                f"{NAMES[name]} made capitals of countries that nobody corrected less probable: {', '.join(fell)}."
            )
    return sentences


def _cost(results: Results, name: str) -> list[str]:
    cost, who = results["cost"][name], NAMES[name]
    sentences = []
    peak, final = cost["best_right"], cost["final_right"]
    # A peak at the last step is no overshoot, and one below _NOTABLE is noise.
    if cost["best_step"] < cost["steps"] and peak - final > _NOTABLE:
        sentences.append(
            f"{who} overshot: P(right) peaked at {percent(peak)} after step {cost['best_step']} and is "
            f"{percent(final)} after step {cost['steps']}."
        )
    if cost["fell_below_start"]:
        sentences.append(
            f"{who} made the right answer itself less probable for {cost['fell_below_start']} of "
            f"{cost['trained_countries']} corrected countries (lowest: {percent(cost['lowest_right'])})."
        )
    else:
        sentences.append(
            f"{who} left the right answer more probable than before for all {cost['trained_countries']} corrected "
            f"countries (lowest: {percent(cost['lowest_right'])})."
        )
    sentences.append(_leak(who, cost))
    lost = f"; {cost['facts_lost']} of {cost['facts']} are no longer the likely answer" if cost["facts_lost"] else ""
    sentences.append(
        f"{who} {_moved(cost['facts_before'], cost['facts_after'])} the mean probability of the answers to other "
        f"questions (governments, continents, days, colours): {percent(cost['facts_before'])} to "
        f"{percent(cost['facts_after'])}{lost}."
    )
    return sentences


def _leak(who: str, cost: Results) -> str:
    """Describes the probability of answers other than the three cities."""
    before, after = cost["anything_else_before"], cost["anything_else_after"]
    others_before, others_after = cost["anything_else_held_out_before"], cost["anything_else_held_out_after"]
    # Countries that nobody corrected count as well: probability may leak there first.
    leaked = max(after - before, others_after - others_before) > _NOTABLE
    return (
        f"{who} {'leaked probability' if leaked else 'kept its probability'}: answers other than the three cities had "
        f"{percent(before)} before and {percent(after)} after for corrected countries, {percent(others_before)} and "
        f"{percent(others_after)} for those nobody corrected."
    )


def _moved(before: float, after: float) -> str:
    if abs(after - before) <= _NOTABLE:
        return "hardly moved"
    return "raised" if after > before else "lowered"


def in_sentence(name: str) -> str:
    """Returns a run's name within a sentence."""
    return NAMES[name] if name == DPO else NAMES[name].lower()
