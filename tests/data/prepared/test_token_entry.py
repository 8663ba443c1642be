"""Rows that several processes tokenize are those of one process, byte by byte, and each chunk is tokenized once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.chunk_stream import CHUNK_ROWS, Share
from jdpo.data.prepared.prepare import completions_entry, pairs_entry
from jdpo.data.prepared.token_entry import TokenEntry, WrittenShare
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer

NUM_ROWS = 2 * CHUNK_ROWS + 100


@pytest.fixture(scope="module")
def chatml(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[DatasetConfig]:
    """Two files, with rows that are dropped and rows of which a completion is cut."""
    folder = tmp_path_factory.mktemp("rows")
    for name, num_rows in (("a", NUM_ROWS), ("b", 30)):
        rows = [
            {"prompt": f"{name} {i}", "chosen": "." * (i % 90), "rejected": "no" if i % 50 else "." * (i % 90)}
            for i in range(num_rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [DatasetConfig(path=str(folder / f"{name}.jsonl")) for name in "ab"]


@pytest.fixture(params=[pairs_entry, completions_entry])
def entry(
    request: pytest.FixtureRequest, datasets: list[DatasetConfig], chatml: Tokenizer
) -> Callable[[Path], TokenEntry]:
    return lambda folder: request.param(datasets, chatml, max_length=64, num_proc=1, cache_dir=folder)


def write_shares(entry: TokenEntry, folder: Path, count: int) -> list[WrittenShare]:
    folder.mkdir(exist_ok=True)
    return [entry.write_share(folder / str(rank), Share(rank, count)) for rank in range(count)]


@pytest.mark.parametrize("count", [3, 6])  # six: some shares are empty
def test_shares_joined_are_the_rows_of_one_process(
    entry: Callable[[Path], TokenEntry], tmp_path: Path, count: int
) -> None:
    one, many = entry(tmp_path / "one"), entry(tmp_path / "many")
    expected = one.load()
    assert many.open() is None
    shares = write_shares(many, tmp_path / "parts", count)
    # Of 3 + 1 chunks, each is in one file.
    assert [share.num_chunks for share in shares] == [len(range(rank, 4, count)) for rank in range(count)]
    told: list[tuple[int, int | None]] = []
    data = many.join(shares, progress=lambda *counts: told.append(counts))
    assert told[-1] == (NUM_ROWS + 30, None)
    assert (data.digest, data.counts, data.examples) == (expected.digest, expected.counts, expected.examples)
    assert (data.counts_of, data.examples_of) == (expected.counts_of, expected.examples_of)
    assert "rows read" in data.counts
    assert len(data.counts) > 2, "rows that were dropped or cut"
    assert one.key == many.key
    name = f"{one.key}.arrow"
    assert (many.folder / name).read_bytes() == (one.folder / name).read_bytes()


def test_progress_counts_the_rows_of_all_shares(
    datasets: list[DatasetConfig], chatml: Tokenizer, tmp_path: Path
) -> None:
    entry = pairs_entry(datasets, chatml, max_length=64, num_proc=1, cache_dir=tmp_path)
    told: list[int] = []
    entry.write_share(tmp_path / "part", Share(1, 2), progress=lambda count, total: told.append(count))
    assert told == [2 * CHUNK_ROWS, NUM_ROWS + 30]


def damage(content: bytes) -> bytes:
    return content[:1000] + b"?" + content[1001:]


def cut(content: bytes) -> bytes:
    return content[:-7]


def cut_chunk(content: bytes) -> bytes:
    """Leaves out the last chunk."""
    first = 12 + int.from_bytes(content[:8], "little")
    return content[:first]


@pytest.mark.parametrize("change", [damage, cut, cut_chunk])
def test_a_share_that_is_not_as_written_is_refused(
    datasets: list[DatasetConfig], chatml: Tokenizer, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    entry = pairs_entry(datasets, chatml, max_length=64, num_proc=1, cache_dir=tmp_path)
    shares = write_shares(entry, tmp_path / "parts", 2)
    shares[1].path.write_bytes(change(shares[1].path.read_bytes()))
    with pytest.raises(ValueError, match="parts/1 is not as it was written"):
        entry.join(shares)
    assert entry.open() is None
    assert not list(entry.folder.glob("*.arrow"))


def test_a_file_that_changes_between_two_shares_is_refused(
    entry: Callable[[Path], TokenEntry], datasets: list[DatasetConfig], tmp_path: Path
) -> None:
    one = entry(tmp_path)
    first, second = write_shares(one, tmp_path / "parts", 2)
    with pytest.raises(ValueError, match="different rows in the same files"):
        one.join([first, second._replace(num_chunks_of_all=5)])


def test_a_folder_that_cannot_be_written_is_named(
    datasets: list[DatasetConfig], chatml: Tokenizer, tmp_path: Path
) -> None:
    entry: Any = pairs_entry(datasets, chatml, max_length=64, num_proc=1, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="set cache_dir to a writable folder"):
        entry.write_share(tmp_path / "missing" / "part", Share(0, 2))
