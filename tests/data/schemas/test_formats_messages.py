"""Messages of any form: tools and calls, content in parts, roles."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jdpo.data.schemas.formats import (
    DEVELOPER,
    HISTORIES_DIFFER,
    NO_ASSISTANT_TURN,
    Dropped,
    completion_rows,
    preference_rows,
)
from jdpo.data.schemas.messages import assistant, user
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, PreferenceRow

ASK, BLUE, GREEN = user("The sky?"), assistant("It is blue."), assistant("It is green.")
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [LOOK]}
SEEN = {"role": "tool", "content": "blue"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def conversation(messages: Any, **columns: Any) -> CompletionRow | Dropped:
    (row,) = completion_rows({"messages": messages, **columns}, "x:1")
    return row


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [LOOK]},
        {"role": "assistant", "tool_calls": [LOOK]},
        {"role": "assistant", "tool_calls": json.dumps([LOOK])},
        {"role": "assistant", "tool_calls": [json.dumps(LOOK)]},
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "sky"}}]},
        {"role": "assistant", "tool_calls": [{**LOOK, "id": None}], "name": None},
        {"role": "assistant", "tool_calls": [{**LOOK, "function": {**LOOK["function"], "more": None}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": {"at": "sky"}}},
        {"from": "gpt", "value": None, "tool_calls": [LOOK]},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "function_call", "value": '[{"name": "look", "arguments": {"at": "sky"}}]'},
        {"role": "function_call", "content": json.dumps(LOOK)},
    ],
)
def test_every_way_of_writing_a_call_is_the_same_turn(turn: dict[str, Any]) -> None:
    for seen in (SEEN, {"from": "observation", "value": "blue"}, {"role": "function", "content": "blue"}):
        assert conversation([ASK, turn, seen, BLUE]) == CompletionRow([ASK, CALL, SEEN], [BLUE], "x:1")
    assert preference_rows({"prompt": [ASK, turn, SEEN], "chosen": [BLUE], "rejected": [GREEN]}, "x:1") == [
        PreferenceRow([ASK, CALL, SEEN], [BLUE], [GREEN], "x:1")
    ]
    assert preference_rows({"prompt": [ASK], "chosen": [BLUE], "rejected": [turn]}, "x:1") == [
        PreferenceRow([ASK], [BLUE], [CALL], "x:1")
    ]


def test_words_next_to_a_call_and_arguments_as_text_stay_as_they_are() -> None:
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert conversation([ASK, call, SEEN, BLUE]) == CompletionRow([ASK, call, SEEN], [BLUE], "x:1")
    plain = {**BLUE, "tool_calls": [], "function_call": None}
    assert conversation([ASK, plain]) == CompletionRow([ASK], [BLUE], "x:1")


def test_sides_with_the_same_call_share_it_as_prompt() -> None:
    sides = {"chosen": [CALL, SEEN, BLUE], "rejected": [CALL, SEEN, GREEN]}
    assert preference_rows({"prompt": [ASK], **sides}, "x:1") == [
        PreferenceRow([ASK, CALL, SEEN], [BLUE], [GREEN], "x:1")
    ]
    assert preference_rows({"prompt": [ASK], **sides, "rejected": [GREEN]}, "x:1") == [Dropped(HISTORIES_DIFFER, "x:1")]
    assert preference_rows({"prompt": [ASK], **sides, "rejected": [CALL, SEEN]}, "x:1") == [
        Dropped(f"{NO_ASSISTANT_TURN}: the last turn of rejected has the role tool", "x:1")
    ]


@pytest.mark.parametrize(
    ("columns", "side", "role"),
    [
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": [user("It is green.")]}, "rejected", "user"),
        ({"prompt": "The sky?", "chosen": user("It is blue."), "rejected": GREEN}, "chosen", "user"),
        ({"prompt": [ASK], "chosen": [BLUE, SEEN], "rejected": [GREEN]}, "chosen", "tool"),
        ({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN, ASK]}, "rejected", "user"),
        ({"messages": [ASK], "chosen": "It is blue.", "rejected": [user("It is green.")]}, "rejected", "user"),
        ({"question": "The sky?", "chosen": "It is blue.", "rejected": [ASK, user("Green.")]}, "rejected", "user"),
    ],
)
def test_a_side_of_another_role_is_dropped_with_its_side_and_role(
    columns: dict[str, Any], side: str, role: str
) -> None:
    reason = f"{NO_ASSISTANT_TURN}: the last turn of {side} has the role {role}"
    assert preference_rows(columns, "x:1") == [Dropped(reason, "x:1")]


def test_a_developer_turn_is_written_as_system_and_noted() -> None:
    brief = {"role": "developer", "content": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    row = PreferenceRow([system, ASK], [BLUE], [GREEN], "x:1", notes=(DEVELOPER,))
    assert preference_rows({"prompt": [brief, ASK], "chosen": [BLUE], "rejected": [GREEN]}, "x:1") == [row]
    assert conversation([brief, ASK, BLUE]) == CompletionRow([system, ASK], [BLUE], "x:1", notes=(DEVELOPER,))
    answers = [{"rank": rank, "completion": [turn]} for rank, turn in ((0, BLUE), (1, GREEN))]
    assert preference_rows({"context": [brief, ASK], "completions": answers}, "x:1") == [row]
    assert conversation([ASK, BLUE], meta={"role": "developer"}) == CompletionRow([ASK], [BLUE], "x:1")


def lists(*messages: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns messages as `datasets.Sequence` of a dict stores them."""
    keys = dict.fromkeys(key for message in messages for key in message)
    return {key: [message.get(key) for message in messages] for key in keys}


