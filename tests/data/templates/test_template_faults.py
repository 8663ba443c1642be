"""Templates that surprise a user: every affected row is counted and reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared import token_checks
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import EMPTY_SIDE, Dropped
from jdpo.data.tokens import boundaries, prompt_end, row_notes, row_rendering
from jdpo.data.tokens.boundaries import RowTexts, TokenSplit, split_rows
from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_completion, tokenize_pair

TEMPLATES = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
DEEPSEEK_MARKERS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def pair(prompt: list[Message], chosen: str, rejected: str) -> PreferenceRow:
    return PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)], "x:1")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Loads a byte-level tokenizer with this template."""

    def of(template: str, *markers: str, kind: str = "byte_bos", **specials: Any) -> Tokenizer:
        hf = train_tokenizer(kind, ["What is the capital of France? It is Paris."] * 3, 300)
        hf.add_special_tokens(specials)
        path = TEMPLATES / template
        if not template.endswith(".jinja"):
            path = tmp_path / "own.jinja"
            path.write_text(template, encoding="utf-8")
        give_template(hf, path, markers)
        hf.save_pretrained(tmp_path / "tokenizer")
        return load_tokenizer(tmp_path / "tokenizer", chat_template=None)

    return of


def read(tokenizer: Tokenizer, result: KeptPair | Dropped) -> tuple[str, str, str, tuple[str, ...]]:
    assert isinstance(result, KeptPair), result
    prompt, chosen, rejected = (tokenizer.hf.decode(ids) for ids in result.row[:3])
    return prompt, chosen, rejected, result.notes


def test_a_template_that_ends_no_turn(load: Callable[..., Tokenizer], tmp_path: Path) -> None:
    tokenizer = load(BARE)
    assert any("it is not learnt where to stop" in note for note in tokenizer.notes)
    prompt, chosen, _, notes = read(
        tokenizer, tokenize_pair(pair([user("Hi")], "Yes.", "No."), tokenizer, max_length=99)
    )
    # It has no generation prompt either, so that the header is learnt, which is noted.
    assert (prompt, chosen) == ("user: Hi\n", "assistant: Yes.\n")
    assert any("'assistant: ' after the generation prompt" in note for note in tokenizer.notes)
    assert notes == ()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": "No."}\n' * 3)
    prepared = prepare_pairs([DatasetConfig(path=str(rows))], tokenizer, max_length=99, cache_dir=tmp_path / "cache")
    assert prepared.counts[token_checks.NO_END] == 3


