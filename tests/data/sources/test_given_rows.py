"""Rows of Python code come back from their file as they were given."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from jdpo.config import DatasetConfig
from jdpo.data.sources import read_rows
from jdpo.data.sources.given_rows import form_of

ROWS = [{"prompt": "Zürich\n", "chosen": "a", "rejected": "b", "score": 1}, {"prompt": "", "chosen": "c"}]


def written(rows: object, folder: Path) -> Path:
    form = form_of(rows, "train_dataset")
    assert form is not None
    path = folder / f"train_dataset{form.ending}"
    form.write(path)
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [row for row, _ in read_rows(DatasetConfig(path=str(path)))]


def test_a_list_keeps_its_columns_and_absent_ones_stay_absent(tmp_path: Path) -> None:
    path = written(tuple(ROWS), tmp_path)
    assert rows_in(path) == ROWS
    assert [origin for _, origin in read_rows(DatasetConfig(path=str(path)))][1] == "train_dataset.jsonl:2"


def test_values_of_numpy_and_dates_become_those_of_json(tmp_path: Path) -> None:
    row = {
        "n": np.int32(3),
        "all": np.arange(2),
        "day": datetime.date(2026, 1, 2),
        "pair": ("a", "b"),
        "half": "\ud800",
    }
    found = rows_in(written([row], tmp_path))
    assert found == [{"n": 3, "all": [0, 1], "day": "2026-01-02", "pair": ["a", "b"], "half": "\ud800"}]


def test_a_dataset_keeps_its_features_its_selection_and_its_order(tmp_path: Path) -> None:
    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"prompt": list("abcde"), "label": [0, 1, 0, 1, 1]}, features=features)
    path = written(dataset.select([4, 0, 2]).with_format("numpy", columns=["label"]), tmp_path)
    assert rows_in(path) == [{"prompt": p, "label": n} for p, n in (("e", 1), ("a", 0), ("c", 0))]
    assert Dataset.from_file(str(path)).features == features


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_changed_rows_are_told_from_equal_ones(make: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "score": math.nan if make is not list else 0.5} for number in range(3)]
    path = written(make(rows), tmp_path)

    def difference(others: list[dict[str, Any]]) -> str:
        form = form_of(make(others), "train_dataset")
        assert form is not None
        return form.difference(path) or "none"

    assert difference([dict(reversed(row.items())) for row in rows]) == "none"
    assert "row 2 differs" in difference([rows[0], rows[2], rows[2]])
    assert "4 rows now" in difference([*rows, rows[0]])
    assert "2 rows now" in difference(rows[:2])
    path.write_bytes(b"\xffnothing\n" * 3)
    assert difference(rows) != "none"


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (Dataset.from_list(ROWS).to_iterable_dataset(), r"list\(rows\)"),
        (DatasetDict(train=Dataset.from_list(ROWS)), r'rows\["train"\]'),
        (pd.DataFrame(ROWS), "from_pandas"),
        (pa.Table.from_pylist(ROWS), r"datasets\.Dataset\(rows\)"),
        ({"prompt": ["a"]}, "from_dict"),
        ((row for row in ROWS), r"found generator; give list\(rows\)"),
        (3, "found int"),
        ([], "it has no rows"),
        (Dataset.from_list(ROWS).with_transform(lambda batch: batch), "dataset.map"),
    ],
)
def test_what_is_no_rows_is_refused_with_what_to_give(rows: object, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        form_of(rows, "train_dataset")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("pairs.jsonl", "given in the config, as datasets"),
        ({"prompt": "a", "seen": {1}}, "column 'seen' .* holds a set"),
        ({"score": math.nan}, "column 'score' cannot be kept"),
    ],
)
def test_a_row_that_no_file_can_keep_is_named_and_nothing_is_written(row: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"train_dataset\[1\].*{problem}"):
        written([ROWS[0], row], tmp_path)
    assert list(tmp_path.iterdir()) == []
