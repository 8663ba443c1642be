"""Ranked answers to pairs, and what scores decide."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.config import DatasetConfig
from jdpo.data.schemas.formats import (
    BELOW_MARGIN,
    CONTRADICTED,
    FEW_ANSWERS,
    TIED,
    Dropped,
    Reading,
    completion_rows,
    preference_rows,
    reading_of,
)
from jdpo.types import PreferenceRow


def nectar(ranks: Sequence[float]) -> dict[str, Any]:
    return {"prompt": "?", "answers": [{"answer": f"{i}: {rank:g}", "rank": rank} for i, rank in enumerate(ranks)]}


def stack(scores: Sequence[float]) -> dict[str, Any]:
    return {"question": "?", "answers": [{"text": f"{i}: {s:g}", "pm_score": s} for i, s in enumerate(scores)]}


def pairs(raw: dict[str, Any], rule: Any, **reading: Any) -> list[tuple[str, str] | str]:
    """Returns the two answers of every pair, or the reason why there is none."""
    rows = preference_rows(raw, "x:1", Reading(ranked=rule, **reading))
    return [
        (row.chosen[0]["content"], row.rejected[0]["content"])  # type: ignore[index]
        if isinstance(row, PreferenceRow)
        else row.reason
        for row in rows
    ]


def test_rules_by_hand() -> None:
    ranks = [2, 1, 3, 1, 3]
    assert pairs(nectar(ranks), "best_vs_worst") == [("1: 1", "2: 3")]
    assert pairs(nectar(ranks), "all") == [
        ("1: 1", "0: 2"),
        ("0: 2", "2: 3"),
        ("3: 1", "0: 2"),
        ("0: 2", "4: 3"),
        ("1: 1", "2: 3"),
        TIED,
        ("1: 1", "4: 3"),
        ("3: 1", "2: 3"),
        TIED,
        ("3: 1", "4: 3"),
    ]
    ((better, worse),) = pairs(nectar(ranks), "best_vs_random")  # type: ignore[misc]
    assert (better, worse) in [("1: 1", "0: 2"), ("1: 1", "2: 3"), ("1: 1", "4: 3")]
    assert pairs(stack([1, 5, -2]), "best_vs_worst") == [("1: 5", "2: -2")]


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "all"])
def test_ties_and_single_answers_make_no_pair(rule: Any) -> None:
    assert pairs(nectar([2, 2]), rule) == [TIED]
    assert pairs(nectar([4]), rule) == [FEW_ANSWERS]
    assert pairs(nectar([]), rule) == [FEW_ANSWERS]
    assert pairs(stack([]), rule) == [FEW_ANSWERS]
    assert completion_rows(stack([]), "x:1") == [Dropped(FEW_ANSWERS, "x:1")]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.sampled_from(["best_vs_worst", "best_vs_random", "all"]))
def test_what_is_chosen_is_always_ranked_better(ranks: list[int], rule: Any) -> None:
    found = pairs(nectar(ranks), rule)
    made = [pair for pair in found if not isinstance(pair, str)]
    for better, worse in made:
        assert float(better.split()[1]) < float(worse.split()[1])
        if rule != "all":
            assert float(better.split()[1]) == min(ranks)
        if rule == "best_vs_worst":
            assert float(worse.split()[1]) == max(ranks)
    differing = sum(ranks[i] != ranks[j] for j in range(len(ranks)) for i in range(j))
    if rule == "all":
        assert len(made) == len(set(made)) == differing
        assert len(found) == len(ranks) * (len(ranks) - 1) // 2
    else:
        assert len(found) == 1
        assert len(made) == (differing > 0)


def test_the_random_pick_depends_only_on_the_words() -> None:
    rows = [nectar([1, 2, 3, 4]) | {"prompt": f"{i}?"} for i in range(60)]
    picks = [pairs(row, "best_vs_random")[0][1] for row in rows]
    assert {picks.count(pick) > 5 for pick in ("1: 2", "2: 3", "3: 4")} == {True}
    assert picks == [pairs(dict(reversed(row.items())) | {"source": "s"}, "best_vs_random")[0][1] for row in rows]
    code = (
        "from jdpo.data.schemas.formats import Reading, preference_rows\n"
        f"rows = {rows!r}\n"
        "print([preference_rows(r, 'y:9', Reading(ranked='best_vs_random'))[0].rejected[0]['content'] for r in rows])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(picks)


SIDES = {"prompt": "?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ({"score_chosen": 3, "score_rejected": 1.5}, 1.5),
        ({"score_chosen": 1, "score_rejected": 4}, -3.0),
        ({"score_chosen": "3", "score_rejected": "1"}, 2.0),
        ({"chosen_score": 3, "rejected_score": 3}, 0.0),
        ({"score_chosen": 3, "score_rejected": None}, None),
        ({"score_chosen": 3}, None),
        ({"score_chosen": float("nan"), "score_rejected": 1}, None),
        ({"score_chosen": 10**400, "score_rejected": 1}, None),
        ({"score_chosen": True, "score_rejected": False}, None),
        ({"score_chosen": "high", "score_rejected": "low"}, None),
        ({"score_chosen": None, "score_rejected": None, "chosen_rating": 5, "rejected_rating": 1}, 4.0),
        ({"rating": [1, 5]}, None),
        ({"rating": [5, None]}, None),
        ({"rating": [1, 5, 3]}, None),
        ({"rating": [1, 5], "generations": ["a", "b"]}, -4.0),
        ({"rating": [1, 5], "generations": ["b", "a"]}, 4.0),
    ],
)
def test_margins(scores: dict[str, Any], margin: float | None) -> None:
    (row,) = preference_rows(SIDES | scores, "x:1")
    assert isinstance(row, PreferenceRow)
    assert row.margin == margin


def test_min_margin_leaves_out_what_is_close_and_what_contradicts() -> None:
    reading = Reading(min_margin=2)

    def read(chosen: float, rejected: float) -> Any:
        return preference_rows(SIDES | {"score_chosen": chosen, "score_rejected": rejected}, "x:1", reading)

    assert read(5, 3) == [PreferenceRow("?", "a", "b", "x:1", 2.0)]
    assert read(5, 3.5) == [Dropped(BELOW_MARGIN, "x:1", "margin 1.5")]
    assert read(1, 4) == [Dropped(CONTRADICTED, "x:1", "margin -3")]
    assert pairs(stack([5, 4, 1]), "all", min_margin=2.0) == [BELOW_MARGIN, ("0: 5", "2: 1"), ("1: 4", "2: 1")]
    close = SIDES | {"score_chosen": 2, "score_rejected": 1}
    assert completion_rows(close, "x:1", reading) == [Dropped(BELOW_MARGIN, "x:1", "margin 1")]
    assert preference_rows(close, "x:1", Reading(min_margin=0)) == [PreferenceRow("?", "a", "b", "x:1", 1.0)]
    even = SIDES | {"score_chosen": 2, "score_rejected": 2}
    assert preference_rows(even, "x:1", Reading(min_margin=0)) == [PreferenceRow("?", "a", "b", "x:1", 0.0)]


@pytest.mark.parametrize(
    "raw", [SIDES | {"score_chosen": 3, "quality": 1}, nectar([1, 2]), nectar([1, 2]) | {"rank": 1}]
)
def test_min_margin_without_scores_is_an_error(raw: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^x:1: min_margin 0\.5 needs scores, .*Found: prompt, .*score_chosen and"
    ) as e:
        preference_rows(raw, "x:1", Reading(min_margin=0.5))
    assert "column_map" in str(e.value)
    with pytest.raises(ValueError, match=r"^x:1: min_margin 0\.5 needs scores"):
        completion_rows({"prompt": "?", "completion": "a"}, "x:1", Reading(min_margin=0.5))


def test_a_dataset_sets_how_it_is_read() -> None:
    dataset = DatasetConfig(path="x", column_map={"prompt": "q"}, ranked="all", min_margin=1)
    assert reading_of(dataset) == Reading({"prompt": "q"}, "all", 1.0)
    assert reading_of(DatasetConfig(path="x")) == Reading()
    with pytest.raises(ValueError, match="min_margin"):
        DatasetConfig(path="x", min_margin=-1)
    with pytest.raises(ValueError, match="best_vs_worst"):
        DatasetConfig(path="x", ranked="first")  # type: ignore[arg-type]
