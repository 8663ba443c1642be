"""Tokenized rows on disk: the values stored with their tokens, and the checks at each start."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import PreparedData, prepare_completions, prepare_pairs
from jdpo.data.prepared.row_arrays import Tags, concatenated, row_arrays
from jdpo.data.prepared.row_store import BATCH_ROWS, open_rows, writing_rows
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import TokenizedCompletion, TokenizedPair


@pytest.fixture(scope="module")
def tokenizer(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


def write(path: Path, rows: list[dict[str, Any]]) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Q {number}", "chosen": "yes" + "." * (number % 7), "rejected": "no", **more}


def rows_of(data: PreparedData) -> list[tuple[list[int], ...]]:
    return [tuple(ids.tolist() for ids in data[index][:3]) for index in range(len(data))]


def test_rows_know_their_dataset_prompt_and_margin(tokenizer: Tokenizer, tmp_path: Path) -> None:
    scored = [pair(number, score_chosen=number + 0.5, score_rejected=0) for number in range(3)]
    datasets = [
        write(tmp_path / "a.jsonl", [pair(1), pair(1, rejected=""), pair(2)]),
        write(tmp_path / "b.jsonl", scored),
    ]
    data = prepare_pairs(datasets, tokenizer, max_length=64, cache_dir=tmp_path / "cache")
    assert data.names == ("a", "b")
    assert data.dataset_of.tolist() == [0, 0, 1, 1, 1]
    assert data.num_rows_of == (2, 3)
    assert [array.dtype for array in (data.dataset_of, data.prompt_keys, data.margins)] == [
        np.int32, np.uint64, np.float32,
    ]  # fmt: skip
    assert data.margins[2:].tolist() == [0.5, 1.5, 2.5]
    assert all(math.isnan(margin) for margin in data.margins[:2])
    assert data.prompt_keys[0] == data.prompt_keys[3], "the same prompt in another dataset"
    assert len(set(data.prompt_keys.tolist())) == 3
    assert data.examples == {
        "dropped: empty side": "a.jsonl:2",
        "in plain text: the chat template is not applied to them": "a.jsonl:1",
    }
    assert set(data.file_digests()) == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}


def test_labels_are_not_part_of_the_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_length": 64, "cache_dir": tmp_path / "cache"}
    dataset = write(tmp_path / "a.jsonl", [pair(1)])
    prepare_pairs([dataset], tokenizer, **options)
    named = DatasetConfig(path=dataset.path, label="mine", weight=2)
    again = prepare_pairs([named], tokenizer, **options)
    assert (again.from_cache, again.names) == (True, ("mine",))
    with pytest.raises(ValueError, match="two datasets are called 'a'"):
        prepare_pairs([dataset, dataset], tokenizer, **options)


def test_pairs_of_ranked_rows_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    answers = [{"answer": word, "rank": rank} for rank, word in enumerate(["good", "fair", "bad"], start=1)]
    path = write(tmp_path / "a.jsonl", [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "answers": answers}] * 2).path
    counts = {
        rule: prepare_pairs(
            [DatasetConfig(path=path, ranked=rule)], tokenizer, max_length=64, cache_dir=tmp_path / "cache"
        ).counts
        for rule in ("best_vs_worst", "all")
    }
    assert counts["best_vs_worst"] == {
        "rows read": 2, "rows kept": 2, "ranked rows": 2, "pairs made of ranked rows": 2,
    }  # fmt: skip
    assert counts["all"] == {"rows read": 2, "rows kept": 6, "ranked rows": 2, "pairs made of ranked rows": 6}


def big(path: Path, tokenizer: Tokenizer) -> PreparedData:
    dataset = DatasetConfig(path=str(path / "big.jsonl"))
    return prepare_pairs([dataset], tokenizer, max_length=64, cache_dir=path / "cache")


@pytest.fixture(scope="module")
def kept(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenized rows of two record batches; tests use copies of it."""
    folder = tmp_path_factory.mktemp("kept")
    write(folder / "big.jsonl", [pair(number) for number in range(BATCH_ROWS + 50)])
    big(folder, tokenizer)
    return folder


@pytest.fixture
def copy(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "copy"))  # keeps file times


def store_of(folder: Path) -> Path:
    (path,) = (folder / "cache" / "tokenized").glob("*.arrow")
    return path


