from __future__ import annotations

from typing import Any

import pytest

from jdpo.data.schemas.formats import (
    EMPTY_SIDE,
    HISTORIES_DIFFER,
    NO_ASSISTANT_TURN,
    PROMPT_ELSEWHERE,
    UNWANTED,
    Dropped,
    completion_rows,
    is_preference,
    preference_rows,
)
from jdpo.types import CompletionRow, PreferenceRow

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "The sky?"}
BLUE = {"role": "assistant", "content": "That is blue."}
GREEN = {"role": "assistant", "content": "The sky is green."}
AGAIN = {"role": "user", "content": "Sure?"}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def preference_row(raw: dict[str, Any], origin: str) -> PreferenceRow | Dropped:
    """Reads a raw row of two sides."""
    (row,) = preference_rows(raw, origin)
    return row


def completion_row(raw: dict[str, Any], origin: str) -> CompletionRow | Dropped:
    (row,) = completion_rows(raw, origin)
    return row


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        pytest.param({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, [ASK], id="explicit"),
        pytest.param({"prompt": [ASK], "chosen": BLUE, "rejected": GREEN}, [ASK], id="sides-are-one-message"),
        pytest.param(
            {"prompt": [ASK], "chosen": BLUE["content"], "rejected": GREEN["content"]}, [ASK], id="sides-are-words"
        ),
        pytest.param({"prompt": ASK, "chosen": [BLUE], "rejected": [GREEN]}, [ASK], id="prompt-is-one-message"),
        pytest.param({"prompt": "The sky?", "chosen": [BLUE], "rejected": [GREEN]}, [ASK], id="prompt-is-words"),
        pytest.param({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK], id="implied"),
        pytest.param(
            {"prompt": None, "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK], id="implied-by-a-null-prompt"
        ),
        pytest.param(
            {"chosen": [ASK, BLUE, AGAIN, BLUE], "rejected": [ASK, BLUE, AGAIN, GREEN]},
            [ASK, BLUE, AGAIN],
            id="implied-by-several-turns",
        ),
        pytest.param(
            {"prompt": "The sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN], "score": 3},
            [ASK],
            id="words-and-whole-conversations",
        ),
        pytest.param(
            {"prompt": "The sky? ", "chosen": [SYSTEM, ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]},
            [SYSTEM, ASK],
            id="words-and-whole-conversations-with-a-system-turn",
        ),
        pytest.param(
            {"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK], id="prompt-stands-twice"
        ),
        pytest.param(
            {"prompt": [SYSTEM, ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            [SYSTEM, ASK],
            id="sides-repeat-the-end-of-the-prompt",
        ),
        pytest.param(
            {"prompt": [ASK], "chosen": [BLUE, AGAIN, BLUE], "rejected": [BLUE, AGAIN, GREEN]},
            [ASK, BLUE, AGAIN],
            id="sides-go-on-for-turns",
        ),
        pytest.param(
            {
                "conversations": [{"from": "system", "value": "Be brief."}, human("The sky?")],
                "chosen": gpt("That is blue."),
                "rejected": gpt("The sky is green."),
            },
            [SYSTEM, ASK],
            id="sharegpt",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: The sky?\n\nAssistant: That is blue.",
                "rejected": "\n\nHuman: The sky?\n\nAssistant: The sky is green.",
            },
            [ASK],
            id="transcript",
        ),
    ],
)
def test_every_schema_gives_the_same_row(raw: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    assert preference_row(raw, "x.jsonl:1") == PreferenceRow(prompt, [BLUE], [GREEN], "x.jsonl:1")


def test_strings_stay_strings() -> None:
    raw = {"prompt": "The sky?", "chosen": " blue", "rejected": " green"}
    assert preference_row(raw, "x:1") == PreferenceRow("The sky?", " blue", " green", "x:1")


def test_transcripts_are_cut_at_speakers_only() -> None:
    chosen = "\n\nHuman: One\n\nTwo: Human: hm\n\nAssistant:  Yes\n\nNo \n\nHuman: Hm\n\nAssistant:"
    row = preference_row({"chosen": chosen, "rejected": chosen + " Well"}, "x:1")
    assert isinstance(row, PreferenceRow)
    assert row.prompt == [
        {"role": "user", "content": "One\n\nTwo: Human: hm"},
        {"role": "assistant", "content": "Yes\n\nNo"},
        {"role": "user", "content": "Hm"},
    ]
    assert (row.chosen, row.rejected) == (
        [{"role": "assistant", "content": ""}],
        [{"role": "assistant", "content": "Well"}],
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"chosen": [ASK, BLUE, AGAIN, BLUE], "rejected": [ASK, GREEN, AGAIN, BLUE]}, HISTORIES_DIFFER),
        ({"chosen": [ASK, BLUE], "rejected": [AGAIN, GREEN]}, HISTORIES_DIFFER),
        ({"chosen": [ASK, BLUE], "rejected": [ASK, BLUE, AGAIN, GREEN]}, HISTORIES_DIFFER),
        (
            {"chosen": [ASK, BLUE], "rejected": [ASK]},
            f"{NO_ASSISTANT_TURN}: the last turn of rejected has the role user",
        ),
        ({"prompt": [ASK], "chosen": [], "rejected": [GREEN]}, EMPTY_SIDE),
        ({"prompt": "The sea?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, PROMPT_ELSEWHERE),
        ({"prompt": [AGAIN], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, PROMPT_ELSEWHERE),
    ],
)
def test_sides_that_share_no_prompt_are_dropped_with_the_reason(raw: dict[str, Any], reason: str) -> None:
    assert preference_row(raw, "x:1") == Dropped(reason, "x:1")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"question": "?", "chosen": "a"}, r"(?s)x\.jsonl:7: the columns fit no known format.*question \(string\), ch"),
        ({"prompt": "?", "chosen": "a", "rejected": None}, r"(?s)x\.jsonl:7: .*rejected \(null\).*Known formats"),
        ({"prompt": "?", "chosen": "a", "rejected": 3}, r"(?s)x\.jsonl:7: .*rejected \(number\)"),
        ({"chosen": "blue", "rejected": "green"}, r"(?s)x\.jsonl:7: the columns fit no known.*Human: "),
        ({}, r"(?s)x\.jsonl:7: .*Found: none"),
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": ["no"]}, r"x\.jsonl:7: rejected\[0\] is string"),
        (
            {"prompt": [ASK], "chosen": [{"role": "narrator", "content": "a"}], "rejected": [GREEN]},
            r"x\.jsonl:7: chosen\[0\] has the role 'narrator'; known roles are system, .*gpt",
        ),
        (
            {"prompt": [ASK], "chosen": [{"role": None, "content": "a"}], "rejected": [GREEN]},
            r"x\.jsonl:7: chosen\[0\] has the role None",
        ),
        (
            {"prompt": [{"role": "user", "content": None}], "chosen": [BLUE], "rejected": [GREEN]},
            r"x\.jsonl:7: the content of prompt\[0\] is null; expected a string",
        ),
        (
            {"prompt": [ASK], "chosen": [{"role": "assistant", "content": {"text": "Hi"}}], "rejected": [GREEN]},
            r"x\.jsonl:7: the content of chosen\[0\] is object; expected a string",
        ),
        (
            {"prompt": [{"content": "?"}], "chosen": [BLUE], "rejected": [GREEN]},
            r"x\.jsonl:7: prompt\[0\] has the keys content; expected a message",
        ),
    ],
)
def test_bad_rows_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_row(raw, "x.jsonl:7")


