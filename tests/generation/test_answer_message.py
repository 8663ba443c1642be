"""Generated answers as messages: thoughts, channels and calls apart from the words, and learnt as they were drawn."""

from __future__ import annotations

import functools
import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jdpo
from jdpo.cli.main import main
from jdpo.data.tokens.boundaries import TokenSplit, split_rows
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.generation.asking.answer_message import message_of
from jdpo.generation.asking.channels import ChannelView, read_channels
from jdpo.generation.chat.chat_view import ChatView
from jdpo.generation.chat.session import ChatSession
from jdpo.generation.chat.speaker import Speaker
from jdpo.generation.values import Answer, Question, Sampling, message_text
from jdpo.json_files import read_json, write_json
from jdpo.pairing.candidates import Candidate
from jdpo.pairing.pair_files import pair_row
from jdpo.types import Message
from tests.conftest import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "tests" / "data" / "templates"
sys.path.insert(0, str(ROOT / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

ASK: list[Message] = [{"role": "user", "content": "Which river?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "Cork"}}}

PLAIN: Message = {"role": "assistant", "content": "The Lee."}
SPACED: Message = {"role": "assistant", "content": "The Lee\n\nof Cork."}
THOUGHTFUL: Message = {**PLAIN, "reasoning_content": "Cork has\n\none."}
CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
PLANNED: Message = {**CALLING, "reasoning_content": "I must look."}
_MARKER = re.compile(r"<[^<>\s'\"{}]*\w[^<>\s'\"{}]*>|\[/?[A-Z_]+\]")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Loads a byte-level tokenizer with a template of the tests, each once."""

    @functools.cache
    def of(name: str) -> Tokenizer:
        hf = train_tokenizer("byte_bos", ["Which river flows through Cork? The Lee."] * 3, 300)
        path = TEMPLATES / f"{name}.jinja"
        give_template(hf, path, list(dict.fromkeys(_MARKER.findall(path.read_text(encoding="utf-8")))))
        folder = tmp_path_factory.mktemp("tokenizer")
        hf.save_pretrained(folder)
        return load_tokenizer(folder, chat_template=None)

    return of


def learnt(row: RowTexts, answer: Message, tokenizer: Tokenizer) -> TokenSplit:
    (split,) = split_rows([row._replace(completions=([answer],))], tokenizer)
    assert isinstance(split, TokenSplit), split
    return split


def drawn(row: RowTexts, answer: Message, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that a model which has learnt an answer draws, without the one that ends it."""
    prompt = encode_prompt(row, tokenizer)
    split = learnt(row, answer, tokenizer)
    assert isinstance(prompt, list)
    sequence = split.prompt + split.completions[0]
    assert sequence[: len(prompt)] == prompt
    found = sequence[len(prompt) :]
    return found[: next(place for place, token in enumerate(found) if token in tokenizer.end_token_ids)]


def marked(*names: str) -> list[Any]:
    """Leaves one template of each kind in the default suite: a thought between markers, and channels."""
    return [
        name if name in ("qwen3_reasoning", "gpt_oss") else pytest.param(name, marks=pytest.mark.full) for name in names
    ]


THINKING = ("gpt_oss", "qwen3_reasoning", "cohere2_reasoning", "apertus", "seed_oss")
"""Templates that continue their prompt with a thought under a key of its own."""


@pytest.mark.parametrize("name", marked(*THINKING))
def test_a_drawn_answer_is_the_message_that_was_learnt(load: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer, row = load(name), RowTexts(ASK, (), "row")
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    for answer in (PLAIN, SPACED, THOUGHTFUL):
        assert message_of(row, prompt, drawn(row, answer, tokenizer), tokenizer, ended=True) == answer


@pytest.mark.parametrize("name", marked("cohere2", "smollm3", "qwen3_next", "mistral_small3", "gemma3"))
@pytest.mark.parametrize("answer", [PLAIN, SPACED], ids=["plain", "spaced"])
def test_what_a_template_writes_around_words_is_not_part_of_them(
    load: Callable[[str], Tokenizer], name: str, answer: Message
) -> None:
    tokenizer, row = load(name), RowTexts(ASK, (), "row")
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    assert message_of(row, prompt, drawn(row, answer, tokenizer), tokenizer, ended=True) == answer


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next_thinking"])
def test_a_thought_that_the_prompt_opens(load: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer, row = load(name), RowTexts(ASK, (), "row")
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    (tokens,) = tokenizer.encode(["Cork has one.\n</think>\n\nThe Lee."])
    answer = message_of(row, prompt, tokens, tokenizer, ended=True)
    assert answer == {**PLAIN, "reasoning_content": "Cork has one."}
    split = learnt(row, answer, tokenizer)
    assert (split.prompt + split.completions[0])[: len(prompt) + len(tokens)] == prompt + tokens
    # Cut off within its thought, it has no words yet; ended without the thought's end, it is all words.
    (started,) = tokenizer.encode(["Cork has"])
    cut = message_of(row, prompt, started, tokenizer, ended=False)
    assert cut == {"role": "assistant", "content": "", "reasoning_content": "Cork has"}
    assert message_of(row, prompt, started, tokenizer, ended=True) == {"role": "assistant", "content": "Cork has"}


@pytest.mark.full
def test_a_thought_that_only_the_prompt_opens_is_opened_in_the_content(load: Callable[[str], Tokenizer]) -> None:
    tokenizer, row = load("olmo3_think"), RowTexts(ASK, (), "row")
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    (tokens,) = tokenizer.encode(["Hm.</think>The Lee."])
    answer = message_of(row, prompt, tokens, tokenizer, ended=True)
    assert answer["content"] == "<think>Hm.</think>The Lee."
    split = learnt(row, answer, tokenizer)
    assert (split.prompt, split.completions[0][: len(tokens)]) == (prompt, tokens)


def test_a_call_in_channels_is_a_call_of_the_message(load: Callable[[str], Tokenizer]) -> None:
    tokenizer, row = load("gpt_oss"), RowTexts(ASK, (), "row", tools=[TOOL])
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    for answer in (CALLING, PLANNED):
        assert message_of(row, prompt, drawn(row, answer, tokenizer), tokenizer, ended=True) == answer


# --- channels

FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>Yes.", {"content": "Yes."}),
        (f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes.", {"content": "Yes.", "reasoning_content": "Hm."}),
        # Cut off: in the thought, in the next header, and in the words.
        ("<|channel|>analysis<|message|>Hm", {"content": "", "reasoning_content": "Hm"}),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assi", {"content": "", "reasoning_content": "Hm."}),
        (f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Ye", {"content": "Ye", "reasoning_content": "Hm."}),
        # The model may put the recipient after the channel, and say that the arguments are JSON.
        (
            "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.look "
            '<|constrain|>json<|message|>{"at": "Cork"}',
            {"content": "", "reasoning_content": "Look.", "tool_calls": [CALL]},
        ),
        # Commentary without a recipient is meant for the user.
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.look<|channel|>commentary "
            'json<|message|>{"at": "Cork"}',
            {"content": "I look.", "tool_calls": [CALL]},
        ),
    ],
)
def test_channels_are_read(text: str, expected: dict[str, Any]) -> None:
    assert read_channels(text) == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "<|channel|>analysis",
        "<|channel|>analysis to=python<|message|>print(1)",
        " to=functions.f<|message|>[1]",
    ],
)
def test_an_answer_that_has_no_channels_is_left_as_it_is(load: Callable[[str], Tokenizer], text: str) -> None:
    assert read_channels(text) is None
    tokenizer, row = load("gpt_oss"), RowTexts(ASK, (), "row")
    prompt = encode_prompt(row, tokenizer)
    assert isinstance(prompt, list)
    (tokens,) = tokenizer.encode([text])
    assert message_of(row, prompt, tokens, tokenizer, ended=True)["content"].strip() == text.strip()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes.", "[analysis] Hm.\n[final] Yes."),
        (
            '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}',
            '[commentary to functions.f] {"a": 1}',
        ),
        # Nothing that a model says is hidden.
        ("Yes.", "Yes."),
        ("<|channel|>final<|message|>Yes.<|start|>odd", "[final] Yes.<|start|>odd"),
    ],
)
def test_channels_are_shown_by_name_as_they_come(text: str, shown: str) -> None:
    view = ChannelView()
    pieces = [piece for piece in re.split(r"(<\|\w+\|>|\w+)", text) if piece]
    assert "".join([*map(view.push, pieces), view.finish()]) == shown


# --- what becomes of such messages


def test_a_pair_has_the_thoughts_and_calls_of_its_answers() -> None:
    thoughtful, calling = (
        Candidate(0, sample, message_text(message), 5, False, score, message)
        for sample, (message, score) in enumerate(((THOUGHTFUL, 1.0), (PLANNED, 0.0)))
    )
    row = pair_row(Question("id", ASK, "row"), (thoughtful, calling))
    assert (row["chosen"], row["rejected"]) == ([THOUGHTFUL], [PLANNED])
    # Thoughts are no part of the text that is compared and judged.
    assert thoughtful.text == Answer("id", 0, THOUGHTFUL, None, "stop", None).text == "The Lee."
    assert "look" in calling.text
    assert "I must" not in calling.text


@pytest.mark.full
def test_a_model_that_has_learnt_channels_is_asked_paired_and_trained_again(
    toy_model: Path, run_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """From rows to a run, its answers, and a run on pairs of them; calls end with a token of their own."""
    # With positions for the prompt of this format.
    base = tmp_path / "base"
    shutil.copytree(toy_model, base)
    write_json(base / "config.json", {**read_json(base / "config.json"), "max_position_embeddings": 1024})
    questions = [[{"role": "user", "content": text}] for text in ("winter river", "paper stone")]
    asked: list[dict[str, Any]] = [{"messages": [*questions[0], THOUGHTFUL]}]
    asked += [{"messages": [*questions[1], PLANNED], "tools": [TOOL]}]
    rows = write_jsonl(tmp_path / "rows.jsonl", asked * 8)
    run = tmp_path / "run"
    words = run_words(model_name_or_path=base, datasets=rows, max_length=512, learning_rate=5e-3, num_train_epochs=60)
    assert main(["sft", *words, f"chat_template={TEMPLATES / 'gpt_oss.jinja'}"]) == 0
    model = jdpo.load(run)
    ends = read_json(run / "model" / "generation_config.json")["eos_token_id"]
    assert {"<|return|>", "<|call|>"} <= set(model.tokenizer.hf.convert_ids_to_tokens(ends))
    (answer,) = model.generate(questions[0], temperature=0, max_new_tokens=100)
    (call,) = model.generate(questions[1], temperature=0, max_new_tokens=100, tools=[TOOL])
    assert (answer.message, answer.finish_reason) == (THOUGHTFUL, "stop")
    assert (call.message, call.finish_reason) == (PLANNED, "stop")
    # In a conversation the channels have names, and the next prompt has no markers in its words.
    out = io.StringIO()
    session = ChatSession(
        [Speaker(model)], ChatView(Console(file=out), ["one"]), Sampling(temperature=0, max_new_tokens=60)
    )
    session.take("winter river")
    assert "[analysis] Cork has\n\none.\n[final] The Lee.\n" in out.getvalue()
    session.take("winter river")
    assert session.conversations[0].last_prompt[1] == THOUGHTFUL
    assert len(session.conversations[0].exchanges) == 2
    # A pair of such answers is a row of a run.
    pair = pair_row(
        Question("id", questions[1], "row", tools=[TOOL]),
        (
            Candidate(0, 0, message_text(call.message), 9, False, 1.0, call.message),
            Candidate(0, 1, message_text(answer.message), 9, False, 0.0, answer.message),
        ),
    )
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair] * 8)
    again = {"model_name_or_path": run / "model", "datasets": pairs, "output_dir": tmp_path / "again"}
    assert main(["dpo", *run_words(**again, max_length=512, max_steps=1)]) == 0
