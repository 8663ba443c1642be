"""The pairs of one prompt, and what became of each of its answers and of each comparison that was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from jdpo.pairing import candidates as reasons
from jdpo.pairing.candidates import SCORED, Candidate, Name, PairRules, Proposal, margin_of
from jdpo.pairing.similarity import ngrams, similarity
from jdpo.pairing.strategies import may_be_chosen, proposals

Choice = Literal["a", "b", "tie", "skip"]
"""A person's choice between two answers: the one with the lower sample number (a), the other one, neither."""

Choose = Callable[[Candidate, Candidate], Choice | None]
"""(a, b) -> the choice of a person between them; None: they have not been shown yet."""


class Selection(NamedTuple):
    """The pairs of one prompt.

    Attributes:
      pairs: the chosen and the rejected answer of each pair.
      tried: number of comparisons that the strategy tried.
      dropped_pairs: the reason of every comparison that made no pair.
      dropped_answers: the reason of every answer that is in no pair.
    """

    pairs: list[Proposal]
    tried: int
    dropped_pairs: list[str]
    dropped_answers: dict[Name, str]


def select(
    candidates: Sequence[Candidate], rules: PairRules, prompt_id: str, choose: Choose | None = None
) -> Selection:
    """Makes the pairs of one prompt.

    Args:
      candidates: all answers to the prompt, of both folders for `delta`.
      choose: a person's choices; only for `human`.

    Returns:
      Pairs and reasons; every answer is in a pair or has a reason, and every comparison is a pair or has one.
    """
    assert (choose is not None) == (rules.strategy == "human")
    usable, dropped = drop_answers(candidates, rules)
    pairs: list[Proposal] = []
    faults: list[str] = []
    first_fault: dict[Name, str] = {}
    asked = 0
    fault: str | None
    for proposal in proposals(usable, rules, prompt_id):
        # A person is asked about `most_pairs` couples, whatever the answers; scores cost nothing more to read.
        if rules.is_reached(len(pairs) if choose is None else asked):
            fault, ordered = reasons.ENOUGH, proposal
        elif choose is None:
            fault, ordered = _fault(*proposal, rules), proposal
        elif (fault := _unfit(*proposal, rules)) is None:
            asked += 1
            fault, ordered = _chosen(*proposal, rules, choose)
        if fault is None:
            pairs.append(ordered)
            continue
        faults.append(fault)
        for one in proposal:
            first_fault.setdefault(one.name, fault)
    used = {one.name for pair in pairs for one in pair}
    for one in usable:
        if one.name not in used:
            dropped[one.name] = first_fault.get(one.name) or _why_not_tried(one, candidates, usable, rules)
    return Selection(pairs, len(pairs) + len(faults), faults, dropped)


def drop_answers(candidates: Sequence[Candidate], rules: PairRules) -> tuple[list[Candidate], dict[Name, str]]:
    """Splits answers into those that may be compared, in their order, and the reasons of all others."""
    dropped: dict[Name, str] = {}
    kept: list[Candidate] = []
    grams: dict[Name, frozenset[tuple[str, ...]]] = {}

    def same(one: Candidate, other: Candidate) -> str | None:
        # In `delta`, each model's answers are compared with its own; pairs of both are checked as pairs.
        if one.side != other.side:
            return None
        if one.text.strip() == other.text.strip():
            return reasons.SAME_TEXT
        if rules.dedupe is None or similarity(grams[one.name], grams[other.name]) < rules.dedupe:
            return None
        return reasons.ALIKE

    # Of answers that are the same, one that can be used stays: with a score, and not cut off.
    for one in sorted(candidates, key=lambda one: (one.score is None, one.cut_off, one.side, one.sample)):
        if not one.text.strip():
            dropped[one.name] = reasons.EMPTY
            continue
        if rules.strategy in SCORED and one.score is None:
            dropped[one.name] = reasons.NO_SCORE
            continue
        if rules.dedupe is not None:
            grams[one.name] = ngrams(one.text)
        fault = next((found for other in kept if (found := same(one, other))), None)
        if fault is not None:
            dropped[one.name] = fault
        else:
            kept.append(one)
    names = {one.name for one in kept}
    return [one for one in candidates if one.name in names], dropped


def shown_couples(candidates: Sequence[Candidate], rules: PairRules, prompt_id: str) -> Iterator[Proposal]:
    """Yields the couples of answers of one prompt that a person is asked about, in order."""
    usable, _ = drop_answers(candidates, rules)
    fit = (proposal for proposal in proposals(usable, rules, prompt_id) if _unfit(*proposal, rules) is None)
    for count, proposal in enumerate(fit):
        if rules.is_reached(count):
            return
        yield proposal


def _chosen(a: Candidate, b: Candidate, rules: PairRules, choose: Choose) -> tuple[str | None, Proposal]:
    """Returns the reason for which a person's choice makes no pair, or None, and the pair."""
    choice = choose(a, b)
    if choice not in ("a", "b"):
        return {None: reasons.UNDECIDED, "tie": reasons.TIED, "skip": reasons.SKIPPED}[choice], (a, b)
    ordered = (a, b) if choice == "a" else (b, a)
    return (None if may_be_chosen(ordered[0], rules) else reasons.CUT_OFF), ordered


def _fault(better: Candidate, worse: Candidate, rules: PairRules) -> str | None:
    if not may_be_chosen(better, rules):
        return reasons.CUT_OFF
    if rules.strategy in SCORED and (margin := margin_of(better, worse)) is not None:
        if margin == 0:
            return reasons.TIED
        if float(margin) < (rules.min_margin or 0):
            return reasons.BELOW_MARGIN
    return _unfit(better, worse, rules)


def _unfit(first: Candidate, second: Candidate, rules: PairRules) -> str | None:
    """Returns the reason against a couple of answers that does not depend on which of them is better."""
    if first.text.strip() == second.text.strip():
        return reasons.SIDES_ALIKE
    if rules.dedupe is not None and similarity(ngrams(first.text), ngrams(second.text)) >= rules.dedupe:
        return reasons.SIDES_ALIKE
    if rules.max_length_gap is not None and abs(first.length - second.length) > rules.max_length_gap:
        return reasons.LENGTH_GAP
    return None


def _why_not_tried(
    one: Candidate, candidates: Sequence[Candidate], usable: Sequence[Candidate], rules: PairRules
) -> str:
    if rules.strategy == "delta":
        if len({other.side for other in candidates}) == 1:
            return reasons.ONE_FOLDER
        if len({other.side for other in usable}) == 1:
            return reasons.ALONE
    if len(usable) == 1:
        return reasons.ALONE
    return reasons.NOT_PICKED if may_be_chosen(one, rules) else reasons.CUT_OFF
