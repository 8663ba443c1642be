from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.schemas.formats import preference_rows
from jdpo.generation.prompts import make_question, read_prompts
from tests.conftest import write_jsonl

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "The sky?"}
BLUE = {"role": "assistant", "content": "That is blue."}
GREEN = {"role": "assistant", "content": "The sky is green."}
AGAIN = {"role": "user", "content": "Sure?"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def asked(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    return read_prompts(DatasetConfig(path=str(write_jsonl(tmp_path / "p.jsonl", rows))), **options)


@pytest.mark.parametrize(
    ("raw", "prompt", "columns"),
    [
        pytest.param({"prompt": "The sky is", "answer": "blue"}, "The sky is", {"answer": "blue"}, id="text"),
        pytest.param({"prompt": [SYSTEM, ASK], "question": "x"}, [SYSTEM, ASK], {"question": "x"}, id="messages"),
        pytest.param({"prompt": json.dumps([ASK])}, [ASK], None, id="messages-in-a-cell"),
        pytest.param({"prompt": "The sky?", "system": "Be brief."}, [SYSTEM, ASK], None, id="text-with-system"),
        pytest.param({"messages": [ASK, BLUE]}, [ASK], None, id="answered-conversation"),
        pytest.param({"messages": [ASK, BLUE, AGAIN]}, [ASK, BLUE, AGAIN], None, id="open-conversation"),
        pytest.param({"messages": [ASK], "system": "Be brief."}, [SYSTEM, ASK], None, id="system-column"),
        pytest.param({"conversations": [{"from": "human", "value": "The sky?"}]}, [ASK], None, id="sharegpt"),
        pytest.param({"question": "The sky?", "answer": "blue"}, [ASK], {"answer": "blue"}, id="question"),
        pytest.param({"instruction": "The sky?", "input": ""}, [ASK], None, id="instruction"),
        pytest.param(
            {"prompt": [ASK], "chosen": [BLUE], "rejected": [BLUE], "score_chosen": None},
            [ASK],
            {"chosen": [BLUE], "rejected": [BLUE]},
            id="pair-of-equal-sides",
        ),
        pytest.param(
            {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            [ASK],
            {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            id="implied",
        ),
        pytest.param(
            {"prompt": "The sky is", "completion": "blue", "label": False},
            "The sky is",
            {"completion": "blue", "label": False},
            id="unwanted-completion",
        ),
        pytest.param(
            {"prompt": "The sky?", "response_a": "blue", "response_b": "red", "winner": "tie"},
            "The sky?",
            {"response_a": "blue", "response_b": "red", "winner": "tie"},
            id="tied-vote",
        ),
    ],
)
def test_every_schema_gives_its_prompt(tmp_path: Path, raw: Any, prompt: Any, columns: Any) -> None:
    (question,) = asked(tmp_path, raw).questions
    assert (question.prompt, question.columns) == (prompt, columns)


def test_tools_and_variables_are_kept_and_part_of_the_id(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK]}, {"prompt": [ASK], "tools": [TOOL]}, {"prompt": [ASK], "chat_template_kwargs": {"a": 1}}]
    found = asked(tmp_path, *rows).questions
    assert [(one.tools, one.template_kwargs) for one in found] == [(None, None), ([TOOL], None), (None, {"a": 1})]
    assert len({one.prompt_id for one in found}) == 3
    assert found[0].prompt_id == make_question([ASK], "elsewhere").prompt_id == "8c2f0ccd8818d9ae"


def test_repeated_and_unusable_prompts_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "One", "answer": 1},
        {"prompt": "Two"},
        {"prompt": "One", "answer": 1},
        {"prompt": "One", "answer": 2},
        {"prompt": " "},
        {"messages": [SYSTEM]},
        {"prompt": "half \ud83d"},
        {"chosen": [ASK, BLUE], "rejected": [AGAIN, GREEN]},
    ]
    found = asked(tmp_path, *rows)
    assert [one.prompt for one in found.questions] == ["One", "Two"]
    assert (found.num_rows, found.duplicates, found.other_columns) == (8, 2, 1)
    assert found.dropped == {
        "no turn to answer": 1,
        "no assistant turn at the end": 1,
        "text that is not Unicode": 1,
        "histories differ": 1,
    }
    assert found.examples["histories differ"].endswith("p.jsonl:8")
    assert any("2 rows repeated a prompt" in line for line in found.lines())
    with pytest.raises(ValueError, match="no row gives a question"):
        asked(tmp_path, {"prompt": ""})


def test_rows_whose_prompt_is_null_are_counted(tmp_path: Path) -> None:
    nulls: list[dict[str, Any]] = [
        {"prompt": None, "answer": 1},
        {"messages": None},
        # Another column of a table may hold the prompt.
        {"prompt": None, "question": "Two"},
        {"prompt": None, "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        {"prompt": "One"},
        {"question": None},
    ]
    found = asked(tmp_path, *nulls)
    assert [one.prompt for one in found.questions] == [[{"role": "user", "content": "Two"}], [ASK], "One"]
    assert found.dropped == {"the prompt is null": 3}
    path = write_jsonl(tmp_path / "mapped.jsonl", [{"q": None}, {"q": "One"}])
    assert read_prompts(DatasetConfig(path=str(path), column_map={"prompt": "q"})).dropped == {"the prompt is null": 1}
    with pytest.raises(ValueError, match="2: the columns fit no known format"):
        asked(tmp_path, {"prompt": None}, {"query": "One"})


def test_an_unknown_role_is_an_error_as_in_training(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "critic", "content": "Hm."}]}
    with pytest.raises(ValueError, match=r"p.jsonl:2: prompt\[0\] has the role 'critic'"):
        asked(tmp_path, {"prompt": "One"}, row)
    with pytest.raises(ValueError, match=r"x:1: prompt\[0\] has the role 'critic'"):
        preference_rows({**row, "chosen": "a", "rejected": "b"}, "x:1")


def test_options_of_reading(tmp_path: Path) -> None:
    rows = [{"prompt": "One"}, {"prompt": [SYSTEM, ASK]}, {"prompt": "Three"}]
    user = {"role": "user", "content": "One"}
    assert len(asked(tmp_path, *rows, num_prompts=2).questions) == 2
    assert asked(tmp_path, *rows, chat=True).questions[0].prompt == [user]
    framed = asked(tmp_path, *rows, system="Rhyme.").questions
    assert [one.prompt[0]["content"] for one in framed] == ["Rhyme.", "Be brief.", "Rhyme."]
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"ask": str(i), "x": i}).encode() + b"\n" for i in range(9))))
    chosen = read_prompts(DatasetConfig(path=str(path), split="train[3:5]", column_map={"prompt": "ask"}))
    assert [(one.prompt, one.columns) for one in chosen.questions] == [("3", {"x": 3}), ("4", {"x": 4})]


def test_unknown_columns_are_refused_with_a_column_map_to_paste(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fit no known format(.|\n)*column_map:\n    prompt: query\Z"):
        asked(tmp_path, {"query": "One", "label": 3})
