"""Nulls that are values, and nulls that a file format writes for absent fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import preference_rows
from jdpo.data.sources import read_rows
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import PreferenceRow
from tests.data.conftest import save_byte_level

SCHEMA = {"type": "object", "properties": {"minutes": {"type": ["integer", "null"], "default": None}}}
TOOL = {"type": "function", "function": {"name": "set_timer", "parameters": SCHEMA}}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "set_timer", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ROW = {
    "tools": [TOOL],
    "prompt": [message("user", "Clear it.")],
    "chosen": [call({"minutes": None, "at": [None, {"zone": None}]})],
    "rejected": [call({"minutes": 5})],
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def read(path: Path, rows: list[dict[str, Any]]) -> list[PreferenceRow]:
    """Returns the rows as they are read from a file."""
    found = []
    for raw, origin in read_rows(DatasetConfig(path=str(written(path, rows)))):
        (row,) = preference_rows(raw, origin)
        assert isinstance(row, PreferenceRow), row
        found.append(row)
    return found


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_nulls_of_free_json_values_reach_the_row(tmp_path: Path, name: str) -> None:
    (row,) = read(tmp_path / name, [ROW])
    assert (row.tools, row.chosen, row.rejected) == (ROW["tools"], ROW["chosen"], ROW["rejected"])


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_nulls_of_arrow_are_absence(tmp_path: Path, name: str) -> None:
    # Arrow stores calls as one struct type, so every call has the fields of all calls.
    other = {**ROW, "chosen": [call({"minutes": 7, "label": "tea"})], "rejected": [message("assistant", "No.")]}
    first, second = read(tmp_path / name, [ROW, other])
    assert first.chosen == [call({"at": [None, {}]})]
    assert first.rejected == [call({"minutes": 5})]
    assert second.chosen == [call({"minutes": 7, "label": "tea"})]
    assert second.rejected == [message("assistant", "No.")]
    assert first.tools is not None
    assert first.tools[0]["function"]["parameters"]["properties"]["minutes"] == {"type": ["integer", "null"]}


def test_json_text_in_a_column_of_arrow_keeps_its_nulls(tmp_path: Path) -> None:
    texts = {name: json.dumps(ROW[name]) for name in ("tools", "prompt", "chosen", "rejected")}
    (row,) = read(tmp_path / "rows.parquet", [texts])
    assert (row.tools, row.chosen, row.rejected) == (ROW["tools"], ROW["chosen"], ROW["rejected"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_nulls_under_the_keys_of_rows_messages_calls_and_tools_are_absence(tmp_path: Path, name: str) -> None:
    empty = {"name": None, "tool_calls": None, "function_call": {"name": None, "arguments": {"minutes": None}}}
    spoken = {**message("user", "Clear it."), **empty, "weight": None}
    made = call({"minutes": 5})
    made["tool_calls"][0]["id"] = made["tool_calls"][0]["function"]["more"] = made["name"] = None
    tool = {**TOOL, "strict": None, "function": {**TOOL["function"], "description": None}}
    raw = {"prompt": [spoken], "chosen": [made], "rejected": [{**message("assistant", "No."), **empty}]}
    (row,) = read(tmp_path / name, [{**raw, "tools": [tool], "system": None, "messages": None}])
    assert row.prompt == [message("user", "Clear it.")]
    assert (row.chosen, row.rejected) == ([call({"minutes": 5})], [message("assistant", "No.")])
    assert row.tools is not None
    assert row.tools[0].keys() == {"type", "function"}
    assert row.tools[0]["function"].keys() == {"name", "parameters"}


def test_a_call_whose_fields_are_all_null_is_no_call() -> None:
    turn = {**message("assistant", "No."), "tool_calls": [{"id": None, "function": {"name": None, "arguments": None}}]}
    (row,) = preference_rows({**ROW, "rejected": [turn]}, "x:1")
    assert isinstance(row, PreferenceRow)
    assert row.rejected == [message("assistant", "No.")]


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save_byte_level(tmp_path_factory.mktemp("calling"), ["Clear it."] * 5)
    template = (
        "{{ (tools or []) | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{{ '|' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "t.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder, chat_template=str(folder / "t.jinja"))


def test_workers_and_cache_keep_null_and_absent_apart(tmp_path: Path, calling: Tokenizer) -> None:
    without = {**ROW, "chosen": [call({"at": [None, {"zone": None}]})]}
    learnt, digests = [], []
    for name, rows in (("with", [ROW]), ("without", [without])):
        dataset = DatasetConfig(path=str(written(tmp_path / f"{name}.jsonl", rows)))
        for _ in range(2):  # the second time from the cache
            data = prepare_pairs([dataset], calling, max_length=512, num_proc=2, cache_dir=tmp_path / "cache")
            learnt.append(calling.hf.decode(data[0].chosen_ids))
            digests.append(data.digest)
        assert data.from_cache
        assert '"default": null' in calling.hf.decode(data[0].prompt_ids)
    assert learnt[:2] == ['{"minutes": null, "at": [null, {"zone": null}]}|'] * 2
    assert learnt[2:] == ['{"at": [null, {"zone": null}]}|'] * 2
    assert digests[0] == digests[1] != digests[2] == digests[3]
