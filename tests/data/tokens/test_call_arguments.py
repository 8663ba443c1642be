"""Arguments of tool calls, as objects and as JSON text, under templates that write one, the other or neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jdpo.data.prepared.held_out import prompt_key
from jdpo.data.schemas.formats import Dropped, completion_rows, preference_rows
from jdpo.data.schemas.messages import assistant, user
from jdpo.data.tokens import boundaries, call_arguments, row_rendering
from jdpo.data.tokens.boundaries import RowTexts, TokenSplit, split_rows
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.data.tokens.turns import split_turns
from jdpo.types import CompletionRow, PreferenceRow
from tests.data.conftest import save_byte_level

ASK = user("Weather in Cork?")

AS_JSON = "{{ f.name }} {{ f.arguments | tojson }}"
AS_ASCII_JSON = "{{ f.name }} {{ f.arguments | tojson(ensure_ascii=True) }}"
WHOLE_CALL = "{{ f | tojson }}"
AS_TEXT = '{{ f.name + " " + f.arguments }}'
PRINTED = "{{ f.name }} {{ f.arguments }}"
PRINTED_IN_JSON = "{{ f.name }} {{ f.arguments | string | tojson }}"
EITHER = "{{ f.name }} {% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
TAGS = "{{ f.name }}{% for key, value in f.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}"
KEYS = "{{ f.name }}{% for key in f.arguments %}<{{ key }}>{% endfor %}"
NAME = "{{ f.name }}"


@pytest.fixture(scope="module")
def with_calls(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Makes a tokenizer whose chat template writes each call `f` with the given expression."""
    made: dict[str, Tokenizer] = {}

    def make(call: str) -> Tokenizer:
        if call not in made:
            folder: Path = save_byte_level(tmp_path_factory.mktemp("calls"), ["The sky is blue."] * 5)
            template = (
                "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
                "{% for call in m.tool_calls or [] %}{% set f = call.function %}[" + call + "]{% endfor %}"
                "{{ '|' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
            )
            (folder / "calls.jinja").write_text(template, encoding="utf-8")
            made[call] = load_tokenizer(folder, chat_template=str(folder / "calls.jinja"))
        return made[call]

    return make


def call(arguments: Any, name: str = "look") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def split(tokenizer: Tokenizer, *completions: Any, prompt: Any = (ASK,)) -> TokenSplit | Dropped:
    (result,) = split_rows([RowTexts(list(prompt), tuple([turn] for turn in completions), "x:1")], tokenizer)
    return result


def learnt(tokenizer: Tokenizer, arguments: Any) -> str:
    """Returns the learnt text of a call."""
    result = split(tokenizer, call(arguments), assistant("No idea."))
    assert isinstance(result, TokenSplit), result
    return tokenizer.hf.decode(result.completions[0])


CORK = {"city": "Cork"}
RICH = {"place": 'Cork\'s "centre" <łódź>\n', "days": 5, "share": 0.5, "hourly": True, "at": {"units": ["C", None]}}


@pytest.mark.parametrize("template", [AS_JSON, AS_ASCII_JSON, WHOLE_CALL, TAGS, EITHER])
@pytest.mark.parametrize("arguments", [CORK, RICH, {}, {"n": 12345678901234567890}], ids=str)
def test_text_of_an_object_is_learnt_as_the_object(
    with_calls: Callable[[str], Tokenizer], template: str, arguments: dict[str, Any]
) -> None:
    tokenizer = with_calls(template)
    for text in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=2)):
        assert learnt(tokenizer, text) == learnt(tokenizer, arguments)
    if template == AS_JSON:
        assert learnt(tokenizer, json.dumps(CORK)) == '[look {"city": "Cork"}]|'


@pytest.mark.parametrize("template", [AS_TEXT, PRINTED])
def test_a_template_that_wants_text_gets_compact_json_text(
    with_calls: Callable[[str], Tokenizer], template: str
) -> None:
    tokenizer = with_calls(template)
    assert learnt(tokenizer, '{ "city":  "Cork" }') == '[look {"city":"Cork"}]|'
    assert learnt(tokenizer, json.dumps(RICH)) == (
        '[look {"place":"Cork\'s \\"centre\\" <łódź>\\n","days":5,"share":0.5,"hourly":true,'
        '"at":{"units":["C",null]}}]|'
    )
    assert learnt(tokenizer, "{}") == "[look {}]|"


def test_an_object_on_which_the_template_fails_is_written_as_text(with_calls: Callable[[str], Tokenizer]) -> None:
    assert learnt(with_calls(AS_TEXT), CORK) == '[look {"city":"Cork"}]|'


def test_objects_of_the_file_stay_objects_where_the_template_does_not_fail(
    with_calls: Callable[[str], Tokenizer],
) -> None:
    assert learnt(with_calls(PRINTED), CORK) == "[look {'city': 'Cork'}]|"


@pytest.mark.parametrize("text", ["look at the sky", '["Cork"]', '"Cork"', "", '{"a": 1', '{"a": NaN}', '{"a": 1e999}'])
def test_text_that_holds_no_object_stays_text(with_calls: Callable[[str], Tokenizer], text: str) -> None:
    assert learnt(with_calls(AS_JSON), text) == f"[look {json.dumps(text)}]|"


@pytest.mark.parametrize("template", [KEYS, NAME, PRINTED_IN_JSON.replace("string", "upper")])
def test_a_row_whose_values_are_written_in_neither_form_is_dropped_by_name(
    with_calls: Callable[[str], Tokenizer], template: str
) -> None:
    # The question holds the value too, but that does not count as writing the call.
    result = split(with_calls(template), call('{"city": "Cork"}'), assistant("No idea."))
    assert result == Dropped(call_arguments.UNWRITTEN, "x:1", """look: '{"city":"Cork"}'""")


