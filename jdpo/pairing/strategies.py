"""The strategies: the answers to a prompt that are compared, in the order in which comparisons are tried.

    best_worst   the best answer with the worst, then the second best with the second worst, and so on
    best_random  the best answer with every worse one, in random order
    adjacent     every answer with the next worse one
    delta        an answer of the first folder with one of the second: a stronger and a weaker model
    human        all couples of answers, in random order, for a person to decide

An answer that was cut off is best only if `allow_cut_off` is set. Answers of equal score are in the order of their
samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from jdpo.pairing.candidates import Candidate, PairRules, Proposal, Strategy, draw


def proposals(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    """Yields the pairs that the strategy of `rules` tries for one prompt, the most wanted first.

    Args:
      candidates: the answers that may be used, with scores if the strategy reads them.
    """
    return _PROPOSE[rules.strategy](candidates, rules, prompt_id)


def may_be_chosen(candidate: Candidate, rules: PairRules) -> bool:
    """Returns whether an answer may be the chosen side of a pair."""
    return rules.allow_cut_off or not candidate.cut_off


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the answers from the best to the worst."""

    def standing(candidate: Candidate) -> tuple[float, int]:
        assert candidate.score is not None, candidate
        return (-candidate.score, candidate.sample)

    return sorted(candidates, key=standing)


def _best_worst(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    ranked = _ranked(candidates)
    rank = {candidate.name: place for place, candidate in enumerate(ranked)}
    best = [candidate for candidate in ranked if may_be_chosen(candidate, rules)]
    for better, worse in zip(best, reversed(ranked), strict=False):
        # From here on, the two walks have passed each other.
        if rank[better.name] >= rank[worse.name]:
            return
        yield better, worse


def _best_random(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    ranked = _ranked(candidates)
    place = next((place for place, one in enumerate(ranked) if may_be_chosen(one, rules)), len(ranked))
    for worse in sorted(ranked[place + 1 :], key=lambda one: draw(rules.seed, prompt_id, one.sample)):
        yield ranked[place], worse


def _adjacent(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    return itertools.pairwise(_ranked(candidates))


def _delta(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    stronger = [one for one in candidates if one.side == 0 and may_be_chosen(one, rules)]
    weaker = [one for one in candidates if one.side == 1]
    # Samples of one model are exchangeable, so their order is as good as any.
    return zip(stronger, weaker, strict=False)


def _human(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    couples = itertools.combinations(sorted(candidates, key=lambda one: one.sample), 2)
    for first, second in sorted(couples, key=lambda two: draw(rules.seed, prompt_id, two[0].sample, two[1].sample)):
        # A person who prefers one of two cut-off answers has decided nothing that may be learnt.
        if may_be_chosen(first, rules) or may_be_chosen(second, rules):
            yield first, second


_PROPOSE: dict[Strategy, Callable[[Sequence[Candidate], PairRules, str], Iterator[Proposal]]] = {
    "best_worst": _best_worst,
    "best_random": _best_random,
    "adjacent": _adjacent,
    "delta": _delta,
    "human": _human,
}