def test_messages_stored_as_lists_are_read_as_messages() -> None:
    turns = [ASK, CALL, SEEN, BLUE]
    assert conversation(lists(*turns)) == CompletionRow([ASK, CALL, SEEN], [BLUE], "x:1")
    said_by = {"from": ["human", "gpt"], "value": ["The sky?", "It is blue."], "weight": None}
    assert completion_rows({"conversations": said_by}, "x:1") == [CompletionRow([ASK], [BLUE], "x:1")]
    expected = [PreferenceRow([ASK], [BLUE], [GREEN], "x:1")]
    assert preference_rows({"prompt": lists(ASK), "chosen": lists(BLUE), "rejected": lists(GREEN)}, "x:1") == expected
    assert preference_rows({"chosen": lists(ASK, BLUE), "rejected": lists(ASK, GREEN)}, "x:1") == expected
    assert (
        preference_rows({"history": lists(ASK), "chosen": lists(BLUE), "rejected": "It is green."}, "x:1") == expected
    )
    ranked = {"rank": [1, 0], "completion": [lists(GREEN), [BLUE]]}
    assert preference_rows({"context": lists(ASK), "completions": ranked}, "x:1") == expected
    parts = {"role": "user", "content": {"type": ["text", "text"], "text": ["The ", "sky?"]}}
    assert conversation([parts, BLUE]) == CompletionRow([ASK], [BLUE], "x:1")


def test_calls_and_tools_stored_as_lists_are_read_as_such() -> None:
    called = {**CALL, "tool_calls": {"type": ["function"], "function": [LOOK["function"]]}}
    assert conversation([ASK, called, SEEN, BLUE]) == CompletionRow([ASK, CALL, SEEN], [BLUE], "x:1")
    row = conversation([ASK, BLUE], tools={"type": ["function"], "function": [TOOL["function"]]})
    assert isinstance(row, CompletionRow)
    assert row.tools == [TOOL]


def test_lists_of_different_lengths_are_named_and_other_columns_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"x:1: messages is an object of lists, .*role has 2, content has 1"):
        conversation({"role": ["user", "assistant"], "content": ["The sky?"]})
    assert conversation([ASK, BLUE], meta={"name": ["a", "b"], "of": ["c"]}) == CompletionRow([ASK], [BLUE], "x:1")


@pytest.mark.parametrize(
    "side", [LOOK, [LOOK], LOOK["function"], [LOOK["function"]], {"tool_calls": [LOOK]}, {"content": None, **CALL}]
)
def test_a_side_may_consist_of_calls(side: Any) -> None:
    row = PreferenceRow([ASK], [CALL], [GREEN], "x:1")
    assert preference_rows({"prompt": [ASK], "chosen": side, "rejected": GREEN}, "x:1") == [row]
    assert preference_rows({"messages": [ASK], "chosen": side, "rejected": [GREEN]}, "x:1") == [row]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        ([{**TOOL, "function": {**TOOL["function"], "strict": None}}], [TOOL]),
        ([], None),
        ("[]", None),
        (" ", None),
        (None, None),
    ],
)
def test_tools_are_carried(tools: Any, expected: Any) -> None:
    row = conversation([ASK, BLUE], tools=tools)
    assert isinstance(row, CompletionRow)
    assert row.tools == expected
    (pair,) = preference_rows({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN], "tools": tools}, "x:1")
    assert isinstance(pair, PreferenceRow)
    assert pair.tools == expected


