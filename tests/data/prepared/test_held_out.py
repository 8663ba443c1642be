"""Training and evaluation rows by hash of the prompt: no prompt is on both sides, and every row is on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.config import DatasetConfig
from jdpo.data.prepared.held_out import TOLD_IN_TRAINING, Part, prompt_key
from jdpo.data.prepared.prepare import PreparedData, prepare_pairs
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer

PROMPTS = st.text(max_size=20) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=8)}), min_size=1
)


@given(st.lists(PROMPTS, max_size=30), st.floats(0, 1))
def test_every_prompt_is_on_one_side(prompts: list[Any], fraction: float) -> None:
    train, held_out = Part("train", fraction), Part("eval", fraction)
    sides = [(train.has(prompt_key(prompt)), held_out.has(prompt_key(prompt))) for prompt in prompts]
    assert all(sum(side) == 1 for side in sides)
    for prompt, side in zip(prompts, sides, strict=True):
        again = json.loads(json.dumps(prompt))
        assert (train.has(prompt_key(again)), held_out.has(prompt_key(again))) == side


def test_the_fractions_nest_and_are_met() -> None:
    keys = [prompt_key(f"question {number}") for number in range(20_000)]
    few, many = ([Part("eval", fraction).has(key) for key in keys] for fraction in (0.05, 0.2))
    assert all(more for less, more in zip(few, many, strict=True) if less)
    assert np.mean(few) == pytest.approx(0.05, abs=0.006)  # four standard deviations
    assert np.mean(many) == pytest.approx(0.2, abs=0.012)
    assert not any(Part("eval", 0).has(key) for key in keys)


def test_a_key_is_that_of_the_text_for_ever() -> None:
    # Golden: a change here moves rows from training to evaluation in every run that is resumed.
    assert prompt_key("Hi") == prompt_key([{"content": "Hi", "role": "user"}]) == 17575522251679977649
    assert prompt_key("Hi") != prompt_key([{"role": "assistant", "content": "Hi"}])
    assert prompt_key("Hi") != prompt_key("Hi ")
    assert prompt_key("\ud83d") != prompt_key("\ud83c"), "half of a surrogate pair has a key too"


# --- whole datasets


@pytest.fixture(scope="module")
def chatml(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


def write(path: Path, questions: list[str]) -> DatasetConfig:
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": f"yes {number}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for number, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def origins(data: PreparedData) -> set[str]:
    return {data[index].origin for index in range(len(data))}


def test_rows_of_both_parts_are_all_rows_and_share_no_prompt(chatml: Tokenizer, tmp_path: Path) -> None:
    datasets = [
        write(tmp_path / "a.jsonl", [f"Q {number % 40}?" for number in range(100)]),
        write(tmp_path / "b.jsonl", [f"Q {number}?" for number in range(60)]),
    ]
    parts = {
        side: prepare_pairs(datasets, chatml, max_length=64, cache_dir=tmp_path / "cache", part=Part(side, 0.3))
        for side in ("train", "eval")
    }
    whole = prepare_pairs(datasets, chatml, max_length=64, cache_dir=tmp_path / "cache")
    train, held_out = parts["train"], parts["eval"]
    assert origins(train) | origins(held_out) == origins(whole)
    assert len(train) + len(held_out) == len(whole) == 160
    assert not set(train.prompt_keys) & set(held_out.prompt_keys)
    assert train.counts == {"rows read": 160, "rows kept": len(train), "held out for evaluation": len(held_out)}
    assert held_out.counts == {"rows read": 160, "rows kept": len(held_out), "kept for training": len(train)}
    assert 20 < len(held_out) < 80
    again = prepare_pairs(datasets, chatml, max_length=64, cache_dir=tmp_path / "cache", part=Part("train", 0.3))
    assert (again.from_cache, again.digest) == (True, train.digest)


def test_rows_without_a_prompt_are_counted_among_the_training_rows(chatml: Tokenizer, tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.jsonl", [f"Q {number}?" for number in range(30)])
    with Path(dataset.path).open("a", encoding="utf-8") as lines:
        sides = {
            side: [{"role": "user", "content": f"{side}?"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        }
        lines.write((json.dumps(sides) + "\n") * 2)
    options: dict[str, Any] = {"max_length": 64, "cache_dir": tmp_path / "cache"}
    train, held_out = (
        prepare_pairs([dataset], chatml, part=Part(side, 0.3), **options).counts for side in ("train", "eval")
    )
    assert train["dropped: histories differ"] == 2
    assert "dropped: histories differ" not in held_out
    assert held_out[TOLD_IN_TRAINING] == 2
    for counts in (train, held_out):
        assert counts.pop("rows read") == sum(counts.values()) == 32


def test_keys_without_content_are_no_part_of_a_prompt() -> None:
    turn = {"role": "user", "content": "Hi"}
    assert prompt_key([turn | {"id": "a1", "timestamp": 5}]) == prompt_key([turn]) == prompt_key("Hi")
    assert prompt_key([turn | {"name": "Ann"}]) != prompt_key([turn])


def test_rows_of_the_other_side_are_not_tokenized(tmp_path: Path, byte_level: Path) -> None:
    bare = load_tokenizer(byte_level, chat_template=None)  # this tokenizer would refuse every conversation
    dataset = write(tmp_path / "a.jsonl", ["Q?"] * 5)
    with pytest.raises(ValueError, match=r"(?s)no rows left of \S+a\.jsonl\n5 rows read, 0 kept.*to evaluate on"):
        prepare_pairs([dataset], bare, max_length=64, cache_dir=tmp_path / "cache", part=Part("eval", 1e-9))
