"""Figures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jdpo.comparison.compare_document import Figure
from jdpo.comparison.figures.answer_figures import AnswerPair, answer_figures, repetition
from jdpo.comparison.figures.fact_figures import Fact, compared_facts, fact_figures
from jdpo.comparison.figures.pair_figures import PairRows, calibration_bins, pair_figures
from jdpo.comparison.figures.win_figures import Won, win_rates
from jdpo.comparison.sentences import verdict_of
from jdpo.generation.prompts import make_question
from jdpo.generation.values import Answer


def pairs(before: list[list[float]], after: list[list[float]], lengths: list[list[int]], datasets: int = 1) -> PairRows:
    num = len(before)
    return PairRows(
        datasets=tuple("ab"[:datasets]),
        dataset_of=np.arange(num) % datasets,
        prompts=np.arange(num, dtype=np.uint64),
        origins=[f"rows.jsonl:{row + 1}" for row in range(num)],
        lengths=np.array(lengths),
        before=np.array(before),
        after=np.array(after),
    )


FOUR = pairs(
    before=[[-10, -12], [-10, -8], [-6, -6], [-20, -30]],
    after=[[-8, -13], [-12, -8], [-6, -6], [-19, -30]],
    lengths=[[5, 4], [5, 4], [3, 3], [10, 20]],
)


def by_name(figures: object) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}  # type: ignore[attr-defined]


def test_pairs_by_hand() -> None:
    found = by_name(pair_figures(FOUR, beta=0.5))
    # Changes of chosen minus rejected: 3, -2, 0, 1; a tie counts one half.
    assert found["margin"].all.after.value == pytest.approx(0.5 * 2 / 4)
    assert found["accuracy"].all.after.value == pytest.approx(2.5 / 4)
    # Longer is right, right, a tie and wrong.
    assert found["accuracy.length_only"].all.after.value == pytest.approx(2.5 / 4)
    assert found["accuracy.over_length"].all.after.value == 0
    assert found["accuracy.logps"].all.before is not None
    assert found["accuracy.logps"].all.before.value == pytest.approx(2.5 / 4)
    assert found["chosen_fell"].all.after.value == pytest.approx(1 / 4)
    assert found["logps.chosen"].all.difference is not None
    assert found["logps.chosen"].all.difference.value == pytest.approx((2 - 2 + 0 + 1) / 4)
    # Over all tokens, not over rows.
    assert found["logps_per_token.chosen"].all.after.value == pytest.approx(-(8 + 12 + 6 + 19) / 23)
    # Per token: -2 against -3, -2 against -2, a tie, -2 against -1.5; after -1.6, -2.4, a tie, -1.9.
    assert found["accuracy.logps_per_token"].all.after.value == pytest.approx(1.5 / 4)


def test_each_dataset_has_its_own_figures() -> None:
    two = FOUR._replace(datasets=("a", "b"), dataset_of=np.array([0, 1, 1, 0]))
    found = by_name(pair_figures(two, beta=1.0))["accuracy"]
    assert {label: values.after.value for label, values in found.datasets.items()} == {"a": 1.0, "b": 0.25}
    assert not by_name(pair_figures(FOUR, beta=1.0))["accuracy"].datasets


def test_a_calibrated_margin_has_no_error() -> None:
    num = 4000  # more than are resampled
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, num)
    margins = np.log(confidence / (1 - confidence)) * np.where(rng.random(num) < confidence, 1, -1)
    zeros, lengths = np.zeros((num, 2)), np.ones((num, 2), int)
    rows = PairRows(("a",), zeros[:, 0].astype(int), np.arange(num), [""] * num, lengths, zeros, zeros)
    rows = rows._replace(after=np.stack([margins, zeros[:, 0]], axis=1))
    found = by_name(pair_figures(rows, beta=1.0))
    assert found["calibration.error"].all.after.value < 0.03
    overconfident = by_name(pair_figures(rows, beta=4.0))
    assert overconfident["calibration.error"].all.after.value > 0.1
    assert overconfident["calibration.overconfidence"].finding == "changed"
    bins = calibration_bins(rows, beta=1.0)
    assert sum(one.num_rows for one in bins) == num
    for one in bins:
        assert one.confidence is not None
        assert one.accuracy is not None
        assert one.low <= one.confidence < one.high
        assert one.accuracy.value == pytest.approx(one.confidence, abs=0.08)


def answer(text: str, tokens: list[int], *, prompt: int = 0, cut: bool = False) -> Answer:
    message = {"role": "assistant", "content": text}
    return Answer(f"{prompt:016x}", 0, message, tokens, "length" if cut else "stop", -1.0)


def test_a_call_is_an_answer_and_a_thought_alone_is_none() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    calling, thinking = (
        answer("", [1, 2])._replace(message={"role": "assistant", "content": "", **more})
        for more in ({"tool_calls": [call]}, {"reasoning_content": "Hm."})
    )
    found = by_name(answer_figures([AnswerPair(calling, thinking)]))["answers.empty"].all
    assert (found.before.value, found.after.value) == (0.0, 1.0)


def test_answers_by_hand() -> None:
    found = by_name(
        answer_figures(
            [
                AnswerPair(answer("yes", [1, 2]), answer("yes, да", [1, 2, 3, 4], cut=True)),
                AnswerPair(answer("no", [1, 2], prompt=1), answer(" ", [1, 1, 1, 1, 1, 1], prompt=1)),
            ]
        )
    )
    assert found["answers.length"].all.difference is not None
    assert found["answers.length"].all.difference.value == 3
    assert found["answers.cut_off"].all.after.value == 0.5
    assert found["answers.empty"].all.after.value == 0.5
    # The second answer has three runs of four equal tokens, two of which repeat the first.
    assert found["answers.repetition"].all.after.value == pytest.approx((0 + 2 / 3) / 2)
    assert found["answers.script.Cyrillic"].all.after.value == pytest.approx((2 / 5 + 0) / 2)


def test_repetition_of_words_where_there_are_no_tokens() -> None:
    text = answer("a b c d a b c d", [])._replace(tokens=None)
    assert repetition(text) == pytest.approx(1 - 4 / 5)


def outcomes(judge: str, seed: int = 0, num: int = 60) -> list[Won]:
    """Comparisons of answers of which those after are 30 tokens longer on average."""
    longer = np.random.default_rng(seed).normal(30, 40, num).astype(int)
    if judge == "order":  # always the first one: the orders disagree
        return [Won(f"{row}", 0, 0.5, int(gap), (True, True)) for row, gap in enumerate(longer)]
    return [Won(f"{row}", 0, float(gap > 0) if gap else 0.5, int(gap)) for row, gap in enumerate(longer)]


def test_a_judge_of_order_gives_one_half() -> None:
    found = by_name(win_rates(outcomes("order")).figures)
    for name in ("win_rate", "win_rate.length_controlled"):
        assert found[name].all.after.value == pytest.approx(0.5)
        assert found[name].finding == "unclear"
    assert found["win_rate.first_shown"].all.after.value == 1
    assert found["win_rate.first_shown"].finding == "changed"


def test_length_control_removes_a_preference_for_length() -> None:
    found = by_name(win_rates(outcomes("length")).figures)
    assert found["win_rate"].finding == "better"
    assert found["win_rate.length_controlled"].finding == "unclear"


def test_length_control_keeps_what_is_not_length() -> None:
    rng = np.random.default_rng(0)
    longer = rng.normal(10, 40, 400)
    won = rng.random(400) < 1 / (1 + np.exp(-0.8 - 2 * np.tanh(longer / longer.std())))
    rows = [Won(f"{row}", 0, float(one), int(gap)) for row, (one, gap) in enumerate(zip(won, longer, strict=True))]
    found = by_name(win_rates(rows).figures)["win_rate.length_controlled"].all.after
    assert found.low is not None
    assert found.high is not None
    assert 0.5 < found.low < 1 / (1 + np.exp(-0.8)) < found.high


def test_unknown_verdicts_and_extrapolation_are_told() -> None:
    rows = [Won(f"{row}", 0, None if row < 3 else float(row % 2), 10 + row) for row in range(20)]
    found = win_rates(rows)
    assert by_name(found.figures)["win_rate"].all.num_rows == 17
    assert any("3 of 20" in line for line in found.warnings)
    assert any("extrapolated" in line for line in found.warnings)
    assert not win_rates([Won("a", 0, None, 1)]).figures


def test_answers_of_equal_length_are_no_extrapolation() -> None:
    rows = [Won(f"{row}", 0, float(row % 2), 1 if row == 0 else 0) for row in range(20)]
    assert not win_rates(rows).warnings


def test_facts_by_hand() -> None:
    facts = [Fact(make_question(f"question {row}", f"f.jsonl:{row}"), f"answer {row}") for row in range(4)]
    before, after = np.array([0.9, 0.6, 0.2, 0.1]), np.array([0.8, 0.3, 0.7, 0.1])
    found = by_name(fact_figures(facts, before, after))
    assert found["facts.probability"].all.after.value == pytest.approx(1.9 / 4)
    assert found["facts.accuracy"].all.before is not None
    assert found["facts.accuracy"].all.before.value == found["facts.accuracy"].all.after.value == 0.5
    assert found["facts.fell"].all.after.value == 0.5
    listed = compared_facts(facts, before, after)
    assert [fact.question[-1] for fact in listed] == ["1", "0", "3", "2"]
    assert [fact.fell for fact in listed] == [True, True, False, False]
    assert any("2 of 4 facts" in line for line in verdict_of(found.values(), listed).worse)


def test_the_verdict_follows_the_numbers() -> None:
    num = 40
    rng = np.random.default_rng(0)
    before = rng.normal(-20, 3, (num, 2))
    after = before + np.array([2.0, -2.0]) + rng.normal(0, 0.5, (num, 2))
    rows = pairs(before.tolist(), after.tolist(), [[5, 4]] * num)
    verdict = verdict_of(pair_figures(rows, beta=0.1), [])
    assert any(line.startswith("Accuracy of the implicit reward: 100.0 %") for line in verdict.better)
    assert any(line.startswith("Chosen log-prob: from") for line in verdict.better)
    assert any("lengths alone" in line for line in verdict.unclear)  # longer is always chosen here
    same = verdict_of(pair_figures(rows._replace(after=rows.before), beta=0.1), [])
    assert not any((same.better, same.worse, same.changed, same.unclear))
    assert same.unchanged == ["No figure differs between the two models."]


def test_equal_rows_are_unchanged_and_others_are_told() -> None:
    before = np.random.default_rng(0).normal(-20, 3, (40, 2))
    after = before + np.array([0.0, -2.0])
    figures = by_name(pair_figures(pairs(before.tolist(), after.tolist(), [[5, 4]] * 40), beta=0.1))
    assert figures["logps.chosen"].finding == "unchanged"
    verdict = verdict_of(figures.values(), [])
    assert any(line.startswith("Chosen log-prob:") and "before and after" in line for line in verdict.unchanged)
    assert any(line.startswith("Rejected log-prob: from") for line in verdict.changed)
    assert not any("Chosen log-prob" in line for line in verdict.unclear)
