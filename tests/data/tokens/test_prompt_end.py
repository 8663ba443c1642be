"""Templates that write a prompt differently once an answer follows: nothing of a prompt is learnt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared import token_checks
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens import prompt_end
from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_completion, tokenize_pair

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

CHATML = ("<|im_start|>", "<|im_end|>")
THINKS = (*CHATML, "<think>", "</think>")
BRIEF: Message = {"role": "system", "content": "Answer in one word."}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> Message:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Loads a byte-level tokenizer with a template of the tests, or with this text as its template."""

    def of(template: str, *markers: str, end: str | None = None) -> Tokenizer:
        hf = train_tokenizer("byte_bos", ["Which river flows through Cork? The Lee."] * 3, 300)
        path = TEMPLATES / f"{template}.jinja"
        if "{" in template:
            path = tmp_path / "own.jinja"
            path.write_text(template, encoding="utf-8")
        give_template(hf, path, markers)
        if end is not None:
            hf.eos_token = end
        hf.save_pretrained(tmp_path / "tokenizer")
        return load_tokenizer(tmp_path / "tokenizer", chat_template=None)

    return of


def read(
    tokenizer: Tokenizer, prompt: list[Message], chosen: Message, rejected: Message
) -> tuple[object, ...] | Dropped:
    """Returns what is trained on as text: the prompt, both sides, and the notes."""
    result = tokenize_pair(PreferenceRow(prompt, [chosen], [rejected], "x:1"), tokenizer, max_length=9999)
    if isinstance(result, Dropped):
        return result
    assert isinstance(result, KeptPair)
    return (*(tokenizer.hf.decode(ids) for ids in result.row[:3]), result.notes)


def learnt(tokenizer: Tokenizer, prompt: list[Message], answer: Message) -> tuple[str, str]:
    """Returns all text of a supervised row, and the learnt part."""
    result = tokenize_completion(CompletionRow(prompt, [answer], "x:1"), tokenizer, max_length=9999)
    assert isinstance(result, KeptCompletion), result
    tokens, mask = result.row.tokens, result.row.completion_mask
    return tokenizer.hf.decode(tokens), tokenizer.hf.decode(tokens[mask])


TURNS = [user("Is the Lee a river?"), assistant("It is."), user("Where is it?")]


@pytest.mark.parametrize("history", [TURNS, TURNS[2:]], ids=["three turns", "one turn"])
def test_a_system_turn_that_is_written_only_at_the_end(load: Callable[..., Tokenizer], history: list[Message]) -> None:
    tokenizer = load("system_last", "[INST]", "[/INST]")
    prompt = [BRIEF, *history]
    asked = tokenizer.render(prompt, add_generation_prompt=True)
    assert asked.endswith("[INST]Answer in one word.\n\nWhere is it?[/INST]")
    eos = tokenizer.hf.eos_token
    assert read(tokenizer, prompt, assistant("Cork."), assistant("Paris.")) == (
        *(asked, f" Cork.{eos}", f" Paris.{eos}"),
        (prompt_end.PROMPT_REBUILT,),
    )
    assert learnt(tokenizer, prompt, assistant("Cork.")) == (f"{asked} Cork.{eos}", f" Cork.{eos}")
    # Without a system turn nothing is changed, and nothing noted.
    plain = read(tokenizer, history, assistant("Cork."), assistant("Paris."))
    assert plain == (tokenizer.render(history), f" Cork.{eos}", f" Paris.{eos}", ())


