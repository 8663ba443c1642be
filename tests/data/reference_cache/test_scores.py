"""Files of the cached reference: what is written is read back, and anything else is refused."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.reference_cache.cache_key import (
    CacheEntry,
    about_rows,
    changes,
    most_similar_entry,
    parts_of,
    read_entry,
)
from jdpo.data.reference_cache.scores import (
    SHARD_ROWS,
    CacheFolder,
    RowLogps,
    cache_root,
    reference_logps_of,
)
from jdpo.types import TokenizedPair

NUM_ROWS = 2 * SHARD_ROWS + 5
PARTS: dict[str, Any] = {
    "weights": "w0",
    "rows": "r0",
    "compute_dtype": "float32",
    "model": {"num_layers": 2, "layer_windows": (None, 4), "vocab_size": 10},
    "started": None,
}
ABOUT: dict[str, Any] = {
    "role": "training",
    "model": "org/base",
    "datasets": ["pairs.jsonl (train)"],
    "sources": "s0",
    "tokenizer": "t0",
    "chat_template": None,
    "max_length": 512,
    "max_prompt_length": None,
    "eval_fraction": 0.0,
    "column_map": [{}],
    "ranked": ["best_vs_worst"],
    "min_margin": [None],
}


def entry(about: dict[str, Any] | None = None, **parts: Any) -> CacheEntry:
    return CacheEntry(parts_of(**(PARTS | parts)), ABOUT | (about or {}))


def make_rows(num_rows: int, seed: int = 0) -> tuple[list[TokenizedPair], list[RowLogps]]:
    """Returns rows of random lengths and a log-prob for each completion token."""
    rng = np.random.default_rng(seed)
    pairs, logps = [], []
    for index in range(num_rows):
        prompt, chosen, rejected = (rng.integers(0, 9, rng.integers(1, 6)).astype(np.int32) for _ in range(3))
        pairs.append(TokenizedPair(prompt, chosen, rejected, f"pairs.jsonl:{index}"))
        logps.append((-rng.random(len(chosen)), -rng.random(len(rejected))))
    return pairs, logps


def fill(folder: CacheFolder, logps: list[RowLogps]) -> CacheFolder:
    folder.path.mkdir(parents=True)
    for shard in range(folder.num_shards):
        rows = folder.rows_of(shard)
        folder.write_shard(shard, logps[rows.start : rows.stop])
    return folder


def small(root: Path, num_rows: int = 4, dtype: Any = np.float32) -> tuple[CacheFolder, list[TokenizedPair]]:
    """A complete entry of a few rows with its key.json."""
    pairs, logps = make_rows(num_rows)
    folder = fill(CacheFolder(root, entry().key, num_rows=num_rows, dtype=dtype), logps)
    folder.write_entry(entry())
    return folder, pairs


# --- what is written comes back


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_row_comes_back_bitwise_in_any_order_and_from_any_thread(tmp_path: Path, dtype: Any) -> None:
    pairs, logps = make_rows(NUM_ROWS)
    folder = fill(CacheFolder(tmp_path, "k", num_rows=NUM_ROWS, dtype=dtype), logps)
    assert folder.num_shards == 3
    cache = folder.open()
    assert len(cache) == NUM_ROWS
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: cache.row(int(index), pairs[index]), order))
    for index, row in zip(order, found, strict=True):
        for side, expected in zip(row, logps[index], strict=True):
            assert side.dtype == dtype
            np.testing.assert_array_equal(side, expected.astype(dtype))


def test_values_are_at_their_tokens(tmp_path: Path) -> None:
    ids = [np.zeros(length, np.int32) for length in (2, 3, 1)]
    pair, other = TokenizedPair(*ids, "a:1"), TokenizedPair(ids[2], ids[2], ids[0], "a:2")
    logps = [
        (np.array([-1.0, -2.0, -3.0]), np.array([-4.0])),
        (np.array([-5.0]), np.array([-6.0, -7.0])),
    ]
    cache = fill(CacheFolder(tmp_path, "k", num_rows=2, dtype=np.float32), logps).open()
    batch = reference_logps_of(cache, [other, pair], np.array([1, 0]), num_slots=3, length=5)
    assert batch.dtype == np.float32
    expected = [
        [[0, -5, 0, 0, 0], [0, -6, -7, 0, 0]],
        [[0, 0, -1, -2, -3], [0, 0, -4, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    np.testing.assert_array_equal(batch, expected)


def test_a_row_of_other_lengths_is_an_error_that_names_row_and_file(tmp_path: Path) -> None:
    folder, pairs = small(tmp_path)
    longer = pairs[2]._replace(rejected_ids=np.zeros(len(pairs[2].rejected_ids) + 1, np.int32))
    with pytest.raises(ValueError, match=r"row 2 \(pairs\.jsonl:2\) has completions of"):
        folder.open().row(2, longer)
    with pytest.raises(ValueError, match=r"row 1 \(pairs\.jsonl:2\).*holds"):
        reference_logps_of(folder.open(), [longer], np.array([1]), num_slots=1, length=20)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_row_that_is_not_there_is_an_error(tmp_path: Path, index: int) -> None:
    folder, pairs = small(tmp_path)
    with pytest.raises(ValueError, match=rf"row {index} \(pairs\.jsonl:0\) is not among the 4 cached rows"):
        folder.open().row(index, pairs[0])


def test_default_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "jdpo" / "reference"
    assert cache_root("elsewhere") == Path("elsewhere/reference")


# --- what is not as written is refused


@pytest.mark.parametrize("name", ["00000.safetensors", "00000.json", "key.json"])
def test_any_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    folder, _ = small(tmp_path)
    path = folder.path / name
    content = path.read_bytes()
    named = "key.json" if name == "key.json" else "00000.safetensors"
    for position in range(len(content)):
        bit = 1 << (position % 8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        with pytest.raises(ValueError, match=rf"damaged: .*{named}.*`jdpo reference CONFIG` computes it again"):
            folder.open()
    path.write_bytes(content)
    folder.open()


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, size: int) -> None:
    folder, _ = small(tmp_path)
    path = folder.shard_path(0)
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(ValueError, match=r"damaged: .*00000\.safetensors"):
        folder.open()


def test_a_shard_without_its_json_counts_as_missing(tmp_path: Path) -> None:
    folder = fill(CacheFolder(tmp_path, "k", num_rows=NUM_ROWS, dtype=np.float32), make_rows(NUM_ROWS)[1])
    folder.shard_path(1).with_suffix(".json").unlink()
    shards = folder.examine()
    assert (shards.whole.tolist(), shards.missing.tolist()) == ([True, False, True], [False, True, False])
    assert not shards.damaged_files
    assert folder.count_rows(shards.whole) == SHARD_ROWS + 5
    with pytest.raises(ValueError, match=r"not complete: .*00001\.safetensors and 0 more"):
        folder.open()


def test_a_json_without_its_shard_is_damage(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    folder.shard_path(0).unlink()
    with pytest.raises(ValueError, match="damaged"):
        folder.open()


@pytest.mark.parametrize("name", ["00000.safetensors", "00000.json", "key.json"])
def test_a_folder_in_a_files_place_is_damage(tmp_path: Path, name: str) -> None:
    folder, _ = small(tmp_path)
    (folder.path / name).unlink()
    (folder.path / name).mkdir()
    assert folder.examine().damaged_files
    with pytest.raises(ValueError, match="damaged"):
        folder.open()


def test_whole_shards_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    folder = fill(CacheFolder(tmp_path, "k", num_rows=NUM_ROWS, dtype=np.float32), make_rows(NUM_ROWS)[1])
    moved = tmp_path / "moved"
    shutil.copytree(folder.path, moved)
    assert CacheFolder(tmp_path, "moved", num_rows=NUM_ROWS, dtype=np.float32).examine().damaged.all()
    for suffix in (".safetensors", ".json"):
        first, second = (folder.shard_path(shard).with_suffix(suffix) for shard in (0, 1))
        first.rename(tmp_path / "kept")
        second.rename(first)
        (tmp_path / "kept").rename(second)
    assert folder.examine().damaged.tolist() == [True, True, False]


def test_a_shard_of_another_dtype_is_refused(tmp_path: Path) -> None:
    folder, _ = small(tmp_path, dtype=np.float64)
    with pytest.raises(ValueError, match=r"expected 18 log-probs of float32, found F64"):
        CacheFolder(tmp_path, folder.key, num_rows=4, dtype=np.float32).open()


def test_a_failed_rewrite_leaves_no_json_without_its_shard(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    folder.shard_path(0).unlink()
    folder.shard_path(0).mkdir()  # a folder blocks the shard's place
    with pytest.raises(OSError, match="00000"):
        folder.write_shard(0, make_rows(4)[1])
    assert folder.examine().missing.all(), "missing, not damaged"


def test_what_a_killed_process_was_writing_is_cleared(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    before = sorted(folder.path.iterdir())
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE, check=True)
    mine, theirs = socket.gethostname(), "another-host"
    (folder.path / f"00001.safetensors.{mine}-{int(ended.stdout)}-0123abcd.tmp").write_bytes(b"half")
    old = folder.path / f"00001.safetensors.{theirs}-1-0123abcd.tmp"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    # Locks of another host may have no effect here, so what it may still be writing stays.
    young = folder.path / f"00002.safetensors.{theirs}-1-0123abcd.tmp"
    young.write_bytes(b"half")
    folder.clear_unfinished()
    assert sorted(folder.path.iterdir()) == sorted([*before, young])


# --- other runs


def test_one_run_computes_at_a_time(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    lock = folder.try_lock()
    assert lock is not None
    assert folder.try_lock() is None
    lock.close()
    again = folder.try_lock()
    assert again is not None
    again.close()


def test_runs_that_asked_are_remembered_once(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, "k", num_rows=4, dtype=np.float32)
    assert folder.asked_by() == []
    for run in ("a", "b", "a"):
        folder.ask(run)
    assert folder.asked_by() == ["a", "b"]
    (folder.path / "asked.json").write_text("{")
    assert folder.asked_by() == []


# --- what has changed


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (entry(), entry(weights="w1"), ["the weights of the reference model org/base"]),
        (
            entry(),
            entry({"model": "org/other"}, weights="w1"),
            ["the reference model: org/base then, org/other now"],
        ),
        (entry(), entry(compute_dtype="bfloat16"), ["compute_dtype: float32 then, bfloat16 now"]),
        (
            entry(),
            entry(model={"num_layers": 3, "layer_windows": (None, 4), "vocab_size": 10}),
            ["the model's num_layers: 2 then, 3 now"],
        ),
        (
            entry(started={"seed": 1, "ids": [3]}),
            entry(started={"seed": 2, "ids": [3]}),
            [
                "tokens that start at the mean, and the seed of the noise: {'seed': 1, 'ids': [3]} then, "
                "{'seed': 2, 'ids': [3]} now"
            ],
        ),
        (entry(), entry({"max_length": 1024}, rows="r1"), ["max_length: 512 then, 1024 now"]),
        (entry(), entry({"max_prompt_length": 9}, rows="r1"), ["max_prompt_length: null then, 9 now"]),
        (entry(), entry({"eval_fraction": 0.1}, rows="r1"), ["eval_fraction: 0.0 then, 0.1 now"]),
        (
            entry(),
            entry({"ranked": ["all"], "min_margin": [2.0]}, rows="r1"),
            [
                "ranked of pairs.jsonl (train): best_vs_worst then, all now",
                "min_margin of pairs.jsonl (train): null then, 2.0 now",
            ],
        ),
        (
            entry(),
            entry({"column_map": [{"prompt": "q"}]}, rows="r1"),
            ["column_map of pairs.jsonl (train): {} then, {'prompt': 'q'} now"],
        ),
        (entry(), entry({"tokenizer": "t1"}, rows="r1"), ["the tokenizer or its chat template"]),
        (
            entry(),
            entry({"tokenizer": "t1", "chat_template": "chatml"}, rows="r1"),
            ["chat_template: null then, chatml now"],
        ),
        (entry(), entry({"sources": "s1"}, rows="r1"), ["the rows of pairs.jsonl (train)"]),
        (
            entry(),
            entry({"sources": "s1", "datasets": ["b.jsonl (train)"]}, rows="r1"),
            ["the data: pairs.jsonl (train) then, b.jsonl (train) now"],
        ),
        (entry(), entry(rows="r1"), ["how the rows of pairs.jsonl (train) are tokenized"]),
        # A setting that does not change the rows cannot be the reason why the entry is not found.
        (entry(), entry({"max_length": 1024}, weights="w1"), ["the weights of the reference model org/base"]),
        (
            entry(),
            entry({"max_length": 1024, "sources": "s1"}, rows="r1", weights="w1"),
            [
                "the weights of the reference model org/base",
                "max_length: 512 then, 1024 now",
                "the rows of pairs.jsonl (train)",
            ],
        ),
    ],
)
def test_changes_are_named_in_words_of_the_config(then: CacheEntry, now: CacheEntry, expected: list[str]) -> None:
    assert then.key != now.key
    assert changes(then, now) == expected


def test_the_key_depends_on_its_parts_alone() -> None:
    assert entry().key == entry({"max_length": 9, "sources": "x", "role": "evaluation"}).key
    keys = {
        entry(**part).key
        for part in (
            {},
            {"weights": "w1"},
            {"rows": "r1"},
            {"compute_dtype": "float64"},
            {"started": {"seed": 0, "ids": [3]}},
            {"model": PARTS["model"] | {"vocab_size": 11}},
        )
    }
    assert len(keys) == 6


def keep(root: Path, kept: CacheEntry, age: int) -> None:
    """An entry with one shard, `age` seconds old."""
    folder = CacheFolder(root, kept.key, num_rows=1, dtype=np.float32)
    fill(folder, make_rows(1)[1])
    folder.write_entry(kept)
    os.utime(folder.path / "key.json", (1e9 - age, 1e9 - age))


def test_nearest_is_the_entry_that_a_person_would_expect(tmp_path: Path) -> None:
    now = entry()
    assert most_similar_entry(tmp_path, now) is None
    keep(tmp_path, entry({"role": "evaluation"}, rows="e"), 0)
    keep(tmp_path, entry({"datasets": ["x"], "model": "y"}, rows="r5", weights="w5"), 0)
    assert most_similar_entry(tmp_path, now) is None, "another role, or nothing in common"
    by_model = entry({"datasets": ["x"]}, rows="r2")
    keep(tmp_path, by_model, 0)
    assert most_similar_entry(tmp_path, now) == by_model
    far = entry({"max_length": 1, "max_prompt_length": 2, "tokenizer": "t", "model": "z"}, rows="r3", weights="w3")
    keep(tmp_path, far, 50)
    assert most_similar_entry(tmp_path, now) == far, "the same data first, then what is shared"
    old, new = entry(weights="w7"), entry(weights="w8")
    keep(tmp_path, new, 10)
    keep(tmp_path, old, 20)
    assert most_similar_entry(tmp_path, now) == new, "the most recent of two that share as much"
    keep(tmp_path, now, 0)
    assert most_similar_entry(tmp_path, now) == new, "never itself"
    (tmp_path / new.key / "key.json").write_text("{}")
    assert most_similar_entry(tmp_path, now) == old, "a damaged one is passed over"
    (tmp_path / old.key / "00000.json").unlink()
    assert most_similar_entry(tmp_path, now) == far, "so is one that nothing was computed for"


def test_about_rows_follows_the_content_of_the_data(tmp_path: Path) -> None:
    path, row = tmp_path / "pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    options: dict[str, Any] = {"role": "training", "model": "m", "tokenizer": "t", "chat_template": None}

    def about(num_rows: int) -> dict[str, Any]:
        path.write_text(num_rows * row)
        dataset = DatasetConfig(path=str(path), ranked="all", min_margin=0.5)
        return about_rows([dataset], max_length=8, max_prompt_length=None, eval_fraction=0.1, **options)

    first, second = about(1), about(2)
    assert (first["column_map"], first["ranked"], first["min_margin"]) == ([{}], ["all"], [0.5])
    assert first["datasets"] == [f"{path} (train)"]
    assert {name for name in first if first[name] != second[name]} == {"sources"}


def test_an_entry_in_a_folder_of_another_key_is_damage(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    assert read_entry(folder.path) == entry()
    assert read_entry(tmp_path / "nothing") is None
    shutil.copytree(folder.path, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other/key\.json is damaged"):
        read_entry(tmp_path / "other")
