"""Pairs whose sides have several turns: where they diverge, what is learnt, and their masks in batches and cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.batching.loader import collate_pairs
from jdpo.data.batching.packing_plan import item_sizes
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import HISTORIES_DIFFER, Dropped, Reading, preference_rows
from jdpo.data.schemas.turn_marks import take_marks
from jdpo.data.tokens.pair_turns import WRITTEN_DIFFERENTLY
from jdpo.data.tokens.tokenize import COMPLETION_CUT, NO_COMPLETION, NO_TURNS, KeptPair, tokenize_pairs
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.data.tokens.turns import NOT_LEARNT, SHOWN_TURN
from jdpo.types import MaskedPair, Message, PreferenceRow, completions_of

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from toy_tokenizers import give_template, train_tokenizer  # noqa: E402

ASK: Message = {"role": "user", "content": "Does it rain in Cork?"}
LOOK: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Cork"}}}],
}
SEEN: Message = {"role": "tool", "content": "18 degrees"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
EVERY_TURN = Reading(every_turn=True)


def answer(words: str) -> Message:
    return {"role": "assistant", "content": words}


USES_TOOL = [LOOK, SEEN, answer("No, it is warm.")]
GUESSES = [answer("I do not know.")]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def of(name: str) -> Tokenizer:
        hf = train_tokenizer("byte", ["Does it rain in Cork? No, it is warm."] * 9, 300)
        give_template(hf, TEMPLATES / f"{name}.jinja", ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
        folder = tmp_path_factory.mktemp("pair_turns") / name
        hf.save_pretrained(folder)
        return load_tokenizer(folder, chat_template=None)

    return of


def row_of(chosen: list[Message], rejected: list[Message], **columns: Any) -> PreferenceRow | Dropped:
    (row,) = preference_rows({"prompt": [ASK], "chosen": chosen, "rejected": rejected, **columns}, "x:1", EVERY_TURN)
    return row


def kept_pair(row: Any, tokenizer: Tokenizer, max_length: int = 999) -> MaskedPair:
    (kept,) = tokenize_pairs([row], tokenizer, max_length=max_length, every_turn=True)
    assert isinstance(kept, KeptPair), kept
    assert isinstance(kept.row, MaskedPair)
    return kept.row


def texts(pair: MaskedPair, tokenizer: Tokenizer) -> tuple[str, list[str], list[str]]:
    """Returns the prompt, and for each side its completion and the learnt part of it."""
    decode = tokenizer.hf.decode
    sides = completions_of(pair)
    return decode(pair.prompt_ids), [decode(ids) for ids, _ in sides], [decode(ids[mask]) for ids, mask in sides]


def test_sides_diverge_at_their_first_different_message() -> None:
    row = row_of(USES_TOOL, GUESSES, tools=TOOLS)
    assert isinstance(row, PreferenceRow)
    assert (row.prompt, row.chosen, row.rejected, row.tools) == ([ASK], USES_TOOL, GUESSES, TOOLS)
    whole = {"chosen": [ASK, *USES_TOOL], "rejected": [ASK, LOOK, SEEN, answer("Yes.")]}
    (same_call,) = preference_rows(whole, "x:1", EVERY_TURN)
    assert isinstance(same_call, PreferenceRow)
    assert (same_call.prompt, same_call.rejected) == ([ASK, LOOK, SEEN], [answer("Yes.")])
    (dropped,) = preference_rows({"prompt": [ASK], "chosen": USES_TOOL, "rejected": GUESSES}, "x:1")
    assert isinstance(dropped, Dropped)
    assert dropped.reason == HISTORIES_DIFFER


def test_every_turn_of_a_side_is_learnt_and_the_words_of_tools_are_not(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen2_5")
    row = row_of(USES_TOOL, GUESSES, tools=TOOLS)
    assert isinstance(row, PreferenceRow)
    prompt, wholes, learnt = texts(kept_pair(row, tokenizer), tokenizer)
    assert prompt == tokenizer.render([ASK], tools=TOOLS, add_generation_prompt=True)
    for side, found in zip((USES_TOOL, GUESSES), wholes, strict=True):
        assert prompt + found == tokenizer.render([ASK, *side], tools=TOOLS)
    call = '<tool_call>\n{"name": "look", "arguments": {"city": "Cork"}}\n</tool_call><|im_end|>\n'
    assert learnt == [f"{call}No, it is warm.<|im_end|>\n", "I do not know.<|im_end|>\n"]
    assert "18 degrees" in wholes[0]


def test_sides_of_one_turn_have_the_tokens_of_loss_on_completion(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen2_5")
    rows = [PreferenceRow([ASK], [answer("No.")], GUESSES, "x:1"), PreferenceRow("Rain?", " No.", " Yes.", "x:2")]
    every = tokenize_pairs(rows, tokenizer, max_length=99, every_turn=True)
    for one, other in zip(every, tokenize_pairs(rows, tokenizer, max_length=99), strict=True):
        assert isinstance(one, KeptPair)
        assert isinstance(other, KeptPair)
        for found, expected in zip(one.row[:3], other.row[:3], strict=True):
            np.testing.assert_array_equal(found, expected)
        assert all(mask.all() for _, mask in completions_of(one.row))
        assert set(one.notes) - set(other.notes) == ({NO_TURNS} if one.row.origin == "x:2" else set())


def test_a_user_who_speaks_between_the_turns_is_not_learnt(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen2_5")
    chosen = [answer("No."), {"role": "user", "content": "Sure?"}, answer("It is dry.")]
    row = row_of(chosen, GUESSES)
    assert isinstance(row, PreferenceRow)
    _, wholes, learnt = texts(kept_pair(row, tokenizer), tokenizer)
    assert learnt[0] == "No.<|im_end|>\nIt is dry.<|im_end|>\n"
    assert "Sure?" in wholes[0]


def test_turns_marked_as_shown_only(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen2_5")
    shown = take_marks(LOOK, {"weight": 0}, "chosen[0]", "x:1")
    row = PreferenceRow([ASK], [shown, SEEN, answer("No.")], GUESSES, "x:1", tools=TOOLS)
    (kept,) = tokenize_pairs([row], tokenizer, max_length=999, every_turn=True)
    assert isinstance(kept, KeptPair)
    assert SHOWN_TURN in kept.notes
    assert isinstance(kept.row, MaskedPair)
    _, wholes, learnt = texts(kept.row, tokenizer)
    assert learnt == ["No.<|im_end|>\n", "I do not know.<|im_end|>\n"]
    assert "look" in wholes[0]
    last = take_marks(answer("No."), {"weight": 0}, "chosen[2]", "x:1")
    unlearnt = PreferenceRow([ASK], [LOOK, SEEN, last], GUESSES, "x:1", tools=TOOLS)
    assert tokenize_pairs([unlearnt], tokenizer, max_length=999, every_turn=True) == [Dropped(NOT_LEARNT, "x:1")]


def test_a_template_that_writes_turns_differently_later_drops_the_pair(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen3")
    chosen = [answer("No."), {"role": "user", "content": "Sure?"}, answer("It is dry.")]
    row = PreferenceRow([ASK], chosen, GUESSES, "x:1")
    dropped = Dropped(WRITTEN_DIFFERENTLY, "x:1")
    assert tokenize_pairs([row], tokenizer, max_length=999, every_turn=True) == [dropped]


def test_a_cut_leaves_learnt_tokens_on_both_sides_or_drops_the_pair(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("qwen2_5")
    sides = [{"role": "user", "content": "Sure?"}, answer("No.")], GUESSES
    row = PreferenceRow([ASK], *sides, "x:1")
    whole = kept_pair(row, tokenizer)
    first = int(whole.chosen_mask.argmax())
    assert first > 0
    budget = len(whole.prompt_ids) + first
    (kept,) = tokenize_pairs([row], tokenizer, max_length=budget + 1, every_turn=True)
    assert isinstance(kept, KeptPair)
    assert COMPLETION_CUT in kept.notes
    cut = tokenize_pairs([row], tokenizer, max_length=budget, every_turn=True)
    assert cut == [Dropped(NO_COMPLETION, "x:1")]


def test_masks_reach_sizes_and_batches_and_come_back_from_the_cache(
    load: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = load("qwen2_5")
    raw = [
        {"prompt": [ASK], "chosen": USES_TOOL, "rejected": GUESSES, "tools": TOOLS},
        {"prompt": [ASK], "chosen": [answer("Yes.")], "rejected": GUESSES},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    options: dict[str, Any] = {"max_length": 999, "cache_dir": tmp_path / "cache", "loss_on": "assistant_turns"}
    data = prepare_pairs([DatasetConfig(path=str(path))], tokenizer, **options)
    again = prepare_pairs([DatasetConfig(path=str(path))], tokenizer, **options)
    assert again.from_cache
    assert data.counts == {"rows read": 2, "rows kept": 2}  # every turn ends as it should
    pairs = [again[0], again[1]]
    expected = kept_pair(row_of(USES_TOOL, GUESSES, tools=TOOLS), tokenizer)
    for found, array in zip(pairs[0][:5], expected[:5], strict=True):
        np.testing.assert_array_equal(found, array)
    masks = [[mask for _, mask in completions_of(pair)] for pair in pairs]
    assert data.num_chosen_tokens() == sum(int(chosen.sum()) for chosen, _ in masks)
    learnt = [int(chosen.sum() + rejected.sum()) for chosen, rejected in masks]
    assert data.sizes().scored.tolist() == item_sizes(pairs).scored.tolist() == learnt
    assert data.sizes().slots.tolist() == [sum(map(len, pair[:3])) for pair in pairs]
    length = int(data.lengths.max())
    batch = collate_pairs(pairs, num_slots=2, length=length, pad_token_id=0)
    for index, pair in enumerate(pairs):
        for side, (ids, mask) in enumerate(completions_of(pair)):
            start = len(pair.prompt_ids)
            np.testing.assert_array_equal(batch.tokens[index, side, start : start + len(ids)], ids)
            np.testing.assert_array_equal(batch.completion_mask[index, side, start : start + len(ids)], mask)
            assert batch.completion_mask[index, side].sum() == mask.sum()
    assert (
        data.digest
        != prepare_pairs(
            [DatasetConfig(path=str(path))], tokenizer, max_length=999, cache_dir=tmp_path / "cache"
        ).digest
    )
