from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.chunk_stream import CHUNK_TEXT
from jdpo.data.prepared.prepare import prepare_completions, prepare_pairs
from jdpo.data.prepared.row_store import BATCH_ROWS
from jdpo.data.schemas.formats import preference_rows
from jdpo.data.tokens.tokenize import KeptPair
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import PreferenceRow, TokenizedCompletion, TokenizedPair
from tests.data.one_row import tokenize_pair

CAPITALS = {"France": "Paris", "Ireland": "Dublin"}


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Returns conversational pairs of different lengths."""
    countries = list(CAPITALS)
    return [
        {
            "prompt": [{"role": "user", "content": f"The capital of {countries[i % 2]} {i}?"}],
            "chosen": [{"role": "assistant", "content": CAPITALS[countries[i % 2]] + "." * (i % 5)}],
            "rejected": [{"role": "assistant", "content": "I do not know"}],
        }
        for i in range(num_rows)
    ]


def write(path: Path, raw: list[dict[str, Any]]) -> list[DatasetConfig]:
    path.write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    return [DatasetConfig(path=str(path))]


@pytest.fixture(scope="module")
def chatml(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


@pytest.fixture
def prepare(tmp_path: Path, chatml: Tokenizer) -> Callable[..., Any]:
    """Calls `prepare_pairs` with the cache in a folder of the test."""

    def run(datasets: list[DatasetConfig], **options: Any) -> Any:
        options = {"max_length": 256, "cache_dir": tmp_path / "cache"} | options
        return prepare_pairs(datasets, options.pop("tokenizer", chatml), **options)

    return run


def assert_equal(first: TokenizedPair, second: TokenizedPair) -> None:
    assert first.origin == second.origin
    for a, b in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype == np.int32


def test_rows_come_back_as_they_were_tokenized(prepare: Callable[..., Any], tmp_path: Path, chatml: Tokenizer) -> None:
    raw = rows(2 * BATCH_ROWS + 3)  # several record batches, and several chunks of tokenization
    data = prepare(write(tmp_path / "pairs.jsonl", raw))
    assert len(data) == len(raw)
    assert data.counts == {"rows read": len(raw), "rows kept": len(raw)}
    for index in (0, 1, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS, len(raw) - 1):
        (row,) = preference_rows(raw[index], f"pairs.jsonl:{index + 1}")
        assert isinstance(row, PreferenceRow)
        expected = tokenize_pair(row, chatml, max_length=256)
        assert isinstance(expected, KeptPair)
        assert_equal(data[index], expected.row)
        assert data.lengths[index] == len(expected.row.prompt_ids) + max(map(len, expected.row[1:3]))
    assert data.lengths.dtype == np.int32
    for index in (-1, len(raw)):
        with pytest.raises(IndexError):
            data[index]


def test_what_is_dropped_and_cut_is_counted_and_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    raw = rows(6)
    raw[1]["chosen"][0]["content"] = " "
    raw[2]["rejected"] = raw[2]["chosen"]
    raw[3]["prompt"][0]["content"] = "?" * 300
    raw[4]["chosen"][0]["content"] = "!" * 300
    raw[5] = {"chosen": raw[0]["prompt"] + raw[0]["chosen"], "rejected": raw[1]["prompt"] + raw[1]["rejected"]}
    data = prepare(write(tmp_path / "pairs.jsonl", raw))
    assert data.counts == {
        "rows read": 6,
        "rows kept": 2,
        "dropped: empty side": 1,
        "dropped: identical sides": 1,
        "dropped: prompt as long as max_length": 1,
        "dropped: histories differ": 1,
        "with a completion cut at max_length": 1,
    }
    assert [data[i].origin for i in range(2)] == ["pairs.jsonl:1", "pairs.jsonl:5"]
    for line in (
        f"{tmp_path}/pairs.jsonl\n",  # a file has no splits to name
        "  6 rows read, 2 kept",
        "  1 dropped: empty side (the first: pairs.jsonl:2)",
        "  1 with a completion cut at max_length",
    ):
        assert line in data.summary()


def test_nothing_left_to_train_on_is_an_error_with_the_counts(prepare: Callable[..., Any], tmp_path: Path) -> None:
    datasets = write(tmp_path / "pairs.jsonl", [row | {"rejected": row["chosen"]} for row in rows(3)])
    for _ in range(2):  # an empty result must not enter the cache
        with pytest.raises(ValueError, match=r"(?s)no rows left of \S+\n3 rows read, 0 kept.*3 dropped: ident"):
            prepare(datasets)
    assert not list((tmp_path / "cache" / "tokenized").iterdir())


def test_the_second_start_takes_rows_from_the_cache(prepare: Callable[..., Any], tmp_path: Path) -> None:
    raw = rows(10)
    raw[0]["chosen"][0]["content"] = ""
    datasets = write(tmp_path / "pairs.jsonl", raw)
    first, second = prepare(datasets), prepare(datasets)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.counts, first.digest) == (second.counts, second.digest)
    (store,) = (tmp_path / "cache" / "tokenized").glob("*.arrow")
    assert first.cache_note == f"tokenized into {store}"
    assert second.cache_note == f"found tokenized in {store}"
    assert str(tmp_path / "cache") not in first.summary() + second.summary()
    assert first.summary() == second.summary()
    assert "1 dropped: empty side (the first: pairs.jsonl:1)" in second.summary()
    np.testing.assert_array_equal(first.lengths, second.lengths)
    for index in range(9):
        assert_equal(first[index], second[index])


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 255},
        {"max_prompt_length": 20},
        {"rows": rows(9)},
        {"split": "train[:5]"},
        {"name": "other.jsonl"},
        {"chat_template": None},
    ],
)
def test_the_cache_follows_all_that_rows_depend_on(
    prepare: Callable[..., Any], tmp_path: Path, byte_level: Path, changed: dict[str, Any]
) -> None:
    plain = [{"prompt": "Hi", "chosen": "yes" + "." * i, "rejected": "no"} for i in range(10)]
    prepare(write(tmp_path / "pairs.jsonl", plain))
    options = {key: value for key, value in changed.items() if key.startswith("max")}
    if "chat_template" in changed:
        options["tokenizer"] = load_tokenizer(byte_level, chat_template=None)
    write(tmp_path / changed.get("name", "pairs.jsonl"), changed.get("rows", plain))
    path = str(tmp_path / changed.get("name", "pairs.jsonl"))
    assert not prepare([DatasetConfig(path=path, split=changed.get("split", "train"))], **options).from_cache


def test_the_same_content_elsewhere_is_a_cache_hit(prepare: Callable[..., Any], tmp_path: Path) -> None:
    first = prepare(write(tmp_path / "pairs.jsonl", rows(5)))
    (tmp_path / "moved").mkdir()
    second = prepare(write(tmp_path / "moved" / "pairs.jsonl", rows(5)))
    assert second.from_cache
    assert second.digest == first.digest


def test_the_digest_is_that_of_the_tokens(prepare: Callable[..., Any], tmp_path: Path) -> None:
    first = prepare(write(tmp_path / "a.jsonl", rows(5)))
    assert prepare(write(tmp_path / "b.jsonl", rows(5))).digest == first.digest
    assert prepare(write(tmp_path / "a.jsonl", rows(5)[::-1])).digest != first.digest
    # The boundaries count too: the same tokens, divided otherwise.
    plain = [{"prompt": "a", "chosen": "bc", "rejected": "d"}, {"prompt": "ab", "chosen": "c", "rejected": "d"}]
    divided = [prepare(write(tmp_path / f"{i}.jsonl", [row])).digest for i, row in enumerate(plain)]
    assert divided[0] != divided[1]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".arrow", lambda data: data[:-10]),
        (".arrow", lambda data: b""),
        (".arrow", lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:]),
        (".json", lambda data: data[:20]),
        (".json", lambda data: b"{}"),
        (".json", lambda data: b"[]"),
    ],
)
def test_a_damaged_cache_is_built_again(
    prepare: Callable[..., Any], tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    datasets = write(tmp_path / "pairs.jsonl", rows(5))
    first = prepare(datasets)
    expected = [first[index] for index in range(5)]
    expected = [TokenizedPair(*(ids.copy() for ids in row[:3]), row.origin) for row in expected]
    (path,) = (tmp_path / "cache" / "tokenized").glob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    again = prepare(datasets)
    assert not again.from_cache
    for index, row in enumerate(expected):
        assert_equal(again[index], row)
    assert prepare(datasets).from_cache


def test_a_broken_row_leaves_nothing_in_the_cache(prepare: Callable[..., Any], tmp_path: Path) -> None:
    datasets = write(tmp_path / "pairs.jsonl", rows(600))
    with (tmp_path / "pairs.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:601: broken JSON"):
        prepare(datasets)
    assert not list((tmp_path / "cache" / "tokenized").iterdir())


def test_a_cache_that_cannot_be_written_is_named(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write tokenized rows to .*file/tokenized"):
        prepare(write(tmp_path / "pairs.jsonl", rows(2)), cache_dir=tmp_path / "file")


def test_the_default_cache_is_in_the_users_cache_folder(
    prepare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(write(tmp_path / "pairs.jsonl", rows(2)), cache_dir=None)
    assert len(list((tmp_path / "xdg" / "jdpo" / "tokenized").glob("*.arrow"))) == 1


def test_datasets_follow_one_another(prepare: Callable[..., Any], tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(2))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    data = prepare([*first, *second])
    assert [data[i].origin for i in range(5)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]
    with pytest.raises(ValueError, match="no datasets were given"):
        prepare([])


def test_progress_is_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    prepare(write(tmp_path / "pairs.jsonl", rows(1100)), progress=lambda *counts: told.append(counts))
    assert told == [(512, None), (1024, None), (1100, None)]


def test_chunks_of_large_rows_are_small(prepare: Callable[..., Any], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    large = [{**row, "notes": "x" * (CHUNK_TEXT // 2)} for row in rows(5)]
    data = prepare(write(tmp_path / "pairs.jsonl", large), progress=lambda *counts: told.append(counts))
    assert told == [(2, None), (4, None), (5, None)]
    assert len(data) == 5


def test_progress_has_a_total_if_the_files_tell_it(prepare: Callable[..., Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(700)), tmp_path / "pairs.parquet")
    told: list[tuple[int, int | None]] = []
    dataset = DatasetConfig(path=str(tmp_path / "pairs.parquet"), split="train[:600]")
    prepare([dataset], progress=lambda *counts: told.append(counts))
    assert told == [(512, 600), (600, 600)]


def test_supervised_rows_and_their_masks_come_back(tmp_path: Path, chatml: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Dublin?"},
        {"role": "assistant", "content": "No"},
    ]
    datasets = write(tmp_path / "chats.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    options: dict[str, Any] = {"max_length": 256, "cache_dir": tmp_path / "cache"}
    last = prepare_completions(datasets, chatml, **options)
    every = prepare_completions(datasets, chatml, loss_on="assistant_turns", **options)
    again = prepare_completions(datasets, chatml, loss_on="assistant_turns", **options)
    assert (last.from_cache, every.from_cache, again.from_cache) == (False, False, True)
    for data, learnt in ((last, ["No"]), (every, ["Yes", "No"]), (again, ["Yes", "No"])):
        row = data[0]
        assert isinstance(row, TokenizedCompletion)
        assert (row.tokens.dtype, row.completion_mask.dtype) == (np.int32, np.bool_)
        text = chatml.hf.decode(row.tokens[row.completion_mask])
        assert text == "".join(f"{words}<|im_end|>\n" for words in learnt)
        assert data.lengths.tolist() == [len(data[0].tokens), len(data[1].tokens)]
    assert last.digest != every.digest == again.digest


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(thinks) ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Only the last answer has a thought."""


