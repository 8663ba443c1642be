"""Golden rows of every schema, written by hand with the columns of well-known datasets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.data.schemas.formats import (
    SYSTEM_ELSEWHERE,
    Dropped,
    Reading,
    completion_rows,
    is_preference,
    preference_rows,
    schema_name,
)
from jdpo.data.schemas.messages import assistant, user
from jdpo.data.schemas.schema_table import CANONICAL, PREFERENCE_SCHEMAS
from jdpo.types import CompletionRow, PreferenceRow

BRIEF = {"role": "system", "content": "Be brief."}
ASK, BLUE, GREEN = user("The sky?"), assistant("It is blue."), assistant("It is green.")


def golden(
    better: str = "It is blue.", worse: str = "It is green."
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Returns by dataset: a raw row with both answers, and the fields read from it besides the answers."""
    chat = {"chosen": [ASK, assistant(better)], "rejected": [ASK, assistant(worse)]}
    words = {"chosen": better, "rejected": worse}
    whole = {side: f"\n\nHuman: The sky?\n\nAssistant: {answer}" for side, answer in words.items()}
    return {
        "hh-rlhf": (whole, {"schema": "hh-rlhf"}),
        "ultrafeedback_binarized": (
            {
                "prompt": "The sky?",
                "prompt_id": "af3e",
                **chat,
                "messages": chat["chosen"],
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            },
            {"schema": "binarized", "margin": 2.5},
        ),
        "argilla dpo-mix": (
            {"dataset": "capybara", **chat, "chosen_rating": 5.0, "rejected_rating": 4.0},
            {"schema": "implicit", "margin": 1.0},
        ),
        "argilla ultrafeedback-cleaned": (
            {"source": "evol", "prompt": "The sky?", **chat, "chosen-rating": 4.75, "rejected-rating": 3.0},
            {"schema": "binarized", "margin": 1.75},
        ),
        "capybara binarized": (
            {"source": "Airoboros", "conversation": [{"input": "The sky?", "output": better}], "prompt": None}
            | chat
            | {"rating_chosen": 5, "rating_rejected": 3},
            {"schema": "implicit", "margin": 2.0},
        ),
        "openhermes binarized": (
            {"conversations": [{"from": "human", "value": "The sky?"}, {"from": "gpt", "value": better}]}
            | chat
            | {"chosen_score": 7.0, "rejected_score": 3.0},
            {"schema": "implicit", "margin": 4.0},
        ),
        "distilabel orca": (
            {
                "system": "Be brief.",
                "input": "The sky?",
                **words,
                "generations": [worse, better],
                "order": ["chosen", "rejected"],
                "rating": [7.0, 10.0],
                "status": "swapped",
                "chosen_score": 10.0,
            },
            {"schema": "distilabel", "prompt": [BRIEF, ASK], "margin": 3.0},
        ),
        "distilabel orca without generations": (
            {"system": "", "input": "The sky?", **words, "rating": [7.0, 10.0]},
            {"schema": "distilabel", "margin": None},
        ),
        "orca": (
            {"system": "Be brief.", "question": "The sky?", **words},
            {"schema": "orca", "prompt": [BRIEF, ASK]},
        ),
        "shp, A is better": (
            {
                "post_id": "x",
                "history": "The sky?",
                "human_ref_A": better,
                "human_ref_B": worse,
                "labels": 1,
                "score_A": 30,
                "score_B": 10,
                "score_ratio": 3.0,
            },
            {"schema": "shp", "margin": 20.0},
        ),
        "shp, B is better": (
            {"history": "The sky?", "human_ref_A": worse, "human_ref_B": better, "labels": 0}
            | {"score_A": 2, "score_B": 9},
            {"schema": "shp", "margin": 7.0},
        ),
        "nectar": (
            {
                "prompt": "\n\nHuman: The sky?\n\nAssistant: ",
                "answers": [
                    {"answer": worse, "model": "gpt-3.5", "rank": 7.0},
                    {"answer": "Hm.", "model": "llama", "rank": 2.0},
                    {"answer": better, "model": "gpt-4", "rank": 1.0},
                ],
                "turns": 1,
            },
            {"schema": "nectar"},
        ),
        "stack-exchange-preferences": (
            {
                "qid": 4,
                "question": "The sky?",
                "answers": [
                    {"text": worse, "pm_score": -1, "selected": False, "author": "a"},
                    {"text": better, "pm_score": 4, "selected": True, "author": "b"},
                ],
            },
            {"schema": "stack-exchange-preferences", "margin": 5.0},
        ),
        "stack-exchange-paired": (
            {"qid": 4, "question": "The sky?", "response_j": better, "response_k": worse, "metadata": ["x"]},
            {"schema": "stack-exchange-paired"},
        ),
        "tulu-3": (
            {"id": "x", "source": "s", "prompt": "The sky?", **chat, "chosen_model": "a"},
            {"schema": "binarized"},
        ),
        "llama-factory sharegpt": (
            {
                "conversations": [{"from": "human", "value": "The sky?"}],
                "chosen": {"from": "gpt", "value": better},
                "rejected": {"from": "gpt", "value": worse},
                "system": "Be brief.",
            },
            {"schema": "sharegpt", "prompt": [BRIEF, ASK]},
        ),
        "llama-factory alpaca": (
            {"instruction": "The sky?", "input": "At noon.", **words, "history": [["Hi", "Hello"]]},
            {"schema": "alpaca", "prompt": [user("Hi"), assistant("Hello"), user("The sky?\nAt noon.")]},
        ),
        "llama-factory alpaca with an output list": (
            {"instruction": "The sky?", "input": "", "output": [better, worse]},
            {"schema": "alpaca"},
        ),
        "conversation next to its sides": (
            {"messages": [ASK], **words, "source": "s"},
            {"schema": "conversation"},
        ),
        "history next to its sides": (
            {"history": [BRIEF, ASK], "chosen": [assistant(better)], "rejected": assistant(worse), "input": "x"},
            {"schema": "conversation", "prompt": [BRIEF, ASK]},
        ),
        "nemo-rl": (
            {
                "context": [ASK],
                "completions": [
                    {"rank": 1, "completion": [assistant(worse)]},
                    {"rank": 0, "completion": [assistant(better)]},
                ],
                "task_name": "t",
            },
            {"schema": "nemo-rl"},
        ),
        "nemo-rl responses": (
            {"prompt": "The sky?", "chosen_response": better, "rejected_response": worse},
            {"schema": "prompt-responses"},
        ),
        "argilla responses": (
            {"instruction": "The sky?", "chosen_response": better, "rejected_response": worse}
            | {"chosen_avg_rating": "4.5", "rejected_avg_rating": "4"},
            {"schema": "instruction-responses", "margin": 0.5},
        ),
        "arena": (
            {"question_id": 7, "model_a": "m", "model_b": "n", "prompt": "The sky?", "response_a": worse}
            | {"response_b": better, "winner": "model_b"},
            {"schema": "votes"},
        ),
        "arena, whole conversations": (
            {"conversation_a": chat["chosen"], "conversation_b": chat["rejected"], "winner": "model_a", "turn": 1},
            {"schema": "votes"},
        ),
        "safer answers": (
            {"prompt": "The sky?", "response_0": worse, "response_1": better, "is_response_0_safe": False}
            | {"better_response_id": 1, "safer_response_id": 1},
            {"schema": "votes"},
        ),
        "helpsteer": (
            {"context": [BRIEF, ASK], "response1": better, "response2": worse, "overall_preference": -2},
            {"schema": "votes", "prompt": [BRIEF, ASK]},
        ),
        "trl conversational": (
            {"prompt": [ASK], "chosen": [assistant(better)], "rejected": [assistant(worse)]},
            {"schema": "conversational"},
        ),
        "trl implicit": (chat, {"schema": "implicit"}),
        "trl with tools": (
            {"prompt": [ASK], "chosen": [assistant(better)], "rejected": [assistant(worse)]}
            | {"tools": '[{"type": "function", "function": {"name": "look", "id": null, "parameters": {"a": null}}}]'},
            {
                "schema": "conversational",
                "tools": [{"type": "function", "function": {"name": "look", "parameters": {"a": None}}}],
            },
        ),
        "trl standard": ({"prompt": "The sky?", **words}, {"schema": "standard", "plain": True}),
        "standard with a system column": (
            {"prompt": "The sky?", **words, "system": "Be brief."},
            {"schema": "standard", "prompt": [BRIEF, ASK]},
        ),
        "standard with tools": (
            {"prompt": "The sky?", **words, "tools": [{"name": "look", "parameters": {"at": {}, "by": None}}]},
            {"schema": "standard", "tools": [{"name": "look", "parameters": {"at": {}, "by": None}}]},
        ),
        "conversations in the cells of a CSV file": (
            {
                "chosen": f'[{{"from": "human", "value": "The sky?"}}, {{"from": "gpt", "value": "{better}"}}]',
                "rejected": f'[{{"from": "human", "value": "The sky?"}}, {{"from": "gpt", "value": "{worse}"}}]',
                "score_chosen": "7",
                "score_rejected": "8",
            },
            {"schema": "implicit", "margin": -1.0},
        ),
    }


