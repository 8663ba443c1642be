"""docs/data.md shows one row per schema, and each is read as the schema that it is shown for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jdpo.data.schemas.formats import Reading, completion_rows, detect, preference_rows, schema_name
from jdpo.data.schemas.prompt_rows import PromptRow, prompt_row
from jdpo.data.schemas.schema_table import COMPLETION_SCHEMAS, PREFERENCE_SCHEMAS, PROMPT_SCHEMAS, UNANSWERED_SCHEMAS
from jdpo.types import CompletionRow, PreferenceRow

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
ROW = re.compile(r"^`([\w-]+)`(?::.*)?\n\n```\{code-block\} json\n((?:.+\n)+)```$", re.MULTILINE)
SHOWN: dict[str, dict[str, Any]] = {
    name: json.loads(row) for name, row in ROW.findall(PAGE.read_text(encoding="utf-8"))
}
PAIRS = [schema.name for schema in PREFERENCE_SCHEMAS]
SUPERVISED = [schema.name for schema in COMPLETION_SCHEMAS if schema not in PREFERENCE_SCHEMAS]
PROMPTS = [schema.name for schema in UNANSWERED_SCHEMAS]


def test_every_schema_has_a_row() -> None:
    assert list(SHOWN) == PAIRS + SUPERVISED + PROMPTS


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_as_its_schema(name: str) -> None:
    assert schema_name(SHOWN[name]) == name
    (row,) = preference_rows(SHOWN[name], "row")
    assert isinstance(row, PreferenceRow)
    assert "Ireland" in str(row.prompt)
    assert ("Dublin" in str(row.chosen), "Cork" in str(row.rejected)) == (True, True)


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_row_is_read_as_its_schema(name: str) -> None:
    assert schema_name(SHOWN[name], supervised=True) == name
    (row,) = completion_rows(SHOWN[name], "row")
    assert isinstance(row, CompletionRow)
    assert "Dublin" in str(row.completion)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_read_as_its_schema(name: str) -> None:
    assert detect(SHOWN[name], PROMPT_SCHEMAS, Reading(), "row")[1].name == name
    row = prompt_row(SHOWN[name], "row")
    assert isinstance(row, PromptRow)
    assert "Ireland" in str(row.prompt)