def test_parts_of_text_are_joined() -> None:
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "sky?", "url": None}],
    }
    assert conversation([parts, BLUE]) == CompletionRow([ASK], [BLUE], "x:1")


def with_message(**message: Any) -> list[dict[str, Any]]:
    return [message, BLUE]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            with_message(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            r"x:1: the content of messages\[0\] is a list with a part of type 'image_url'; jdpo reads text only",
        ),
        (
            with_message(role="user", content=[{"type": "text", "text": None}]),
            r"a part of type 'text'; jdpo reads text only",
        ),
        (with_message(role="user", content=["Hi"]), r"a list with a part 'Hi'; jdpo reads text only"),
        (
            with_message(role="user", content=None, tool_calls=[LOOK]),
            r"x:1: the content of messages\[0\] is null; expected a str",
        ),
        (with_message(role="user", content=7), r"x:1: the content of messages\[0\] is number; expected a string"),
        (
            with_message(role="assistant", tool_calls=["look"]),
            r"x:1: messages\[0\]\.tool_calls\[0\] is a string that is not JSON",
        ),
        (
            with_message(role="assistant", tool_calls=[3]),
            r"x:1: messages\[0\]\.tool_calls\[0\] is number; expected an object",
        ),
        (
            with_message(role="assistant", tool_calls={"a": 1}),
            r"x:1: messages\[0\]\.tool_calls is object; expected a list",
        ),
        (
            with_message(**{"from": "function_call", "value": "look(sky)"}),
            r"x:1: messages\[0\]\.value is a string that is not JS",
        ),
        (
            with_message(**{"from": "function_call", "value": '{"tool": "look"}'}),
            r"expected a call \{name, arguments\}",
        ),
        (
            with_message(**{"from": "function_call", "value": None}),
            r"x:1: messages\[0\]\.value is null; expected a list",
        ),
        (
            with_message(role="narrator", content="Hm."),
            r"x:1: messages\[0\] has the role 'narrator'; known roles are system, ",
        ),
        (
            with_message(role="n" * 10_000, content="Hm."),
            r"x:1: messages\[0\] has the role 'n{1,80}\.\.\.n+'; known roles",
        ),
        (with_message(role="user", text="Hi"), r"x:1: messages\[0\] has the keys role, text; expected a message"),
        (with_message(role="user\ud800", content="Hi"), r"has the role 'user\\ud800'; known roles"),
    ],
)
def test_an_invalid_message_is_named(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        conversation(messages)
    assert str(error.value).encode().startswith(b"x:1: ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("look", r"^x:1: tools is a string that is not JSON \(.*\): 'look'$"),
        ('{"name": "look"}', r"^x:1: tools is object; expected a list of objects, or JSON text of one$"),
        ([3], r"^x:1: tools\[0\] is number; expected an object$"),
        (7, r"^x:1: tools is number; expected a list of objects"),
        ("[" * 100_000, r"^x:1: the row is nested too deeply$"),
    ],
)
def test_tools_of_another_kind_are_an_error(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation([ASK, BLUE], tools=tools)


def test_a_conversation_in_a_cell_is_read_and_other_text_is_left_alone() -> None:
    cell = json.dumps([ASK, BLUE])
    assert completion_rows({"messages": cell}, "x:1") == [CompletionRow([ASK], [BLUE], "x:1")]
    raw = {"prompt": "Write a chat.", "chosen": cell, "rejected": "No."}  # an answer that is JSON
    assert preference_rows(raw, "x:1") == [PreferenceRow("Write a chat.", cell, "No.", "x:1")]
    with pytest.raises(ValueError, match=r"^x:1: messages is a conversation written as text that is not JSON"):
        completion_rows({"messages": str([ASK, BLUE])}, "x:1")


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Saves a tokenizer whose template tests for tools and calls as published templates do."""
    from tests.data.conftest import save_byte_level

    folder = save_byte_level(tmp_path_factory.mktemp("calling"), ["The sky is blue."] * 5)
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.content is string %}{{ m.content }}{% endif %}"
        "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
        "{{ '|' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "t.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder, chat_template=str(folder / "t.jinja"))


def test_a_template_renders_the_calls_of_a_row(calling: Tokenizer) -> None:
    turns = [ASK, {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'}, SEEN, BLUE]
    row = conversation(turns)
    assert isinstance(row, CompletionRow)
    assert isinstance(row.prompt, list)
    assert calling.render([*row.prompt, *row.completion]) == (
        '<user>The sky?|<assistant>[look {"at": "sky"}]|<tool>blue|<assistant>It is blue.|'
    )