@pytest.mark.parametrize("dataset", golden())
def test_golden_rows(dataset: str) -> None:
    raw, wanted = golden()[dataset]
    if wanted.get("plain"):
        expected = PreferenceRow("The sky?", "It is blue.", "It is green.", "x:1")
    else:
        expected = PreferenceRow(wanted.get("prompt", [ASK]), [BLUE], [GREEN], "x:1")
    expected = expected._replace(margin=wanted.get("margin"), tools=wanted.get("tools"))
    assert preference_rows(raw, "x:1") == [expected]
    assert schema_name(raw) == wanted["schema"]
    assert completion_rows(raw, "x:1") == [CompletionRow(expected.prompt, expected.chosen, "x:1", expected.tools)]
    assert is_preference(raw) == (dataset != "ultrafeedback_binarized")


def test_every_schema_has_a_golden_row() -> None:
    assert {wanted["schema"] for _, wanted in golden().values()} == {schema.name for schema in PREFERENCE_SCHEMAS}
    assert len({schema.name for schema in PREFERENCE_SCHEMAS}) == len(PREFERENCE_SCHEMAS)
    assert {"prompt", "chosen", "rejected", "messages", "completion", "score_chosen", "tools", "system", "history"} <= {
        *CANONICAL
    }


WORDS = st.text("abc XY.,?!\néż", max_size=12)


