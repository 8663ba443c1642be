"""gpt-oss' conversations (harmony): channels, a developer turn, tools as TypeScript, and three ends of a message."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.data.prepared import token_checks
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens import prompt_end, row_notes, row_rendering
from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_pair

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

_MARKER = re.compile(r"<[^<>\s'\"{}]*\w[^<>\s'\"{}]*>|\[/?[A-Z_]+\]")
SYSTEM_END = "Channel must be included for every message.<|end|>"
THOUGHT = "<|channel|>analysis<|message|>Cork has one.<|end|><|start|>assistant"
ASKED = "<|start|>user<|message|>Which river?<|end|><|start|>assistant"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a map.",
        "parameters": {
            "type": "object",
            "properties": {
                "at": {"type": "string", "description": "A place."},
                "scales": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["km", "mile"], "default": "km"},
            },
            "required": ["at"],
        },
    },
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> Message:
    return {"role": "assistant", "content": content, **more}


ASK = [user("Which river?")]
CALL = assistant(None, tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"at": "Cork"}}}])
RESULT = {"role": "tool", "content": '{"river": "Lee"}'}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Loads a byte-level tokenizer with a template of the tests; each kind once."""

    @functools.cache
    def of(name: str, end: str | None = None, **kwargs: Any) -> Tokenizer:
        hf = train_tokenizer("byte_bos", ["Which river flows through Cork? The Lee."] * 3, 300)
        path = TEMPLATES / f"{name}.jinja"
        give_template(hf, path, list(dict.fromkeys(_MARKER.findall(path.read_text(encoding="utf-8")))))
        if end is not None:
            hf.eos_token = end
        folder = tmp_path_factory.mktemp("tokenizer")
        hf.save_pretrained(folder)
        return load_tokenizer(folder, chat_template=None, chat_template_kwargs=kwargs or None)

    return of


@pytest.fixture(scope="module")
def harmony(load: Callable[..., Tokenizer]) -> Tokenizer:
    return load("gpt_oss", end="<|return|>")


def read(
    tokenizer: Tokenizer, prompt: list[Message], chosen: Message, rejected: Message, **more: Any
) -> tuple[str, str, str, tuple[str, ...]]:
    """Returns what is trained on as text: the prompt, both sides, and the notes."""
    result = tokenize_pair(PreferenceRow(prompt, [chosen], [rejected], "x:1", **more), tokenizer, max_length=9999)
    assert isinstance(result, KeptPair), result
    texts = [tokenizer.hf.decode(ids) for ids in result.row[:3]]
    return texts[0], texts[1], texts[2], result.notes


def end_tokens(tokenizer: Tokenizer) -> list[str]:
    return [str(tokenizer.hf.convert_ids_to_tokens(token)) for token in tokenizer.end_token_ids]


def test_an_answer_starts_with_its_channel_and_ends_the_conversation(harmony: Tokenizer) -> None:
    thoughtful = assistant("The Lee.", reasoning_content="Cork has one.")
    prompt, chosen, rejected, notes = read(harmony, ASK, thoughtful, assistant("None."))
    assert prompt.endswith(SYSTEM_END + ASKED)
    assert chosen == f"{THOUGHT}<|channel|>final<|message|>The Lee.<|return|>"
    assert rejected == "<|channel|>final<|message|>None.<|return|>"
    assert notes == ()
    # `thinking` is the name of the format itself.
    renamed = assistant("The Lee.", thinking="Cork has one.")
    assert read(harmony, ASK, renamed, assistant("None."))[:3] == (prompt, chosen, rejected)


def test_a_call_ends_with_a_token_of_its_own(harmony: Tokenizer) -> None:
    planned = {**CALL, "reasoning_content": "A map."}
    _, chosen, rejected, notes = read(harmony, ASK, planned, CALL, tools=[TOOL])
    call = ' to=functions.look<|channel|>commentary json<|message|>{"at": "Cork"}<|call|>'
    assert (rejected, notes) == (call, ())
    assert chosen == f"<|channel|>analysis<|message|>A map.<|end|><|start|>assistant{call}"
    assert end_tokens(harmony) == ["<|return|>", "<|call|>"]
    # Both are whole answers: neither lacks its end, and the end of a thought is none.
    expected = token_checks.expected_of(harmony)
    assert (expected.ends, expected.closing) == (harmony.end_token_ids, 1)


def test_system_and_developer_turns_and_tools_are_one_developer_turn(harmony: Tokenizer) -> None:
    prompt, _, _, notes = read(
        harmony, [{"role": "system", "content": "Be brief."}, *ASK], CALL, assistant("None."), tools=[TOOL]
    )
    developer = prompt.partition("<|start|>developer<|message|>")[2].partition("<|end|>")[0]
    assert developer == (
        "# Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// Looks at a map.\n"
        "type look = (_: {\n// A place.\nat: string,\nscales?: number[],\n"
        'unit?: "km" | "mile", // default: "km"\n}) => any;\n\n} // namespace functions'
    )
    assert "functions" in prompt.partition("Calls to these tools")[2].partition("<|end|>")[0]
    assert notes == ()