def test_the_repr_is_seen_within_json_and_next_to_one_that_a_message_quotes(
    with_calls: Callable[[str], Tokenizer],
) -> None:
    spoken = {"say": 'the "sky"', "to": "Ann"}  # plain: as it is
    result = split(with_calls(PRINTED_IN_JSON), call(json.dumps(spoken)), assistant("No idea."))
    assert isinstance(result, Dropped)
    quoting = user("Why do you write {'city': 'Cork'}?")
    result = split(with_calls(AS_JSON), call('{"city": "Cork"}'), assistant("So."), prompt=[quoting])
    assert isinstance(result, TokenSplit)


def test_a_call_has_one_form_in_every_rendering_of_the_row(with_calls: Callable[[str], Tokenizer]) -> None:
    seen = {"role": "tool", "content": "rain"}
    prompt = [ASK, call('{"city": "Cork"}'), seen]
    result = split(with_calls(PRINTED), call('{"day": 2}'), assistant("Rain."), prompt=prompt)
    assert isinstance(result, TokenSplit)
    decode = with_calls(PRINTED).hf.decode
    assert '[look {"city":"Cork"}]' in decode(result.prompt)
    assert decode(result.completions[0]) == '[look {"day":2}]|'


def test_each_call_is_decided_separately(with_calls: Callable[[str], Tokenizer]) -> None:
    template = "{{ f.name }} {% if f.name == 'raw' %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    turn = call('{"a": 1}')
    turn["tool_calls"] += call('{"a": 1}', "raw")["tool_calls"] + call("not JSON", "raw")["tool_calls"]
    result = split(with_calls(template), turn, assistant("No."))
    assert isinstance(result, TokenSplit)
    assert with_calls(template).hf.decode(result.completions[0]) == '[look {"a": 1}][raw {"a":1}][raw not JSON]|'


def test_a_template_that_refuses_both_forms_says_why(with_calls: Callable[[str], Tokenizer]) -> None:
    result = split(with_calls("{{ raise_exception('no calls, please') }}"), call('{"a": 1}'), assistant("No."))
    assert result == Dropped(row_rendering.REFUSED, "x:1", "no calls, please")


def test_every_turn_is_learnt_in_the_form_that_is_written(with_calls: Callable[[str], Tokenizer]) -> None:
    turns = [ASK, call('{"city": "Cork"}'), {"role": "tool", "content": "rain"}]
    row = CompletionRow(turns, [assistant("It rains.")], "x:1")
    tokenizer = with_calls(AS_JSON)
    (sequences,) = split_turns([row], tokenizer)
    assert not isinstance(sequences, Dropped)
    (result,) = sequences
    taken = [token for token, counts in zip(result.tokens, result.mask, strict=True) if counts]
    assert tokenizer.hf.decode(taken) == '[look {"city": "Cork"}]|It rains.|'


def test_a_turn_that_is_shown_only_stays_so(with_calls: Callable[[str], Tokenizer]) -> None:
    (row,) = completion_rows(
        {"messages": [ASK, {**call('{"city": "Cork"}'), "weight": 0}, user("So?"), assistant("It rains.")]}, "x:1"
    )
    assert isinstance(row, CompletionRow)
    tokenizer = with_calls(AS_JSON)
    (sequences,) = split_turns([row], tokenizer)
    assert not isinstance(sequences, Dropped)
    (result,) = sequences
    taken = [token for token, counts in zip(result.tokens, result.mask, strict=True) if counts]
    assert tokenizer.hf.decode(taken) == "It rains.|"
    assert '[look {"city": "Cork"}]' in tokenizer.hf.decode(result.tokens)


def test_sides_that_differ_only_in_form_are_identical(with_calls: Callable[[str], Tokenizer]) -> None:
    result = split(with_calls(AS_JSON), call('{"city": "Cork"}'), call(CORK))
    assert result == Dropped(boundaries.IDENTICAL_SIDES, "x:1")


def test_histories_and_prompts_are_compared_by_what_the_arguments_say() -> None:
    seen = {"role": "tool", "content": "rain"}
    sides = {"chosen": [ASK, call(CORK), seen, assistant("Rain.")]}
    sides["rejected"] = [ASK, call('{"city":"Cork"}'), seen, assistant("Sun.")]
    (row,) = preference_rows(sides, "x:1")
    assert isinstance(row, PreferenceRow)
    assert prompt_key(row.prompt) == prompt_key([ASK, call('{"city":  "Cork"}'), seen])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@pytest.mark.parametrize("template", [AS_JSON, AS_ASCII_JSON, WHOLE_CALL, EITHER, AS_TEXT, PRINTED])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.dictionaries(st.text(), VALUES, max_size=4))
@example(arguments={"a": "{}", "b": "{", "c": "}"})
@example(arguments={"a": "'", "b": '"', "c": "<&>", "d": "True", "e": [True, "true", None, "None"]})
def test_what_is_learnt_is_json_of_the_arguments(
    with_calls: Callable[[str], Tokenizer], template: str, arguments: dict[str, Any]
) -> None:
    text = learnt(with_calls(template), json.dumps(arguments))
    learnt_value = json.loads(text[text.index("{") : text.rindex("]")])
    assert (learnt_value["arguments"] if template == WHOLE_CALL else learnt_value) == arguments


def test_large_and_deep_arguments_are_read(with_calls: Callable[[str], Tokenizer]) -> None:
    many = {f"key {number}": number for number in range(20_000)}
    assert learnt(with_calls(AS_JSON), json.dumps(many)).startswith('[look {"key 0": 0, ')
    deep = "{" * 5000
    assert learnt(with_calls(AS_JSON), deep) == f'[look "{deep}"]|'