def test_turns_that_are_written_differently_later_become_rows_that_are_counted(
    tmp_path: Path, byte_level: Path
) -> None:
    (tmp_path / "thinks.jinja").write_text(THINKS, encoding="utf-8")
    tokenizer = load_tokenizer(byte_level, chat_template=str(tmp_path / "thinks.jinja"))
    turns = [{"role": role, "content": words} for words in ("Paris", "Rome") for role in ("user", "assistant")]
    raw = [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns}]
    datasets = write(tmp_path / "chats.jsonl", raw)
    options: dict[str, Any] = {"max_length": 256, "cache_dir": tmp_path / "cache"}
    data = prepare_completions(datasets, tokenizer, loss_on="assistant_turns", **options)
    learnt = [tokenizer.hf.decode(row.tokens[row.completion_mask]) for row in map(data.__getitem__, range(len(data)))]
    first, second = ("(thinks) Paris<|im_end|>\n", "(thinks) Rome<|im_end|>\n")
    assert learnt == [first, second, first, first, second]
    counts = data.counts
    assert (counts["rows read"], counts["rows kept"]) == (3, 5)
    assert counts["conversations of several sequences: the chat template writes earlier turns differently"] == 2
    assert counts["sequences made of such conversations"] == 4
    assert "2 conversations of several sequences" in data.summary()
    # Turns of one row do not repeat one another; those of a row that is there twice do.
    one, two, _, *again = data.prompt_keys.tolist()
    assert one != two
    assert again == [one, two]


