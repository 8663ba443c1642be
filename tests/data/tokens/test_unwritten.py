"""Content of an answer that the chat template does not write is counted, and an empty answer is never learnt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens import boundaries, unwritten
from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_completion, tokenize_pair

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS_AS_TAGS = CHATML.replace(
    "(m.content or '')",
    "(m.content or '') }}{% for c in m.tool_calls or [] %}{{ '<call ' + c.function.name + '>' }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{{ ''",
)
LAST_TURN_THOUGHT = (TEMPLATES / "last_turn_thought.jinja").read_text(encoding="utf-8")
QWEN2_5 = (TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
NOTE = unwritten.UNWRITTEN


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find_river", "arguments": arguments}}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """Loads a byte-level tokenizer with this template."""

    def of(template: str) -> Tokenizer:
        hf = train_tokenizer("byte", ["Which river flows through Cork? The Lee."] * 3, 300)
        path = tmp_path / "own.jinja"
        path.write_text(template, encoding="utf-8")
        give_template(hf, path, ("<|im_start|>", "<|im_end|>"))
        hf.save_pretrained(tmp_path / "tokenizer")
        return load_tokenizer(tmp_path / "tokenizer", chat_template=None)

    return of


PROMPT = [user("Which river?")]


def notes_of(tokenizer: Tokenizer, chosen: Message, rejected: Message, prompt: list[Message] = PROMPT) -> set[str]:
    """Returns the notes on unwritten content of a pair that is kept."""
    result = tokenize_pair(PreferenceRow(prompt, [chosen], [rejected], "x:1"), tokenizer, max_length=9999)
    assert isinstance(result, KeptPair), result
    return set(result.notes) & set(NOTE.values())


def dropped(tokenizer: Tokenizer, chosen: Message, rejected: Message) -> Dropped:
    result = tokenize_pair(PreferenceRow(PROMPT, [chosen], [rejected], "x:1"), tokenizer, max_length=9999)
    assert isinstance(result, Dropped), result
    return result


@pytest.mark.parametrize("key", unwritten.REASONING_KEYS)
def test_reasoning_under_a_key_that_the_template_does_not_read(load: Callable[[str], Tokenizer], key: str) -> None:
    tokenizer = load(CHATML)
    thinking = assistant("The Lee.", **{key: "Cork has one."})
    assert notes_of(tokenizer, thinking, assistant("None.")) == {NOTE[key]}
    assert notes_of(tokenizer, assistant("None."), thinking) == {NOTE[key]}
    assert notes_of(tokenizer, assistant("The Lee.", **{key: " \n"}), assistant("None.")) == set()
    other = assistant("The Lee.", **{key: "I guess."})
    assert dropped(tokenizer, thinking, other) == Dropped(unwritten.IDENTICAL_UNWRITTEN, "x:1", key)
    parts = assistant("The Lee.", **{key: [{"type": "thinking", "thinking": "Cork has one."}]})
    assert notes_of(tokenizer, parts, assistant("None.")) == {NOTE[key]}


def test_reasoning_that_the_template_writes(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load(LAST_TURN_THOUGHT)
    thinking = assistant("The Lee.", reasoning_content="Cork has one.\n")
    assert notes_of(tokenizer, thinking, assistant("None.")) == set()
    assert notes_of(tokenizer, thinking, assistant("The Lee.", reasoning_content="I guess.")) == set()
    # The thoughts of earlier turns are left out on purpose.
    earlier = [*PROMPT, thinking, user("Sure?")]
    assert notes_of(tokenizer, assistant("Yes."), assistant("No."), earlier) == set()
    both = assistant("The Lee.", reasoning_content="Cork has one.", tool_plan="Look it up.")
    assert notes_of(tokenizer, both, assistant("None.")) == {NOTE["tool_plan"]}


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_answer_is_not_learnt_instead_of_a_call(load: Callable[[str], Tokenizer], content: str | None) -> None:
    tokenizer = load(CHATML)
    calls = assistant(content, tool_calls=[call(city="Cork")])
    empty = Dropped(unwritten.EMPTY_UNWRITTEN, "x:1", unwritten.TOOL_CALLS)
    assert dropped(tokenizer, calls, assistant("None.")) == empty
    assert dropped(tokenizer, assistant("None."), calls) == empty
    assert dropped(tokenizer, calls, assistant(content, tool_calls=[call(city="Paris")])) == empty
    supervised = CompletionRow(PROMPT, [calls], "x:1")
    assert tokenize_completion(supervised, tokenizer, max_length=9999) == empty


def test_calls_next_to_words(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load(CHATML)
    calls = assistant("I look.", tool_calls=[call(city="Cork")])
    assert notes_of(tokenizer, calls, assistant("None.")) == {NOTE[unwritten.TOOL_CALLS]}
    kept = tokenize_completion(CompletionRow(PROMPT, [calls], "x:1"), tokenizer, max_length=9999)
    assert isinstance(kept, KeptCompletion)
    assert NOTE[unwritten.TOOL_CALLS] in kept.notes
    same = assistant("I look.", tool_calls=[call(city="Paris")])
    assert dropped(tokenizer, calls, same) == Dropped(unwritten.IDENTICAL_UNWRITTEN, "x:1", unwritten.TOOL_CALLS)
    # Sides that differ in nothing that a model could write are identical under any template.
    again = assistant("I look.", tool_calls=[{**call(city="Cork"), "id": "call_2"}])
    assert dropped(tokenizer, calls, again) == Dropped(boundaries.IDENTICAL_SIDES, "x:1")
    assert dropped(tokenizer, assistant("Yes."), assistant("Yes.", name="Ann")).reason == boundaries.IDENTICAL_SIDES


@pytest.mark.parametrize("template", [QWEN2_5, CALLS_AS_TAGS], ids=["json", "tags"])
def test_calls_that_the_template_writes(load: Callable[[str], Tokenizer], template: str) -> None:
    tokenizer = load(template)
    calls = [call(city="São Paulo", near=[1, 2.5], deep={"wet": True, "why": None}), call()]
    if template == CALLS_AS_TAGS:
        calls[0] = call(city="a < b & 'c'", width=5, wet=False)
    assert notes_of(tokenizer, assistant("", tool_calls=calls), assistant("None.")) == set()
    assert notes_of(tokenizer, assistant(None, tool_calls=calls), assistant("I look.", tool_calls=calls)) == set()


def test_a_template_that_writes_only_the_name_of_a_call(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load(CALLS_AS_TAGS.replace("{{ k }}={{ v }};", ""))
    calls = assistant("", tool_calls=[call(city="Cork")])
    assert notes_of(tokenizer, calls, assistant("None.")) == {NOTE[unwritten.TOOL_CALLS]}
    assert dropped(tokenizer, calls, assistant("", tool_calls=[call(city="Paris")])) == Dropped(
        unwritten.IDENTICAL_UNWRITTEN, "x:1", unwritten.TOOL_CALLS
    )


def test_a_thought_in_the_content_that_the_template_takes_away(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load(CHATML.replace("(m.content or '')", "m.content.split('</think>')[-1]"))
    one, other = (assistant(f"<think>{thought}</think>The Lee.") for thought in ("Cork.", "Hm."))
    assert dropped(tokenizer, one, other).reason == unwritten.IDENTICAL_UNWRITTEN
    assert dropped(tokenizer, assistant("<think>Cork.</think>"), other).reason == unwritten.EMPTY_UNWRITTEN