def test_an_answer_that_repeats_the_question_is_kept_whole(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("system_last", "[INST]", "[/INST]")
    eos = tokenizer.hf.eos_token
    sides = (assistant("Where is it? In Cork."), assistant("Where"))
    result = read(tokenizer, [BRIEF, user("Where is it?")], *sides)
    assert not isinstance(result, Dropped)
    assert result[1:3] == (f" Where is it? In Cork.{eos}", f" Where{eos}")


def test_a_last_assistant_turn_that_is_written_differently(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("last_turn_thought", *THINKS)
    prompt = [user("Where is it?"), assistant("It is in")]
    asked = tokenizer.render(prompt, add_generation_prompt=True)
    assert asked.endswith("<think>\n\n</think>\n\nIt is in<|im_end|>\n<|im_start|>assistant\n")
    empty = "<think>\n\n</think>\n\n"
    assert read(tokenizer, prompt, assistant("Cork."), assistant("It is in Paris.")) == (
        *(asked, f"{empty}Cork.<|im_end|>\n", f"{empty}It is in Paris.<|im_end|>\n"),
        (prompt_end.PROMPT_REBUILT,),
    )


def test_an_answer_never_follows_a_thought_that_it_does_not_close(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("system_last_thought", *THINKS)
    dropped = Dropped(prompt_end.REWRITTEN, "x:1")
    prompt = [BRIEF, user("Where is it?")]
    assert read(tokenizer, prompt, assistant("Cork."), assistant("Paris.")) == dropped
    closed = assistant("<think>\nA city.\n</think>\nCork.")
    assert read(tokenizer, prompt, closed, assistant("Paris.")) == dropped  # one side is enough
    # Without a system turn only the opened thought is lost; an answer with a thought keeps it.
    shortened = read(tokenizer, prompt[1:], closed, assistant("Paris."))
    assert not isinstance(shortened, Dropped)
    assert shortened[0] == tokenizer.render(prompt[1:], add_generation_prompt=True).removesuffix("<think>\n")
    assert shortened[1:3] == (f"{closed['content']}<|im_end|>\n", "Paris.<|im_end|>\n")
    assert prompt_end.PROMPT_SHORTENED in shortened[3]


@pytest.mark.parametrize(
    "template",
    [
        # This template writes the answer before its question.
        "{% for m in messages | reverse %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        # No part of the generation prompt precedes the rendered answer.
        "{% if messages[-1].role == 'user' %}Q: {{ messages[-1].content }} A:{% else %}{{ messages[-2].content + "
        "' = ' + messages[-1].content + eos_token }}{% endif %}",
    ],
    ids=["reversed", "no header"],
)
def test_a_row_that_cannot_be_rebuilt_is_dropped_by_name(load: Callable[..., Tokenizer], template: str) -> None:
    tokenizer = load(template)
    result = read(tokenizer, [user("Where is it?")], assistant("Cork."), assistant("Paris."))
    assert result == Dropped(prompt_end.REWRITTEN, "x:1")


@pytest.mark.parametrize(
    ("header", "lead"),
    [
        ("bot:\n<think>\n", "bot:\n<think>\n"),  # the template never closes the thought
        ("bot:\n", "bot: "),  # C would begin with the header that P ends with
    ],
)
def test_what_a_generation_prompt_opens_is_neither_left_open_nor_written_twice(
    load: Callable[..., Tokenizer], header: str, lead: str
) -> None:
    tokenizer = load(
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'now: ' if loop.last }}{{ m.content + '\n' }}"
        f"{{% else %}}{{{{ {lead!r} + m.content + eos_token }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    )
    result = read(tokenizer, [user("Where is it?")], assistant("Cork."), assistant("Paris."))
    assert result == Dropped(prompt_end.REWRITTEN, "x:1")


def test_the_header_of_a_next_answer_is_cut(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("header_always", *CHATML, end="<|im_end|>")
    prompt = [user("Is it?"), assistant("Yes."), user("Where?")]
    asked = tokenizer.render(prompt)
    assert asked.endswith("<|im_start|>assistant\n")
    answer = "a assistant\n"  # occurs in the header
    assert read(tokenizer, prompt, assistant(answer), assistant("Cork.")) == (
        *(asked, f"{answer}<|im_end|>\n", "Cork.<|im_end|>\n"),
        (),
    )
    assert learnt(tokenizer, prompt, assistant("Cork."))[1] == "Cork.<|im_end|>\n"
    assert token_checks.expected_of(tokenizer).closing == len(tokenizer.encode(["<|im_end|>\n"])[0])


def test_what_ends_an_answer_is_no_header(load: Callable[..., Tokenizer]) -> None:
    markers = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = load("phi3", *markers)
    eos = tokenizer.hf.eos_token
    found = read(tokenizer, [user("Where?")], assistant("Cork."), assistant("Paris."))
    assert not isinstance(found, Dropped)
    assert found[1] == f"Cork.<|end|>\n{eos}"


def test_words_of_the_prompt_that_merge_with_the_answer_are_a_fault(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    found = read(tokenizer, [user("Which riv")], assistant("er flows"), assistant("al flows"))
    assert not isinstance(found, Dropped)
    assert found[0] == "Which"
    assert prompt_end.STARTS_IN_PROMPT in found[3]
    apart = read(tokenizer, [user("Which river?")], assistant("The Lee."), assistant("No."))
    assert not isinstance(apart, Dropped)
    assert prompt_end.STARTS_IN_PROMPT not in apart[3]


def test_a_run_says_once_that_its_context_differs_from_inference(
    load: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": "No."}\n' * 3)
    data = [DatasetConfig(path=str(rows))]
    for template, markers, differs in (
        ("system_last_thought", THINKS, True),
        ("system_last", ("[INST]", "[/INST]"), False),
    ):
        prepared = prepare_pairs(data, load(template, *markers), max_length=99, cache_dir=tmp_path / template)
        lines = [line for line in prepared.summary().splitlines() if "differs from the one at inference" in line]
        assert [line.split("note: ")[1][:11] for line in lines] == (["3 of 3 rows"] if differs else [])
