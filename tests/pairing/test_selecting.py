"""The pairs of one prompt: by hand, and for any answers and rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.generation.prompts import make_question
from jdpo.pairing import candidates as reasons
from jdpo.pairing.answers_read import Group, Material, Source
from jdpo.pairing.candidates import Candidate, PairRules, Side
from jdpo.pairing.pair_report import make_report
from jdpo.pairing.selecting import Choice, select, shown_couples
from jdpo.pairing.similarity import ngrams, similarity


def answers(*scores: float | None, cut_off: Sequence[int] = (), lengths: Sequence[int] = ()) -> list[Candidate]:
    """Returns answers of different texts with these scores."""
    return [
        Candidate(0, sample, f"answer {sample}", lengths[sample] if lengths else 5, sample in cut_off, score)
        for sample, score in enumerate(scores)
    ]


def pairs_of(candidates: Sequence[Candidate], **rules: Any) -> list[tuple[int, int]]:
    found = select(candidates, PairRules(**rules), "prompt")
    return [(chosen.sample, rejected.sample) for chosen, rejected in found.pairs]


def test_best_and_worst() -> None:
    found = select(answers(1, 3, 2, 0), PairRules(), "prompt")
    assert [(a.sample, b.sample) for a, b in found.pairs] == [(1, 3)]
    assert found.dropped_pairs == [reasons.ENOUGH]
    assert found.dropped_answers == {(0, 2): reasons.ENOUGH, (0, 0): reasons.ENOUGH}
    assert pairs_of(answers(1, 3, 2, 0), max_per_prompt=5) == [(1, 3), (2, 0)]


def test_adjacent_answers() -> None:
    assert pairs_of(answers(1, 3, 2, 0), strategy="adjacent") == [(1, 2), (2, 0), (0, 3)]
    assert pairs_of(answers(1, 3, 2, 0), strategy="adjacent", min_margin=1.5) == []


def test_the_best_with_a_random_one() -> None:
    drawn = {
        select(answers(1, 3, 2, 0), PairRules(strategy="best_random", seed=seed), "prompt").pairs[0][1].sample
        for seed in range(20)
    }
    assert drawn == {0, 2, 3}, "every worse answer is drawn by some seed"
    by_prompt = {select(answers(1, 3, 2, 0), PairRules(strategy="best_random"), f"{p}").pairs[0][1] for p in range(20)}
    assert len(by_prompt) == 3, "and for some prompt"


def test_equal_scores_are_ties() -> None:
    found = select(answers(2, 2, 2), PairRules(), "prompt")
    assert (found.pairs, found.dropped_pairs) == ([], [reasons.TIED])
    assert set(found.dropped_answers.values()) == {reasons.TIED, reasons.NOT_PICKED}


def test_a_cut_off_answer_is_rejected_but_not_chosen() -> None:
    assert pairs_of(answers(3, 2, 1, cut_off=[0])) == [(1, 2)]
    assert pairs_of(answers(3, 2, 1, cut_off=[0]), allow_cut_off=True) == [(0, 2)]
    assert pairs_of(answers(3, 2, 1, cut_off=[2])) == [(0, 2)]
    found = select(answers(3, 2, cut_off=[0, 1]), PairRules(), "prompt")
    assert set(found.dropped_answers.values()) == {reasons.CUT_OFF}
    found = select(answers(3, 2, 1, cut_off=[1]), PairRules(strategy="adjacent"), "prompt")
    assert found.dropped_pairs == [reasons.CUT_OFF]


def test_lengths_and_margins() -> None:
    found = select(answers(1, 0, lengths=[300, 20]), PairRules(max_length_gap=100), "prompt")
    assert (found.pairs, found.dropped_pairs) == ([], [reasons.LENGTH_GAP])
    assert pairs_of(answers(1, 0, lengths=[120, 20]), max_length_gap=100) == [(0, 1)]
    found = select(answers(1, 0.5), PairRules(min_margin=1), "prompt")
    assert found.dropped_pairs == [reasons.BELOW_MARGIN]


def test_unusable_answers_have_reasons() -> None:
    given_answers = [
        Candidate(0, 0, "Dublin", 2, False, 1.0),
        Candidate(0, 1, " Dublin\n", 3, False, 0.0),
        Candidate(0, 2, " \n", 1, False, 5.0),
        Candidate(0, 3, "Cork", 2, False, None),
    ]
    found = select(given_answers, PairRules(), "prompt")
    assert found.pairs == []
    assert found.dropped_answers == {
        (0, 0): reasons.ALONE,
        (0, 1): reasons.SAME_TEXT,
        (0, 2): reasons.EMPTY,
        (0, 3): reasons.NO_SCORE,
    }


def test_nearly_equal_answers_count_as_one() -> None:
    long = "The capital of Ireland is the old city of Dublin, which is on the river Liffey in the east"
    near = [Candidate(0, 0, long, 9, False, 1.0), Candidate(0, 1, long + ".", 9, False, 0.0)]
    assert similarity(ngrams(near[0].text), ngrams(near[1].text)) > 0.9
    assert pairs_of(near) == [(0, 1)]
    found = select(near, PairRules(dedupe=0.8), "prompt")
    assert found.dropped_answers == {(0, 0): reasons.ALONE, (0, 1): reasons.ALIKE}
    assert pairs_of([near[0], Candidate(0, 1, "Cork.", 2, False, 0.0)], dedupe=0.8) == [(0, 1)]


def test_of_equal_answers_one_that_can_be_used_stays() -> None:
    cut, whole, other = (
        Candidate(0, 0, "Dublin", 2, True, 1.0),
        Candidate(0, 1, "Dublin", 2, False, 1.0),
        Candidate(0, 2, "Cork", 2, False, 0.0),
    )
    assert pairs_of([cut, whole, other]) == [(1, 2)]


def test_delta_prefers_the_first_folder() -> None:
    strong = [Candidate(0, sample, f"strong {sample}", 5, sample == 0, None) for sample in range(3)]
    weak = [Candidate(1, sample, f"weak {sample}", 5, False, None) for sample in range(2)]
    found = select([*strong, *weak], PairRules(strategy="delta"), "prompt")
    assert [(a.name, b.name) for a, b in found.pairs] == [((0, 1), (1, 0)), ((0, 2), (1, 1))]
    assert found.dropped_answers == {(0, 0): reasons.CUT_OFF}
    same = select([strong[1], strong[1]._replace(side=1)], PairRules(strategy="delta"), "prompt")
    assert same.dropped_pairs == [reasons.SIDES_ALIKE]
    assert select(strong, PairRules(strategy="delta"), "prompt").dropped_answers[0, 1] == reasons.ONE_FOLDER


def test_a_person_is_asked_about_as_many_couples_as_wanted() -> None:
    rules = PairRules(strategy="human", max_per_prompt=2)
    shown = list(shown_couples(answers(None, None, None, cut_off=[0]), rules, "prompt"))
    assert len(shown) == 2
    choices: dict[tuple[int, int], Choice] = {(shown[0][0].sample, shown[0][1].sample): "a"}
    choices[shown[1][0].sample, shown[1][1].sample] = "tie"
    found = select(
        answers(None, None, None, cut_off=[0]), rules, "prompt", lambda a, b: choices.get((a.sample, b.sample))
    )
    first = shown[0]
    kept = [] if first[0].cut_off else [first]
    assert found.pairs == kept
    assert found.tried == 3
    assert reasons.TIED in found.dropped_pairs
    assert reasons.ENOUGH in found.dropped_pairs


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"strategy": "delta", "min_margin": 1.0}, "min_margin"),
        ({"min_margin": float("nan")}, "min_margin"),
        ({"dedupe": 0.0}, "dedupe"),
        ({"max_per_prompt": 0}, "max_per_prompt"),
        ({"max_length_gap": -1}, "max_length_gap"),
        ({"strategy": "best"}, "best_worst"),
    ],
)
def test_rules_are_checked(rules: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PairRules(**rules)


TEXTS = st.sampled_from(["", " ", "a", "A", "b", "one two three four five", "one two three four five six", "七 八"])


@st.composite
def prompts(draw: st.DrawFn) -> list[Candidate]:
    found = []
    sides: tuple[Side, ...] = (0, 1)
    for side in sides:
        for sample in range(draw(st.integers(0, 5))):
            score = draw(st.none() | st.integers(-2, 2).map(float))
            found.append(Candidate(side, sample, draw(TEXTS), draw(st.integers(0, 9)), draw(st.booleans()), score))
    return found


RULES = st.builds(
    lambda strategy, margin, **others: PairRules(
        strategy=strategy, min_margin=None if strategy in ("delta", "human") else margin, **others
    ),
    st.sampled_from(reasons.STRATEGIES),
    st.none() | st.sampled_from([0.0, 1.0, 2.0]),
    max_length_gap=st.none() | st.integers(0, 5),
    max_per_prompt=st.none() | st.integers(1, 3),
    dedupe=st.none() | st.sampled_from([0.3, 0.8, 1.0]),
    allow_cut_off=st.booleans(),
    seed=st.integers(0, 3),
)
CHOICES = st.sampled_from(["a", "b", "tie", "skip", None])


@given(prompts(), RULES, st.lists(CHOICES, min_size=7, max_size=7))
def test_every_answer_and_comparison_is_counted_once(
    given_answers: list[Candidate], rules: PairRules, made: list[Choice | None]
) -> None:
    candidates = given_answers if rules.strategy == "delta" else [one for one in given_answers if one.side == 0]
    choose = (lambda a, b: made[(3 * a.sample + b.sample) % 7]) if rules.strategy == "human" else None
    found = select(candidates, rules, "prompt", choose)
    used = {one.name for pair in found.pairs for one in pair}
    assert not used & set(found.dropped_answers)
    assert used | set(found.dropped_answers) == {one.name for one in candidates}
    assert found.tried == len(found.pairs) + len(found.dropped_pairs)
    assert rules.most_pairs is None or len(found.pairs) <= rules.most_pairs
    assert len({(a.name, b.name) for a, b in found.pairs}) == len(found.pairs), "no pair twice"
    for chosen, rejected in found.pairs:
        assert chosen.text.strip() != rejected.text.strip() != ""
        assert rules.allow_cut_off or not chosen.cut_off
        if rules.max_length_gap is not None:
            assert abs(chosen.length - rejected.length) <= rules.max_length_gap
        if rules.dedupe is not None:
            assert similarity(ngrams(chosen.text), ngrams(rejected.text)) < rules.dedupe
        if rules.strategy in reasons.SCORED:
            assert chosen.score is not None
            assert rejected.score is not None
            assert chosen.score - rejected.score >= (rules.min_margin or 1e-9)
    assert select(candidates, rules, "prompt", choose) == found


@given(st.lists(prompts(), max_size=4), RULES.filter(lambda rules: rules.strategy != "human"), st.integers(0, 2))
def test_the_counts_of_a_report_add_up(found: list[list[Candidate]], rules: PairRules, unanswered: int) -> None:
    num_sides = 2 if rules.strategy == "delta" else 1
    groups = [
        Group(make_question(f"{number}?", "p"), [one for one in candidates if one.side < num_sides])
        for number, candidates in enumerate(found)
    ]
    # A prompt without answers is in no group.
    groups = [group for group in groups if group.candidates]
    ids = [group.question.prompt_id for group in groups] + [f"unanswered {number}" for number in range(unanswered)]
    material = Material([Source(Path("gen"), "digest", frozenset(ids), [])] * num_sides, None, "tokens", groups)
    selections = [(group, select(group.candidates, rules, group.question.prompt_id)) for group in groups]
    report = make_report(material, rules, selections)
    counts, answers, pairs = report["prompts"], report["answers"], report["pairs"]
    assert counts["read"] == len(ids) == counts["with_pairs"] + sum(counts["dropped"].values())
    assert answers["read"] == sum(len(group.candidates) for group in groups)
    used = answers["chosen"] + answers["rejected"] + answers["chosen_and_rejected"]
    assert answers["read"] == used + sum(answers["dropped"].values())
    assert pairs["tried"] == pairs["kept"] + sum(pairs["dropped"].values())
    assert pairs["kept"] == sum(len(selection.pairs) for _, selection in selections)
    assert (report["length"] is None) == (pairs["kept"] == 0)