def test_a_thought_that_the_template_writes_is_noted_as_learnt(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("qwen3.jinja", "<|im_start|>", "<|im_end|>")
    assert [note for note in tokenizer.notes if "every answer is learnt with it" in note] == [
        "the chat template writes '<think>\\n\\n</think>\\n\\n' after the generation prompt: every answer is learnt "
        "with it"
    ]
    thinking = "<think>\nFrance has one.\n</think>\n\nParis."
    history = [user("Capital?"), assistant(thinking), user("Sure?")]
    prompt, chosen, rejected, notes = read(
        tokenizer, tokenize_pair(pair(history, thinking, "No."), tokenizer, max_length=999)
    )
    assert "France has one" not in prompt  # an earlier thought is removed, which is counted
    assert notes == (row_notes.TURN_CHANGED,)
    assert (chosen, rejected) == (thinking + "<|im_end|>\n", "<think>\n\n</think>\n\nNo.<|im_end|>\n")


def test_a_generation_prompt_longer_than_the_common_prefix_is_cut_and_counted(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("deepseek.jinja", *DEEPSEEK_MARKERS)
    history = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Sure?")]
    prompt, chosen, rejected, notes = read(
        tokenizer, tokenize_pair(pair(history, "Yes.", "No."), tokenizer, max_length=99)
    )
    bos, eos = tokenizer.hf.bos_token, tokenizer.hf.eos_token
    assert prompt == f"{bos}Be kind.<｜User｜>Hi<｜Assistant｜>Hello{eos}<｜User｜>Sure?<｜Assistant｜>"
    assert (chosen, rejected) == (f"Yes.{eos}", f"No.{eos}")
    assert notes == (prompt_end.PROMPT_SHORTENED,)
    thinking = pair(history, "<think>\nHm.\n</think>Yes.", "No.")
    _, chosen, _, notes = read(tokenizer, tokenize_pair(thinking, tokenizer, max_length=99))
    assert chosen == f"Yes.{eos}"
    assert set(notes) == {prompt_end.PROMPT_SHORTENED, row_notes.ANSWER_CHANGED, row_notes.SPELLS_SPECIAL}


def test_spaces_that_the_template_trims_are_counted(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("llama3.jinja", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    trimmed = tokenize_pair(pair([user(" Hi ")], " Yes.\n", "No."), tokenizer, max_length=99)
    assert read(tokenizer, trimmed)[1:] == ("Yes.<|eot_id|>", "No.<|eot_id|>", (row_notes.ANSWER_CHANGED,))
    whole = tokenize_pair(pair([user(" Hi ")], "Yes.", "No."), tokenizer, max_length=99)
    assert read(tokenizer, whole)[1:] == ("Yes.<|eot_id|>", "No.<|eot_id|>", ())
    # Sides that differ in spaces alone are the same once rendered.
    same = tokenize_pair(pair([user("Hi")], "Yes.\n", "Yes."), tokenizer, max_length=99)
    assert same == Dropped(boundaries.IDENTICAL_SIDES, "x:1")


def test_a_turn_that_the_template_leaves_out_is_counted(load: Callable[..., Tokenizer]) -> None:
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% endfor %}"
    tokenizer = load(deaf)
    history = [{"role": "system", "content": "Be kind."}, user("Hi")]
    assert read(tokenizer, tokenize_pair(pair(history, "Yes.", "No."), tokenizer, max_length=99))[-1] == (
        row_notes.TURN_CHANGED,
    )
    assert read(tokenizer, tokenize_pair(pair(history[1:], "Yes.", "No."), tokenizer, max_length=99))[-1] == ()


def test_a_template_that_moves_the_system_turn(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("mistral_v3.jinja", "[INST]", "[/INST]")
    history = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Sure?")]
    row = CompletionRow(history, [assistant("Yes.")], "x:1")
    (found,) = tokenize_turns([row], tokenizer, max_length=99)
    kept = tokenize_completion(row, tokenizer, max_length=99)
    learnt = []
    for one in (*found, kept):
        assert isinstance(one, KeptCompletion)
        learnt.append(tokenizer.hf.decode(one.row.tokens[one.row.completion_mask]))
    assert learnt == [words + str(tokenizer.hf.eos_token) for words in ("Hello", "Yes.", "Yes.")]


def test_a_marker_that_takes_the_spaces_after_it(load: Callable[..., Tokenizer], tmp_path: Path) -> None:
    # As Phi 3's do: "<|assistant|>\n Yes" loses "\n " when it is tokenized.
    markers = ("<|user|>", "<|assistant|>", "<|end|>")
    load("phi3.jinja", *markers)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] in markers
    path.write_text(json.dumps(state), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", chat_template=None)
    prompt, chosen, rejected, notes = read(
        tokenizer, tokenize_pair(pair([user("Hi")], "\n Yes.", "No."), tokenizer, max_length=99)
    )
    assert (prompt, notes) == ("<|user|>Hi<|end|><|assistant|>", ())
    assert (chosen, rejected) == (f"Yes.<|end|>{tokenizer.hf.eos_token}", f"No.<|end|>{tokenizer.hf.eos_token}")


@pytest.mark.parametrize("kind", ["byte", "pad_is_eos"])
def test_bos_that_is_eos_and_pad(load: Callable[..., Tokenizer], kind: str) -> None:
    end = "<|endoftext|>"
    tokenizer = load("zephyr.jinja", kind=kind, bos_token=end, pad_token=end)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.hf.bos_token_id
    result = tokenize_pair(pair([user("Hi"), assistant("Yes"), user("Sure?")], "Yes.", "No."), tokenizer, max_length=99)
    _, chosen, rejected, notes = read(tokenizer, result)
    assert (chosen, rejected, notes) == (f"Yes.{end}\n", f"No.{end}\n", ())
    plain = tokenize_pair(PreferenceRow("Sky", " blue", f" green{end}", "x:2"), tokenizer, max_length=99)
    assert read(tokenizer, plain) == ("Sky", f" blue{end}", f" green{end}", (boundaries.PLAIN_TEXT,))


def test_plain_text_that_spells_bos_and_eos_has_each_once(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(BARE)
    bos, eos = tokenizer.hf.bos_token, tokenizer.hf.eos_token
    row = PreferenceRow(f"{bos}{bos}Sky", f"{bos} blue{eos}{eos}", f" green{eos}", "x:1")
    prompt, chosen, rejected, notes = read(tokenizer, tokenize_pair(row, tokenizer, max_length=99))
    assert (prompt, chosen, rejected) == (f"{bos}Sky", f" blue{eos}", f" green{eos}")
    assert row_notes.SPELLS_SPECIAL in notes
    once = PreferenceRow(f"{bos}Sky", " blue", f" green{eos}", "x:1")
    assert row_notes.SPELLS_SPECIAL not in read(tokenizer, tokenize_pair(once, tokenizer, max_length=99))[-1]
    inside = PreferenceRow("Sky", f" bl{bos}ue", " green", "x:1")
    assert row_notes.SPELLS_SPECIAL in read(tokenizer, tokenize_pair(inside, tokenizer, max_length=99))[-1]


def split(tokenizer: Tokenizer, *parts: RowTexts) -> list[TokenSplit | Dropped]:
    return split_rows(parts, tokenizer)


def test_tools_and_calls_reach_the_template(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("qwen2_5.jinja", "<|im_start|>", "<|im_end|>")
    answers = ([CALL], [assistant("It is sunny.")])
    with_tools, without = split(
        tokenizer, RowTexts([user("Paris?")], answers, "x:1", [WEATHER]), RowTexts([user("Paris?")], answers, "x:2")
    )
    assert isinstance(with_tools, TokenSplit)
    assert isinstance(without, TokenSplit)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in tokenizer.hf.decode(with_tools.prompt)
    assert "get_weather" not in tokenizer.hf.decode(without.prompt)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
    assert [tokenizer.hf.decode(ids) for ids in with_tools.completions] == [call, "It is sunny.<|im_end|>\n"]
    assert with_tools.notes == without.notes == ()


def test_every_turn_of_a_conversation_with_tools(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("qwen2_5.jinja", "<|im_start|>", "<|im_end|>")
    history = [user("Paris?"), CALL, {"role": "tool", "content": "18 degrees"}]
    row = CompletionRow(history, [assistant("Warm.")], "x:1", [WEATHER])
    ((result,),) = tokenize_turns([row], tokenizer, max_length=999)
    assert isinstance(result, KeptCompletion)
    assert json.dumps(WEATHER) in tokenizer.hf.decode(result.row.tokens)
    learnt = tokenizer.hf.decode(result.row.tokens[result.row.completion_mask])
    assert learnt.startswith("<tool_call>\n")
    assert learnt.endswith("</tool_call><|im_end|>\nWarm.<|im_end|>\n")
    assert "18 degrees" not in learnt
    assert result.notes == ()


def test_tools_that_the_template_does_not_know(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("phi4.jinja", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
    sides = ([assistant("Yes.")], [assistant("No.")])
    kept, called, empty, nothing = split(
        tokenizer,
        RowTexts([user("Paris?")], sides, "x:1", [WEATHER]),
        RowTexts([user("Paris?")], ([CALL], sides[1]), "x:2", [WEATHER]),
        RowTexts([user("Paris?")], ([assistant("")], sides[1]), "x:3", [WEATHER]),
        RowTexts([user("Paris?")], ([{"role": "assistant", "content": None, "tool_calls": []}], sides[1]), "x:4"),
    )
    assert isinstance(kept, TokenSplit)
    assert kept.notes == (row_notes.TOOLS_UNUSED,)
    assert isinstance(called, Dropped)
    assert called.reason == row_rendering.REFUSED  # content None, which this template cannot render
    assert (empty, nothing) == (Dropped(EMPTY_SIDE, "x:3"), Dropped(EMPTY_SIDE, "x:4"))


def test_half_a_surrogate_pair_in_a_call_or_a_tool(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("qwen2_5.jinja", "<|im_start|>", "<|im_end|>")
    broken = json.loads(json.dumps(CALL).replace("Paris", "\\ud83d"))
    named = json.loads(json.dumps(WEATHER).replace("city", "\\ud83d"))
    sides = ([assistant("Yes.")], [assistant("No.")])
    results = split(
        tokenizer,
        RowTexts([user("Paris?")], ([broken], sides[1]), "x:1", [WEATHER]),
        RowTexts([user("Paris?")], sides, "x:2", [named]),
    )
    assert results == [Dropped(row_rendering.NOT_UNICODE, f"x:{number}") for number in (1, 2)]
