"""Conversations as values, and the files of rows that they are saved to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.schemas.formats import completion_rows, preference_rows
from jdpo.data.sources import open_source
from jdpo.generation.chat.conversation import Conversation, pair_of
from jdpo.generation.chat.row_file import append_rows

HELLO = Conversation(is_chat=True, system="Be brief.").answered("Hello", "Hi", "stop")
PLAIN = Conversation(is_chat=False).answered("Roses are", " red", "length")


def test_the_prompt_has_the_system_message_and_all_exchanges() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Why?"},
    ]
    assert HELLO.prompt_of("Why?") == turns
    assert HELLO.last_prompt == turns[:2]
    assert HELLO.undone().prompt_of("Why?") == [turns[0], turns[3]]


def test_plain_text_has_no_memory() -> None:
    assert PLAIN.prompt_of("Violets are") == "Violets are"
    assert PLAIN.last_prompt == "Roses are"
    assert PLAIN.row() == {"prompt": "Roses are", "completion": " red"}


def test_saved_rows_are_read_as_completions_and_pairs(tmp_path: Path) -> None:
    other = Conversation(is_chat=True, system="Be brief.").answered("Hello", "Good day to you", "stop")
    rows, pairs = tmp_path / "new" / "rows.jsonl", tmp_path / "pairs.jsonl"
    assert append_rows(rows, [HELLO.row()]) == 1
    assert append_rows(rows, [other.row(), HELLO.answered("Why?", "Because", "stop").row()]) == 3
    read = [completion_rows(raw, origin) for raw, origin in open_source(DatasetConfig(path=str(rows))).rows()]
    assert [len(row.prompt) for (row,) in read] == [2, 2, 4]  # type: ignore[union-attr]
    assert append_rows(pairs, [pair_of(HELLO, other)]) == 1
    ((pair,),) = [preference_rows(raw, origin) for raw, origin in open_source(DatasetConfig(path=str(pairs))).rows()]
    assert (pair.chosen, pair.rejected) == (  # type: ignore[union-attr]
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "assistant", "content": "Good day to you"}],
    )


def test_answers_to_other_prompts_and_equal_answers_are_no_pair() -> None:
    with pytest.raises(ValueError, match="different conversations"):
        pair_of(HELLO, Conversation(is_chat=True).answered("Hello", "Good day", "stop"))
    with pytest.raises(ValueError, match="are the same"):
        pair_of(HELLO, HELLO)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # The last line has no line feed, as some editors leave it.
    path.write_text('{"messages": []}\n{"messages": []}', encoding="utf-8")
    assert append_rows(path, [HELLO.row()]) == 3
    assert [list(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] == [["messages"]] * 3
    for content in ('{"prompt": "x"}\n', "notes\n", "[1]\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"rows\.jsonl:1 is no row with messages"):
            append_rows(path, [HELLO.row()])
        assert path.read_text(encoding="utf-8") == content
    with pytest.raises(ValueError, match="cannot write"):
        append_rows(tmp_path, [HELLO.row()])
