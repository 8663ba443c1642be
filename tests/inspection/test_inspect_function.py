"""`jdpo.inspect`: the report of `jdpo inspect` on rows of Python code."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import jdpo
from tests.conftest import chat_pairs, write_jsonl

ROWS = chat_pairs(6)


def test_rows_of_python_give_the_report_of_their_file_and_leave_no_file(toy_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train_dataset.jsonl", ROWS)
    cache = tmp_path / "cache"
    of_list, of_file = (jdpo.inspect(rows, toy_model, max_length=64, cache_dir=cache) for rows in (ROWS, path))
    assert of_list.document == of_file.document
    assert "Row 1: train_dataset.jsonl:" in str(of_list)
    assert "6 rows to train on" in repr(of_list)


def test_a_loaded_tokenizer_is_enough_and_the_report_is_kept(toy_model: Path, tmp_path: Path) -> None:
    report = jdpo.inspect(
        Dataset.from_list([*ROWS, {**ROWS[0], "prompt": [{"role": "user", "content": '"><script>alert(1)</script>'}]}]),
        AutoTokenizer.from_pretrained(toy_model),
        eval_dataset=ROWS[:2],
        max_length=64,
        num_rows=7,
        cache_dir=tmp_path / "cache",
    )
    assert (report.document["model"]["problem"], report.document["config"]["model_name_or_path"]) == (
        None,
        str(toy_model),
    )
    assert [one["name"] for one in report.document["findings"] if one["severity"] == "fault"] == ["leakage"]
    assert json.loads(report.save(tmp_path / "report.json").read_text(encoding="utf-8")) == report.document
    page = report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"\.html or \.json"):
        report.save(tmp_path / "report.pdf")
    framed = report._repr_html_()
    assert framed.startswith('<iframe sandbox=""')
    # The attribute ends where it should: a quote in the rows cannot leave it.
    assert html.unescape(framed.split('srcdoc="')[1].split('"')[0]) == page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"task": "rl"}, "expected sft or dpo"),
        ({"tokenizer": 3}, "found int"),
        ({"dataset": iter(ROWS)}, r"dataset: .*give list\(rows\)"),
    ],
)
def test_a_wrong_call_is_refused(arguments: dict[str, object], problem: str, toy_model: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        jdpo.inspect(**({"dataset": ROWS, "tokenizer": toy_model} | arguments))  # type: ignore[arg-type]
