"""Files of facts: questions in every form that prompts have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jdpo.comparison.figures.fact_figures import completion_rows, facts_digest, read_facts
from jdpo.data.tokens.tokenizer import load_tokenizer
from tests.conftest import write_jsonl

USER = {"role": "user", "content": "the river"}
SYSTEM = {"role": "system", "content": "slow"}
ANSWER = [{"role": "assistant", "content": "paper"}]


def prompts_and_answers(path: Path, toy_model: Path, rows: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    facts = read_facts(str(write_jsonl(path, rows)))
    return [
        (row.prompt, row.completion) for row in completion_rows(facts, load_tokenizer(toy_model, chat_template=None))
    ]


def test_a_question_is_text_or_messages(toy_model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "the river", "answer": "paper", "country": "Ireland"},
        {"question": [USER], "answer": "paper"},
        {"prompt": [USER], "answer": "paper"},
        {"messages": [USER], "answer": "paper"},
        {"prompt": [SYSTEM, USER], "answer": "paper"},
        {"system": "slow", "question": "the river", "answer": "paper"},
        {"prompt": "the river", "answer": " paper"},
    ]
    found = prompts_and_answers(tmp_path / "facts.jsonl", toy_model, rows)
    assert found[:4] == [([USER], ANSWER)] * 4
    assert found[4:6] == [([SYSTEM, USER], ANSWER)] * 2
    assert found[6] == ("the river", " paper")


def test_the_form_of_a_question_does_not_change_the_digest(tmp_path: Path) -> None:
    digests = {
        facts_digest(read_facts(str(write_jsonl(tmp_path / f"{number}.jsonl", [{**asked, "answer": "paper"}]))))
        for number, asked in enumerate(({"question": "the river"}, {"prompt": [USER]}, {"question": [USER]}))
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "the river"}, "found question"),
        ({"question": "the river", "answer": " "}, "expected a fact"),
        ({"prompt": [SYSTEM], "answer": "paper"}, "no turn to answer"),
        ({"answer": "paper"}, "fit no known format"),
    ],
)
def test_a_row_that_is_no_fact_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "facts.jsonl", [{"question": "a", "answer": "b"}, row])
    with pytest.raises(ValueError, match=rf"facts.jsonl:2.*{message}"):
        read_facts(str(path))