def test_the_chosen_side_of_preference_rows_is_learnt_and_reported(tmp_path: Path, chatml: Tokenizer) -> None:
    data = prepare_completions(
        write(tmp_path / "pairs.jsonl", rows(3)), chatml, max_length=256, cache_dir=tmp_path / "cache"
    )
    assert data.counts["preference rows of which the chosen side is learnt"] == 3
    assert "3 preference rows of which the chosen side is learnt" in data.summary()
    assert chatml.hf.decode(data[0].tokens[data[0].completion_mask]) == "Paris<|im_end|>\n"


def test_half_a_surrogate_pair_drops_only_its_row(prepare: Callable[..., Any], tmp_path: Path) -> None:
    raw = rows(4)
    raw[1]["chosen"][0]["content"] = "bad \ud83d half"
    raw[2]["prompt"][0]["content"] = "bad \ud83d half"
    data = prepare(write(tmp_path / "pairs.jsonl", raw))
    assert data.counts == {"rows read": 4, "rows kept": 2, "dropped: text that is not Unicode": 2}
    assert "  2 dropped: text that is not Unicode (the first: pairs.jsonl:2)" in data.summary()


def test_files_of_a_folder_that_are_not_read_are_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", rows(3))
    datasets = [DatasetConfig(path=str(folder))]
    assert "left out" not in prepare(datasets).summary()
    for index in range(6):
        write(folder / f"extra{index}.jsonl", rows(3))
    data = prepare(datasets)
    assert data.from_cache  # what is left out is no part of the rows
    assert f"{folder} (train)\n" in data.summary()
    assert (
        "6 data files of no split ignored: extra0.jsonl, extra1.jsonl, extra2.jsonl, extra3.jsonl, extra4.jsonl "
        "and 1 more"
    ) in data.summary()


def test_plain_text_with_a_chat_template_is_noted(
    prepare: Callable[..., Any], tmp_path: Path, byte_level: Path, chatml: Tokenizer
) -> None:
    plain = [{"prompt": "Hi", "chosen": "yes" + "." * i, "rejected": "no"} for i in range(3)]
    datasets = write(tmp_path / "pairs.jsonl", [*plain, *rows(2)])
    line = "  3 in plain text: the chat template is not applied to them"
    assert line in prepare(datasets).summary()
    bare = load_tokenizer(byte_level, chat_template=None)
    assert "plain text" not in prepare(write(tmp_path / "plain.jsonl", plain), tokenizer=bare).summary()
    options: dict[str, Any] = {"max_length": 256, "cache_dir": tmp_path / "cache"}
    every = prepare_completions(datasets, chatml, loss_on="assistant_turns", **options).summary()
    assert line in every
    no_turns = "3 in plain text, which has no turns: of them loss_on: assistant_turns learns the completion"
    assert no_turns in every
    assert no_turns not in prepare_completions(datasets, chatml, **options).summary()