def test_a_thought_before_a_call_stays_in_the_prompt_until_an_answer_follows(harmony: Tokenizer) -> None:
    history = [*ASK, {**CALL, "reasoning_content": "A map."}, RESULT]
    asked = harmony.render(history, tools=[TOOL], add_generation_prompt=True)
    assert "A map." in asked
    # The conversation as a whole drops the thought; at inference the model sees it, and so it does in training.
    assert "A map." not in harmony.render([*history, assistant("The Lee.")], tools=[TOOL])
    prompt, chosen, rejected, notes = read(harmony, history, assistant("The Lee."), CALL, tools=[TOOL])
    assert prompt == asked
    assert chosen == "<|channel|>final<|message|>The Lee.<|return|>"
    assert rejected.endswith('{"at": "Cork"}<|call|>')
    assert prompt_end.PROMPT_REBUILT in notes


def test_earlier_answers_end_as_messages_and_are_learnt_as_answers(harmony: Tokenizer) -> None:
    history = [*ASK, assistant("The Lee.", reasoning_content="Cork has one."), user("Sure?")]
    prompt, chosen, _, notes = read(harmony, history, assistant("Yes."), assistant("No."))
    assert "<|channel|>final<|message|>The Lee.<|end|><|start|>user" in prompt
    assert "Cork has one." not in prompt
    assert (chosen, notes) == ("<|channel|>final<|message|>Yes.<|return|>", ())
    (found,) = tokenize_turns([CompletionRow(history, [assistant("Yes.")], "x:1")], harmony, max_length=9999)
    learnt = []
    for one in found:
        assert isinstance(one, KeptCompletion)
        learnt.append(harmony.hf.decode(one.row.tokens[one.row.completion_mask]))
    # Two sequences, since the first answer ends in another way once a question follows.
    assert learnt == [
        f"{THOUGHT}<|channel|>final<|message|>The Lee.<|return|>",
        "<|channel|>final<|message|>Yes.<|return|>",
    ]


def test_a_prompt_that_ends_with_an_answer_is_continued(harmony: Tokenizer) -> None:
    prompt, chosen, _, notes = read(harmony, [*ASK, assistant("It is")], assistant("the Lee."), assistant("none."))
    assert prompt.endswith("<|channel|>final<|message|>It is<|end|><|start|>assistant")
    assert (chosen, notes) == ("<|channel|>final<|message|>the Lee.<|return|>", ())


def test_rows_that_the_template_refuses_are_dropped_by_name(harmony: Tokenizer) -> None:
    spelled = assistant("<|channel|>final<|message|>The Lee.")
    row = PreferenceRow(ASK, [spelled], [assistant("None.")], "x:1")
    result = tokenize_pair(row, harmony, max_length=9999)
    assert isinstance(result, Dropped)
    assert (result.reason, "channel tags" in result.detail) == (row_rendering.REFUSED, True)
    # A second system turn is left out by the template, which is counted.
    twice = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, *ASK]
    assert read(harmony, twice, assistant("The Lee."), assistant("None."))[3] == (row_notes.TURN_CHANGED,)


def test_the_effort_is_a_variable_of_the_template(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("gpt_oss", reasoning_effort="high")
    prompt, *_ = read(tokenizer, ASK, assistant("The Lee."), assistant("None."))
    assert "Reasoning: high\n" in prompt
    low, *_ = read(
        tokenizer, ASK, assistant("The Lee."), assistant("None."), template_kwargs={"reasoning_effort": "low"}
    )
    assert "Reasoning: low\n" in low


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        # What closes the response is no end of turn.
        ("cohere2", ["<|end_of_text|>", "<|END_OF_TURN_TOKEN|>"]),
        # The results of a call continue the same turn.
        pytest.param("apertus", ["<|end_of_text|>", "<|assistant_end|>", "<|tools_suffix|>"], marks=pytest.mark.full),
        pytest.param("qwen3_5", ["<|end_of_text|>", "<|im_end|>"], marks=pytest.mark.full),
        pytest.param("olmo3", ["<|end_of_text|>"], marks=pytest.mark.full),
        pytest.param("seed_oss", ["<|end_of_text|>", "<seed:eos>"], marks=pytest.mark.full),
        pytest.param("mistral_small3", ["<|end_of_text|>"], marks=pytest.mark.full),
        pytest.param("ministral3", ["<|end_of_text|>"], marks=pytest.mark.full),
        pytest.param("gemma3", ["<|end_of_text|>", "<end_of_turn>"], marks=pytest.mark.full),
        pytest.param("smollm3", ["<|end_of_text|>", "<|im_end|>"], marks=pytest.mark.full),
        pytest.param("phi4_mini_instruct", ["<|end_of_text|>", "<|end|>"], marks=pytest.mark.full),
        pytest.param("ernie4_5", ["<|end_of_text|>", "<|end_of_sentence|>"], marks=pytest.mark.full),
    ],
)
def test_the_tokens_that_end_a_turn_or_a_call(load: Callable[..., Tokenizer], name: str, ends: list[str]) -> None:
    assert end_tokens(load(name)) == ends


@pytest.mark.full
def test_a_budget_of_zero_opens_a_thought_that_no_answer_has(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("seed_oss", thinking_budget=0)
    prompt, chosen, _, notes = read(tokenizer, ASK, assistant("The Lee."), assistant("None."))
    asked = tokenizer.render(ASK, add_generation_prompt=True, kwargs={"thinking_budget": 0})
    assert asked.endswith("<seed:think><seed:cot_budget_reflect>")
    assert prompt == asked.removesuffix("<seed:think><seed:cot_budget_reflect>")
    assert chosen == "The Lee.<seed:eos>"
    assert notes == (prompt_end.PROMPT_SHORTENED,)