def test_further_keys_of_a_message_stay_for_the_template() -> None:
    thought = BLUE | {"reasoning_content": "Hm.", "name": None}
    row = preference_row({"prompt": [ASK], "chosen": [thought], "rejected": [GREEN]}, "x:1")
    assert isinstance(row, PreferenceRow)
    assert row.chosen == [BLUE | {"reasoning_content": "Hm."}]


@pytest.mark.parametrize(
    ("raw", "prompt", "completion"),
    [
        ({"messages": [ASK, BLUE, AGAIN, GREEN]}, [ASK, BLUE, AGAIN], [GREEN]),
        ({"prompt": "ignored", "messages": [ASK, BLUE]}, [ASK], [BLUE]),
        ({"conversations": [human("The sky?"), gpt("That is blue.")]}, [ASK], [BLUE]),
        ({"instruction": "The sky?", "input": "", "output": "That is blue."}, [ASK], [BLUE]),
        (
            {"conversations": [human("The sky?"), gpt("That is blue.")], "system": "Be brief."},
            [SYSTEM, ASK],
            [BLUE],
        ),
        ({"prompt": "The sky?", "completion": "That is blue.", "system": "Be brief."}, [SYSTEM, ASK], [BLUE]),
        ({"prompt": "The sky?", "completion": " blue", "label": True}, "The sky?", " blue"),
        ({"prompt": "The sky?", "completion": " blue"}, "The sky?", " blue"),
        ({"prompt": [ASK], "completion": [BLUE]}, [ASK], [BLUE]),
        ({"prompt": [ASK], "completion": "That is blue."}, [ASK], [BLUE]),
        ({"prompt": "The sky?", "completion": BLUE}, [ASK], [BLUE]),
        ({"prompt": "The sky?", "chosen": " blue", "rejected": " green"}, "The sky?", " blue"),
        ({"chosen": [ASK, BLUE], "rejected": [AGAIN, GREEN]}, [ASK], [BLUE]),
        (
            {"conversations": [human("The sky?")], "chosen": gpt("That is blue."), "rejected": gpt("No.")},
            [ASK],
            [BLUE],
        ),
    ],
)
def test_every_supervised_schema(raw: dict[str, Any], prompt: Any, completion: Any) -> None:
    assert completion_row(raw, "x:1") == CompletionRow(prompt, completion, "x:1")
    assert is_preference(raw) == ("chosen" in raw)