@pytest.mark.parametrize("dataset", golden())
@settings(max_examples=15, deadline=None)
@given(before=WORDS, after=WORDS, other=WORDS, rule=st.sampled_from(["best_vs_worst", "best_vs_random", "all"]))
def test_the_better_answer_is_never_on_the_wrong_side(
    dataset: str, before: str, after: str, other: str, rule: Any
) -> None:
    cell = dataset.startswith("conversations in")  # written by hand as JSON: no newlines
    better = f"{before}BETTER{after}".replace("\n", "" if cell else "\n")
    raw, _ = golden(better, f"{other}WORSE".replace("\n", "" if cell else "\n"))[dataset]
    rows = preference_rows(dict(sorted(raw.items(), reverse=True)), "x:1", Reading(ranked=rule))
    assert rows
    for row in rows:
        assert isinstance(row, PreferenceRow)
        assert "WORSE" not in str(row.chosen)
        assert "BETTER" not in str(row.rejected)
        assert "BETTER" in str(row.chosen) or "WORSE" in str(row.rejected)
        assert "WORSE" not in str(row.prompt)
    assert any("BETTER" in str(row.chosen) for row in rows)


@pytest.mark.parametrize(("labels", "chosen"), [(1, "A"), (0, "B"), (True, "A"), (False, "B"), ("1", "A"), (0.0, "B")])
def test_shp_labels(labels: Any, chosen: str) -> None:
    raw = {"history": "?", "human_ref_A": "A", "human_ref_B": "B", "labels": labels}
    (row,) = preference_rows(raw, "x:1")
    assert isinstance(row, PreferenceRow)
    assert (row.chosen, row.margin) == ([assistant(chosen)], None)


@pytest.mark.parametrize("labels", [2, -1, "A", 0.5, [1]])
def test_shp_labels_of_another_kind_are_an_error(labels: Any) -> None:
    raw = {"history": "?", "human_ref_A": "A", "human_ref_B": "B", "labels": labels}
    with pytest.raises(ValueError, match=r"^x:1: labels is .*; expected 1 \(human_ref_A is better\) or 0$"):
        preference_rows(raw, "x:1")


def test_a_system_column_is_used_once_or_the_row_is_dropped() -> None:
    sides = {"chosen": [BRIEF, ASK, BLUE], "rejected": [BRIEF, ASK, GREEN]}
    assert preference_rows({**sides, "system": " Be brief. "}, "x:1") == [
        PreferenceRow([BRIEF, ASK], [BLUE], [GREEN], "x:1")
    ]
    assert preference_rows({**sides, "system": "Rhyme."}, "x:1") == [Dropped(SYSTEM_ELSEWHERE, "x:1")]
    long = {"prompt": "The sky?", "chosen": [ASK, GREEN, ASK, BLUE], "rejected": [ASK, GREEN, ASK, GREEN]}
    assert preference_rows({**long, "system": "Be brief."}, "x:1") == [
        PreferenceRow([BRIEF, ASK, GREEN, ASK], [BLUE], [GREEN], "x:1")
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "?", "answers": [{"answer": "a", "rank": 1}, "b"]}, r"x:1: answers\[1\] is string; expected an ob"),
        (
            {"prompt": "?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": "first"}]},
            r"x:1: answers\[1\]\.rank is 'first' \(string\); expected a number",
        ),
        (
            {"prompt": "?", "answers": [{"answer": "a", "rank": float("nan")}]},
            r"x:1: answers\[0\]\.rank is nan \(number\); expected a number",
        ),
        (
            {"question": "?", "answers": [{"text": "a", "pm_score": 1}, {"text": None, "pm_score": 2}]},
            r"x:1: answers\[1\]\.text is null; expected a string",
        ),
        (
            {"context": [ASK], "completions": [{"rank": 0, "completion": [BLUE]}, {"rank": 1, "completion": None}]},
            r"x:1: completions\[1\]\.completion is null; expected a list of",
        ),
        (
            {"instruction": "?", "chosen": "a", "rejected": "b", "history": [["Hi"]]},
            r"x:1: history\[0\] is list; expected \[question, answer\], two strings",
        ),
        ({"question": "?", "chosen": "a", "rejected": "b", "system": 5}, r"x:1: system is number; expected a string"),
    ],
)
def test_a_value_of_another_type_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_rows(raw, "x:1")