def flip(path: Path, at: int, *, keep_time: bool) -> None:
    """Flips one bit; a failing disk keeps the file's time, an edit changes it."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def place_of(path: Path, ids: np.ndarray) -> int:
    """Returns the position of these tokens in a file."""
    return path.read_bytes().index(ids.astype(np.int32).tobytes())


def test_a_flipped_bit_is_found_before_its_rows_are_used(tokenizer: Tokenizer, copy: Path) -> None:
    path = store_of(copy)
    at = place_of(path, big(copy, tokenizer)[BATCH_ROWS + 5].prompt_ids)
    flip(path, at, keep_time=True)
    data = big(copy, tokenizer)
    assert data.from_cache
    assert data[0].origin == "big.jsonl:1", "the other batch is in order"
    message = rf"tokenized rows {BATCH_ROWS} to {BATCH_ROWS + 49} of .*arrow are not as they were written; delete this"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            data[BATCH_ROWS + 1]


def test_flipped_lengths_and_tags_are_found_at_the_start(tokenizer: Tokenizer, copy: Path) -> None:
    path = store_of(copy)
    at = path.read_bytes().index(big(copy, tokenizer).prompt_keys[:BATCH_ROWS].tobytes())
    flip(path, at + 80, keep_time=True)
    assert not big(copy, tokenizer).from_cache


def test_a_file_of_another_time_is_read_whole(tokenizer: Tokenizer, copy: Path) -> None:
    path, before = store_of(copy), rows_of(big(copy, tokenizer))
    os.utime(path)  # like a copy that did not keep its time
    voucher = path.with_suffix(".json")
    old = voucher.read_text()
    again = big(copy, tokenizer)
    assert again.from_cache
    assert rows_of(again) == before
    assert voucher.read_text() != old, "the next start need not read it again"
    flip(path, len(path.read_bytes()) // 2, keep_time=False)
    assert not big(copy, tokenizer).from_cache


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".new-old", tmp_path / ".new-mine"
    for folder in (old, new):
        folder.mkdir()
        (folder / "rows.arrow").write_text("half")
    yesterday = time.time() - 90_000
    os.utime(old / "rows.arrow", (yesterday, yesterday))
    with writing_rows(tmp_path, "key", TokenizedPair):
        assert not old.exists()
        assert new.exists(), "somebody may be at it"


def test_blocks_come_back_whatever_their_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def completion(number: int) -> TokenizedCompletion:
        length = int(rng.integers(1, 9))
        return TokenizedCompletion(
            rng.integers(0, 99, length).astype(np.int32), rng.integers(0, 2, length).astype(bool), f"x:{number}"
        )

    rows = [completion(number) for number in range(2 * BATCH_ROWS + 7)]
    cuts = [0, 0, 5, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS + 7]
    with writing_rows(tmp_path, "key", TokenizedCompletion) as writer:
        for start, stop in itertools.pairwise(cuts):
            tags = Tags(
                np.full(stop - start, start, np.int32),
                np.arange(start, stop, dtype=np.uint64),
                np.zeros(stop - start, np.float32),
            )
            writer.append(row_arrays(rows[start:stop], TokenizedCompletion, tags))
        writer.about = {"of": "rows"}
    found = open_rows(tmp_path, "key", TokenizedCompletion)
    assert found is not None
    assert (len(found), found.about) == (len(rows), {"of": "rows"})
    np.testing.assert_array_equal(found.tags.prompt_key, np.arange(len(rows)))
    for index in (0, 4, 5, BATCH_ROWS - 1, BATCH_ROWS, len(rows) - 1):
        np.testing.assert_array_equal(found[index].tokens, rows[index].tokens)
        np.testing.assert_array_equal(found[index].completion_mask, rows[index].completion_mask)
        assert found[index].origin == rows[index].origin
    np.testing.assert_array_equal(found.lengths_of("tokens"), [len(row.tokens) for row in rows])
    np.testing.assert_array_equal(
        found.counts_of("completion_mask", skip=1), [row.completion_mask[1:].sum() for row in rows]
    )
    np.testing.assert_array_equal(found.counts_of("completion_mask"), [row.completion_mask.sum() for row in rows])


def test_blocks_are_joined_in_order() -> None:
    tags = Tags(np.zeros(1, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32))
    blocks = [
        row_arrays([TokenizedPair(*([np.array([number], np.int32)] * 3), f"x:{number}")], TokenizedPair, tags)
        for number in range(3)
    ]
    whole = concatenated(blocks)
    assert whole.values["chosen_ids"].tolist() == [0, 1, 2]
    assert whole.origins == ["x:0", "x:1", "x:2"]
    assert len(whole) == 3


def test_supervised_rows_have_tags_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "completion": "yes"}])
    data = prepare_completions([dataset], tokenizer, max_length=64, cache_dir=tmp_path / "cache")
    assert data.dataset_of.tolist() == [0]
    assert math.isnan(data.margins[0])