def test_a_conversation_that_ends_in_a_question_is_dropped() -> None:
    dropped = Dropped(NO_ASSISTANT_TURN, "x:1", "the last turn has the role user")
    assert completion_row({"messages": [ASK, BLUE, AGAIN]}, "x:1") == dropped
    assert completion_row({"messages": []}, "x:1") == Dropped(NO_ASSISTANT_TURN, "x:1")


def test_missing_columns_of_a_supervised_row_are_named() -> None:
    with pytest.raises(ValueError, match=r"(?s)x:1: .*Found: text \(string\)\n.*\nKnown formats"):
        completion_row({"text": "The sky is blue."}, "x:1")


def test_a_completion_that_nobody_wants_is_not_learnt() -> None:
    for label in (False, "False"):
        raw = {"prompt": "The sky?", "completion": " green", "label": label}
        assert completion_row(raw, "x:1") == Dropped(UNWANTED, "x:1")


def test_of_ranked_answers_the_best_is_learnt() -> None:
    answers = [{"answer": "No.", "rank": 3.0}, {"answer": "That is blue.", "rank": 1.0}, {"answer": "Hm.", "rank": 2.0}]
    raw = {"prompt": "\n\nHuman: The sky?\n\nAssistant: ", "answers": answers}
    assert completion_row(raw, "x:1") == CompletionRow([ASK], [BLUE], "x:1")
    assert is_preference(raw)


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_nesting_is_read_or_named(depth: int) -> None:
    deep: Any = "x"
    for _ in range(depth):
        deep = {"a": deep}
    raw = {"prompt": [ASK], "chosen": [BLUE | {"tool_calls": [deep]}], "rejected": [GREEN | {"meta": deep}]}
    if depth == 100:
        assert isinstance(preference_row(raw, "x:1"), PreferenceRow)
    else:
        with pytest.raises(ValueError, match=r"^x:1: the row is nested too deeply$"):
            preference_row(raw, "x:1")


@pytest.mark.parametrize("column", ["prompt", "completion", "chosen"])
def test_a_name_without_end_leaves_the_message_short(column: str) -> None:
    voted = {"ask": "a", "reply_1": "b", "reply_2": "c", "winner" + 6000 * "9": 1}
    with pytest.raises(ValueError, match="fit no known format") as error:
        preference_rows(voted, "x:1")
    assert len(str(error.value)) < 3000
    raw = {"prompt": "a", "completion": "b", "chosen": "c"}
    raw[column + 6000 * "9"] = raw.pop(column)
    for read in (preference_rows, completion_rows):
        if read is completion_rows and column == "chosen":
            continue  # prompt and completion are there: the row is read
        with pytest.raises(ValueError, match="fit no known format") as error:
            read(raw, "x:1")
        assert len(str(error.value)) < 3000
        assert f"{column}999" in str(error.value)
        assert f"{column}999" in str(error.value)


@pytest.mark.parametrize(("column", "value"), [("images", ["a.png"]), ("video", "a.mp4")])
def test_a_column_that_would_change_what_is_learnt_is_refused(column: str, value: Any) -> None:
    raw = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for empty in ([], {}, None):
        assert preference_rows(raw | {column: empty}, "x:1") == preference_rows(raw, "x:1")
    with pytest.raises(ValueError, match=f"x:1: the row has {column}, and would mean something else"):
        preference_rows(raw | {column: value}, "x:1")


def test_a_key_without_end_leaves_the_message_short() -> None:
    raw = {"prompt": [{"role" + 6000 * "9": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=r"has the keys role999.*\.\.\., content; expected a message") as error:
        preference_rows(raw, "x:1")
    assert len(str(error.value)) < 300
