"""jdpo.tokenize_pairs: rows of text become rows that jdpo.pack takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from transformers import AutoTokenizer

import jdpo
from tests.conftest import chat_pairs, write_jsonl


def test_rows_of_text_are_packed(toy_model: Path, tmp_path: Path) -> None:
    rows = chat_pairs(4)
    rows.append(rows[0] | {"rejected": rows[0]["chosen"]})
    found = jdpo.tokenize_pairs(rows, toy_model, max_length=64)
    assert len(found.rows) == 4
    assert found.counts["dropped: identical sides"] == 1
    assert "identical sides" in found.summary
    assert found.summary.startswith("rows.jsonl")
    assert found.score_margins is None
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    whole = tokenizer.apply_chat_template(rows[0]["prompt"] + rows[0]["chosen"], tokenize=False)
    first = found.rows[0]
    assert tokenizer.decode(np.concatenate([first["prompt_ids"], first["chosen_ids"]])) == whole
    batch = jdpo.pack(found.rows)
    assert batch.pair_weight.sum() == 4
    # A file of the same rows and a loaded tokenizer give the same.
    again = jdpo.tokenize_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows), tokenizer, max_length=64)
    np.testing.assert_array_equal(jdpo.pack(again.rows).tokens, batch.tokens)


def test_scores_and_turns(toy_model: Path) -> None:
    (row,) = chat_pairs(1)
    turns = {
        side: [*row[side], {"role": "user", "content": "and"}, {"role": "assistant", "content": f"so {side}"}]
        for side in ("chosen", "rejected")
    }
    scored = row | turns | {"score_chosen": 3.0, "score_rejected": 1.0}
    found = jdpo.tokenize_pairs([scored], toy_model, loss_on_every_turn=True)
    assert found.score_margins is not None
    assert found.score_margins.tolist() == [2.0]
    (first,) = found.rows
    assert 0 < first["chosen_mask"].sum() < len(first["chosen_ids"])
    assert jdpo.pack(found.rows, score_margins=found.score_margins).pair_score_margin is not None


def test_rows_without_scores_among_others_are_counted(toy_model: Path) -> None:
    scores = {"score_chosen": 3.0, "score_rejected": 1.0}
    plain = chat_pairs(5)
    mixed = [row | scores if number in (0, 2) else row for number, row in enumerate(plain)]
    found = jdpo.tokenize_pairs(mixed, toy_model)
    assert found.score_margins is None
    assert found.counts["without scores"] == 3
    assert "3 of 5 kept rows are without scores (the first: number 1 of" in found.summary
    for rows in (plain, [row | scores for row in plain]):
        alike = jdpo.tokenize_pairs(rows, toy_model)
        assert (alike.score_margins is None) == (rows is plain)
        assert "without scores" not in alike.counts
        assert "without scores" not in alike.summary


def test_a_name_of_the_hub_is_taken(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    # A repository as an earlier download leaves it.
    repository, commit = tmp_path / "models--owner--toy", "0" * 40
    shutil.copytree(toy_model, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    rows = chat_pairs(2)
    found, expected = (jdpo.tokenize_pairs(rows, name).rows for name in ("owner/toy", toy_model))
    np.testing.assert_array_equal(jdpo.pack(found).tokens, jdpo.pack(expected).tokens)
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        jdpo.tokenize_pairs(rows, "owner/absent")


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model folder .* does not exist"):
        jdpo.tokenize_pairs(chat_pairs(1), tmp_path / "absent")
    with pytest.raises(ValueError, match="found int"):
        jdpo.tokenize_pairs(chat_pairs(1), 3)  # type: ignore[arg-type]
