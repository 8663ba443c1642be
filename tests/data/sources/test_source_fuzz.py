"""Readers on any rows and any bytes; scripts/fuzz_readers.py runs the same for as long as one likes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jdpo
from jdpo.config import DatasetConfig
from jdpo.data.sources import json_rows, read_rows
from jdpo.data.sources.json_values import MAX_DEPTH
from jdpo.data.tokens.tokenizer import Tokenizer

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from fuzz_cases import KINDS, damaged, make_case, make_file  # noqa: E402
from fuzz_readers import check_file, train_tokenizer  # noqa: E402

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(st.characters(), max_size=20)  # includes lone surrogates
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that hypothesis reuses for every example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(path: Path, content: bytes) -> list[dict[str, Any]]:
    path.write_bytes(content)
    return [raw for raw, _ in read_rows(DatasetConfig(path=str(path)))]


@quick
@given(rows=rows, ascii_only=st.booleans(), compact=st.booleans())
def test_any_rows_come_back_from_json_lines(folder: Path, rows: list[Any], ascii_only: bool, compact: bool) -> None:
    separators = (",", ":") if compact else None
    lines = [json.dumps(row, ensure_ascii=ascii_only, separators=separators) for row in rows]
    try:
        content = "\n".join(lines).encode()
    except UnicodeEncodeError:  # a lone surrogate can only be written as an escape
        content = "\n".join(map(json.dumps, rows)).encode()
    assert read(folder / "a.jsonl", content) == rows
    assert read(folder / "a.jsonl.gz", gzip.compress(content, 0)) == rows


@quick
@given(rows=rows, indent=st.none() | st.integers(0, 2), chunk=st.integers(1, 50))
def test_any_rows_come_back_from_an_array_however_it_is_cut(
    folder: Path, rows: list[Any], indent: int | None, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_BYTES", chunk)
        assert read(folder / "a.json", json.dumps(rows, indent=indent).encode()) == rows
        if len(rows) > 1:
            assert read(folder / "a.json", "\n".join(map(json.dumps, rows)).encode()) == rows


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@quick
@given(
    names=st.lists(cells.filter(str.strip), min_size=2, max_size=4, unique=True),
    table=st.lists(st.lists(cells, min_size=4, max_size=4), min_size=1, max_size=5),
    ending=st.sampled_from(["csv", "tsv"]),
)
def test_any_cells_come_back_from_a_table(folder: Path, names: list[str], table: list[list[str]], ending: str) -> None:
    table = [row[: len(names)] for row in table]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="," if ending == "csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([names, *table])
    names[0] = names[0].removeprefix("\ufeff")
    expected = [dict(zip(names, [cell or None for cell in row], strict=True)) for row in table]
    assert read(folder / f"a.{ending}", stream.getvalue().encode()) == expected


@quick
@given(kind=st.sampled_from(KINDS), content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(folder: Path, tokenizer: Tokenizer, kind: str, content: bytes) -> None:
    path = folder / f"case{kind}"
    path.write_bytes(content)
    check_file(path, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    rng, path, outcomes = random.Random(7), tmp_path / f"case{kind}", set()
    for number in range(30):
        content = make_file(kind, rng)
        path.write_bytes(damaged(content, rng) if number % 2 else content)
        outcomes.add(check_file(path, tokenizer, "train" if number % 5 else "train[:50%]"))
    assert outcomes == {"read", "refused"}  # both must occur, or the test tried nothing


def test_cases_are_those_of_their_seed() -> None:
    kinds = {make_case(random.Random(seed))[0] for seed in range(200)}
    assert kinds == set(KINDS)
    assert make_case(random.Random(5)) == make_case(random.Random(5))


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@quick
@given(depth=st.integers(0, 5 * MAX_DEPTH))
def test_depth_never_ends_in_a_recursion_error(folder: Path, opening: str, depth: int) -> None:
    text = '{"a": ' + opening * depth
    for name in ("a.json", "a.jsonl"):
        with pytest.raises(ValueError, match=rf"^{folder}/{name}:1: (broken JSON|JSON that cannot be read)"):
            read(folder / name, text.encode())


@pytest.mark.full
def test_the_script_finds_nothing_in_a_minute(tmp_path: Path) -> None:
    root = str(Path(jdpo.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, SCRIPTS / "fuzz_readers.py", "--minutes", "1", "--seed", "11", "--save", tmp_path / "saved"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "a second" in run.stdout
