"""Refused rows, the column_map that their message suggests, and column_map itself."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.config import DatasetConfig, DPOConfig
from jdpo.config.reading import load_config, to_yaml
from jdpo.data.schemas.formats import Reading, check_rows, completion_rows, is_preference, preference_rows, schema_name
from jdpo.data.schemas.messages import assistant, user
from jdpo.data.schemas.schema_table import CANONICAL
from jdpo.types import CompletionRow, PreferenceRow

UNSAID = [
    {"question": "The sky?", "reply_left": "It is blue.", "reply_right": "It is green.", "preference": "a"},
    {"question": "The sea?\n\x1b[31m" + "x" * 5000, "reply_left": "It is wet.", "reply_right": None, "preference": "a"},
    {"question": "The sun?", "reply_left": "It is hot.", "reply_right": "Cold.", "preference": "b"},
    {"question": "The moon?", "reply_left": "It is far.", "reply_right": "Near.", "preference": "a"},
]
SAMPLES = [(raw, f"x.jsonl:{number}") for number, raw in enumerate(UNSAID, start=1)]


def snippet(message: str) -> dict[str, str]:
    """Returns the column_map that a message suggests."""
    lines = message.splitlines()
    start = lines.index("  column_map:")
    block = [line for line in lines[start:] if line.startswith("  ")]
    column_map: dict[str, str] = yaml.safe_load("\n".join(block))["column_map"]
    return column_map


def refused(samples: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match="the columns fit no known format") as error:
        check_rows(samples, **options)
    return str(error.value)


def test_the_message_of_a_file_that_does_not_say_which_is_better() -> None:
    message = refused(SAMPLES)
    lines = message.splitlines()
    assert lines[0] == "x.jsonl:1: the columns fit no known format."
    assert lines[1] == (
        "Found: question (string), reply_left (string), reply_right (string or null), preference (string)"
    )
    assert lines[2:4] == [
        "Rows:",
        "  x.jsonl:1: {question: 'The sky?', reply_left: 'It is blue.', reply_right: 'It is green.', preference: 'a'}",
    ]
    assert lines[4].startswith(r"  x.jsonl:2: {question: 'The sea?\n\x1b")
    assert lines[5].startswith("  x.jsonl:3: ")
    assert lines[6] == "Known formats:"
    assert all(len(line) < 260 for line in lines)
    assert "rejected: reply_right" in message
    assert "    chosen: reply_left  # or reply_right: the columns do not tell which is better" in lines
    assert lines[-1].startswith("If preference tells row by row which answer is better")


def test_the_snippet_reads_the_rows_once_it_is_pasted() -> None:
    column_map = snippet(refused(SAMPLES))
    assert column_map == {"prompt": "question", "chosen": "reply_left", "rejected": "reply_right"}
    (row,) = preference_rows(UNSAID[0], "x:1", Reading(column_map))
    assert row == PreferenceRow("The sky?", "It is blue.", "It is green.", "x:1")


def test_rows_with_one_answer_are_for_the_other_command() -> None:
    assert "are for `jdpo sft`" in refused([({"prompt": "The sky?", "completion": "It is blue."}, "x:1")])
    assert "jdpo sft" not in refused(SAMPLES)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"Instruction": "?", "good answer": "a", "bad answer": "b"}, ("Instruction", "good answer", "bad answer")),
        ({"query": "?", "no": "a", "winner": "b", "loser": "c"}, ("query", "winner", "loser")),
        ({"prompt": "?", "dispreferred": "b", "preferred": "a"}, ("prompt", "preferred", "dispreferred")),
        ({"post": "?", "answer0": "a", "answer1": "b"}, ("post", "answer0", "answer1")),
        (
            {"post": "?", "model_a": "first", "model_b": "second", "text_a": "a", "text_b": "b", "best_of": 2},
            ("post", "text_a", "text_b"),
        ),
        ({"id": 3}, ("<column of the prompt>", "<column of the better answer>", "<column of the worse answer>")),
    ],
)
def test_suggested_column_map(raw: dict[str, Any], expected: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="the columns fit no known format") as error:
        preference_rows(raw, "x:1")
    assert tuple(snippet(str(error.value)).values()) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"model_a": "m", "model_b": "n", "reply_a": "Yes.", "reply_b": "No.", "winner": "model_b"}, ("_a", "_b")),
        ({"reply1": "Yes.", "reply2": "No.", "the verdict": 2}, ("_1", "_2")),
        ({"text_0": "Yes.", "text_1": "No.", "better_text": 1}, ("_0", "_1")),
    ],
)
def test_the_snippet_of_two_answers_and_a_vote_reads_the_rows(raw: dict[str, Any], expected: tuple[str, str]) -> None:
    raw = {"ask": "Is it?", **raw}
    column_map = snippet(refused([(raw, "x:1")]))
    assert {name for name in column_map if name.startswith("response")} == {f"response{mark}" for mark in expected}
    if column_map["prompt"].startswith("<"):
        column_map["prompt"] = "ask"
    (row,) = preference_rows(raw, "x:1", Reading(column_map))
    assert row == PreferenceRow([user("Is it?")], [assistant("No.")], [assistant("Yes.")], "x:1")


def test_no_snippet_where_the_names_are_right_and_a_value_is_wrong() -> None:
    message = refused([({"prompt": "?", "chosen": "a", "rejected": 7}, "x:7")])
    assert "Found: prompt (string), chosen (string), rejected (number)" in message
    assert "column_map" not in message
    assert snippet(refused([({"request": "?", "solution": "a"}, "x:1")], supervised=True)) == {
        "prompt": "request",
        "completion": "solution",
    }


@pytest.mark.parametrize("sides", [("Yes.", "No."), (assistant("Yes."), assistant("No."))])
def test_sides_without_a_prompt_are_refused_with_advice(sides: tuple[Any, Any]) -> None:
    message = refused([({"chosen": sides[0], "rejected": sides[1], "topic": "x"}, "x:1")])
    assert "have no prompt: add a column with what both answer" in message.splitlines()[-1]
    assert snippet(message)["prompt"].startswith("<")


def test_first_rows_are_checked_and_named() -> None:
    good = {"prompt": "?", "chosen": "a", "rejected": "b"}
    chat = {"chosen": [user("?"), assistant("a")], "rejected": [user("?"), assistant("b")]}
    assert check_rows([(good, "x:1"), (good, "x:2"), (chat, "x:3")]) == "standard, implicit"
    assert check_rows([({"messages": [user("?"), assistant("a")]}, "x:1")], supervised=True) == "messages"
    message = refused([(good, "x:1"), (good | {"rejected": None}, "x:2"), (chat, "x:3")])
    assert message.startswith("x:2: the columns fit no known format.\nFound: prompt (string), ")
    assert "rejected (null or string or list of {role, content})" in message
    with pytest.raises(ValueError, match="the row: the columns fit no known format"):
        schema_name({"text": "?"})


def test_mixed_types_in_a_column_are_named_at_their_row() -> None:
    assert preference_rows({"prompt": "?", "chosen": "a", "rejected": "b"}, "x:1")
    with pytest.raises(
        ValueError, match=r"^x:7: the columns .*\nFound: prompt \(string\), chosen \(number\), rejected"
    ):
        preference_rows({"prompt": "?", "chosen": 42, "rejected": "b"}, "x:7")


RENAMED = {"q": "?", "good": "a", "bad": "b", "score of good": 3, "score of bad": 1}
NAMES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_a_column_map_renames() -> None:
    expected = PreferenceRow("?", "a", "b", "x:1")
    assert preference_rows(RENAMED, "x:1", Reading(NAMES)) == [expected]
    scores = NAMES | {"score_chosen": "score of good", "score_rejected": "score of bad"}
    assert preference_rows(RENAMED, "x:1", Reading(scores)) == [expected._replace(margin=2.0)]
    assert completion_rows(RENAMED, "x:1", Reading({"prompt": "q", "completion": "good"})) == [
        CompletionRow("?", "a", "x:1")
    ]
    partly = {"prompt": "?", "chosen": "a", "loser": "b", "score_chosen": 2, "score_rejected": 1}
    assert preference_rows(partly, "x:1", Reading({"rejected": "loser"})) == [expected._replace(margin=1.0)]
    assert schema_name(RENAMED, Reading(NAMES)) == "standard"


def test_a_column_map_comes_before_the_names_of_the_file() -> None:
    file = {
        "conversations": [{"from": "human", "value": "No"}],
        "messages": [user("No"), assistant("no")],
        "question": "?",
        "chosen": "b",
        "rejected": "a",
        "score_chosen": 5,
        "score_rejected": 1,
    }
    swapped = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    # The scores belong to the sides as the file names them, not to the columns that are mapped to sides.
    assert preference_rows(file, "x:1", Reading(swapped)) == [PreferenceRow("?", "a", "b", "x:1")]
    assert completion_rows(file, "x:1", Reading(swapped)) == [CompletionRow("?", "a", "x:1")]
    assert is_preference(file, Reading(swapped))
    assert not is_preference(file)
    assert not is_preference(file, Reading({"prompt": "nowhere"}))  # `completion_rows` names the row


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ({"promt": "q"}, r"^x:1: column_map names 'promt' for 'q', .*; did you mean .prompt.\? The names are messages"),
        ({"@": "q"}, r"^x:1: column_map names '@' for 'q', but jdpo reads no column of this name; The names"),
        (
            NAMES | {"rejected": "worse"},
            r"^x:1: column_map takes 'rejected' from 'worse', which the row lacks; it has q,",
        ),
        (NAMES | {"score_chosen": "bad"}, r"^x:1: bad \(score_chosen\) is 'b'; expected a number$"),
        (
            {"prompt": "q", "messages": "good"},
            r"(?s)^x:1: the columns.*Under column_map: bad .*, prompt \(string\), mes",
        ),
        (
            {"prompt": "q"},
            r"(?s)^x:1: the columns fit no known format.*\nFound: q .*\nUnder column_map: .*prompt \(str",
        ),
    ],
)
def test_a_column_map_that_fits_nothing_is_named(column_map: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_rows(RENAMED, "x:1", Reading(column_map))


def test_a_column_map_survives_the_config(tmp_path: Any) -> None:
    config = DPOConfig(
        model_name_or_path="m", output_dir="o", datasets=({"path": "d", "column_map": NAMES, "ranked": "all"},)
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(DPOConfig, tmp_path / "c.yaml") == config
    assert config.datasets == (DatasetConfig(path="d", column_map=NAMES, ranked="all"),)


LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("\n\nHuman: a\n\nAssistant:")
)
KEY = st.sampled_from(
    ["role", "content", "from", "value", "rank", "answer", "completion", "text", "pm_score", "tool_calls"]
)
ROLE = st.sampled_from(["user", "assistant", "gpt", "tool", "function_call", "x"])
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLE, "from": ROLE, "content": LEAF, "value": LEAF})
VALUE = st.recursive(
    LEAF | MESSAGE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=8,
)
COLUMN = st.sampled_from(CANONICAL)


def read(reader: Any, raw: dict[str, Any], reading: Reading) -> str:
    """Returns the message of a row that is refused, or "" for one that is read, which must give a row."""
    try:
        return "" if reader(raw, "x:1", reading) else "nothing was read"
    except ValueError as error:
        return str(error)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(COLUMN, VALUE, max_size=6), st.sampled_from([None, 0.5]), st.sampled_from(["all", "best_vs_random"])
)
def test_no_row_raises_anything_but_a_named_error(raw: dict[str, Any], min_margin: float | None, rule: Any) -> None:
    for reader in (preference_rows, completion_rows):
        message = read(reader, raw, Reading(None, rule, min_margin))
        assert not message or message.startswith("x:1: ")
        assert len(message.encode()) < 8000
