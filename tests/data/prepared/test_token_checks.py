"""Faults in the start, the inside and the end of rows, on tokens written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared import token_checks
from jdpo.data.prepared.prepare import prepare_completions, prepare_pairs
from jdpo.data.prepared.row_arrays import RowArrays, Tags, row_arrays
from jdpo.data.prepared.token_checks import (
    BOS_INSIDE,
    BOS_TWICE,
    END_INSIDE,
    END_TWICE,
    NO_BOS,
    NO_END,
    STARTS_WITH_BOS,
    Expected,
    expected_of,
    find_faults,
)
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import TokenizedCompletion, TokenizedPair

BOS, EOS, NEWLINE = 1, 2, 3
EXPECTED = Expected(first=BOS, bos=BOS, ends=(EOS,), closing=2)  # answers end in EOS and a newline
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def tags(num_rows: int) -> Tags:
    return Tags(*(np.zeros(num_rows, dtype) for dtype in (np.int32, np.uint64, np.float32)))


def pairs(*rows: tuple[list[int], list[int], list[int]]) -> RowArrays:
    made = [TokenizedPair(*(ids(*part) for part in row), f"x:{number}") for number, row in enumerate(rows)]
    return row_arrays(made, TokenizedPair, tags(len(made)))


def found(
    block: RowArrays, expected: Expected = EXPECTED, *, plain: Any = False, cut: Any = False
) -> dict[str, list[int]]:
    """Returns the numbers of the rows with each fault."""
    flags = [np.broadcast_to(np.asarray(value, bool), len(block)) for value in (plain, cut)]
    faults = find_faults(block, expected, plain=flags[0], cut=flags[1], max_length=8)
    return {name: np.flatnonzero(rows).tolist() for name, rows in faults.items()}


GOOD = [7, EOS, NEWLINE]


@pytest.mark.parametrize(
    ("row", "faults"),
    [
        (([BOS, 5], GOOD, [8, 9, EOS, NEWLINE]), set()),
        (([5, 6], GOOD, GOOD), {NO_BOS}),
        (([BOS, BOS, 5], GOOD, GOOD), {BOS_TWICE}),
        (([BOS, 5, BOS], GOOD, GOOD), {BOS_INSIDE}),
        (([BOS, BOS, 5, BOS], GOOD, GOOD), {BOS_TWICE, BOS_INSIDE}),
        (([BOS, 5], GOOD, [7, BOS, EOS, NEWLINE]), {BOS_INSIDE}),
        (([BOS, 5], [BOS, 7, EOS, NEWLINE], GOOD), {STARTS_WITH_BOS}),
        (([BOS, 5], GOOD, [7, 8]), {NO_END}),
        (([BOS, 5], GOOD, [EOS, 7, 8, 9]), {NO_END, END_INSIDE}),
        (([BOS, 5], [7, EOS, EOS, NEWLINE], GOOD), {END_TWICE}),
        (([BOS, 5], [7, EOS, 8, EOS, NEWLINE], GOOD), {END_INSIDE}),
        (([BOS, EOS], GOOD, GOOD), set()),  # EOS of an earlier turn
        (([BOS, 5], [EOS, NEWLINE], [7]), {NO_END}),  # one token: no place for an end
    ],
)
def test_faults_of_a_pair(row: tuple[list[int], list[int], list[int]], faults: set[str]) -> None:
    good = ([BOS, 5], GOOD, GOOD)
    assert found(pairs(good, row, good)) == {name: [1] for name in faults}


def test_a_cut_answer_needs_no_end() -> None:
    whole, cut = ([BOS, 5, 6], GOOD, [7, 8]), ([BOS, 5, 6], GOOD, [7, 8, 7, 8, 7])
    assert found(pairs(whole, cut), cut=[False, True]) == {NO_END: [0]}
    assert found(pairs(cut), cut=True) == {}
    assert found(pairs(([BOS, 5, 6], GOOD, [7, EOS, 7, 8, 7])), cut=True) == {END_INSIDE: [0]}
    # One side was cut; the other is whole, and has no end token all the same.
    assert found(pairs(([BOS, 5, 6], [7, 8], [7, 8, 7, 8, 7])), cut=True) == {NO_END: [0]}


def test_plain_text_ends_only_in_eos() -> None:
    row = ([BOS, 5], [7, EOS], [8, EOS])
    assert found(pairs(row), plain=True) == {}
    assert found(pairs(row, ([BOS, 5], GOOD, [7, EOS])), plain=[True, False]) == {}, "EOS is among the last two"
    assert found(pairs(([BOS, 5], [7, EOS, 8], [8, EOS])), plain=True) == {NO_END: [0], END_INSIDE: [0]}


def test_a_template_without_an_end_token_ends_no_answer() -> None:
    assert found(pairs(([BOS, 5], [7, 8], [8, 9])), EXPECTED._replace(closing=0)) == {NO_END: [0]}


def test_without_a_bos_of_its_own_nothing_is_counted() -> None:
    row = ([BOS, 5, BOS], [BOS, EOS, NEWLINE], GOOD)
    assert found(pairs(row), Expected(first=None, bos=None, ends=(EOS,), closing=2)) == {}


def test_the_last_answer_of_a_supervised_row_is_checked() -> None:
    def completion(tokens: list[int], learnt: list[int]) -> TokenizedCompletion:
        return TokenizedCompletion(ids(*tokens), np.array(learnt, bool), "x:1")

    rows = [
        completion([BOS, 5, 7, EOS, NEWLINE], [0, 0, 1, 1, 1]),
        completion([BOS, 7, EOS, NEWLINE, 5, 7, EOS, NEWLINE], [0, 1, 1, 1, 0, 1, 1, 1]),  # every turn is learnt
        completion([BOS, 5, 7, 8], [0, 0, 1, 1]),
        completion([BOS, 7, EOS, NEWLINE, 5], [0, 1, 1, 1, 0]),  # cut in the user's turn
        completion([5, BOS, 7, EOS, NEWLINE], [0, 0, 1, 1, 1]),
        completion([BOS, 5, BOS, EOS, NEWLINE], [0, 0, 1, 1, 1]),
    ]
    block = row_arrays(rows, TokenizedCompletion, tags(len(rows)))
    assert found(block, cut=[0, 0, 0, 1, 0, 0]) == {NO_END: [2], NO_BOS: [4], BOS_INSIDE: [4], STARTS_WITH_BOS: [5]}


def test_no_rows_have_no_findings() -> None:
    assert found(pairs()) == {}
    assert found(row_arrays([], TokenizedCompletion, tags(0))) == {}


# --- expectations of a tokenizer


def test_the_end_of_an_answer_is_that_of_the_template(word_level: Callable[..., Path]) -> None:
    words = ["\n", "user", "assistant", "jdpoquestion", "jdpoanswer"]
    markers = ["<|im_start|>", "<|im_end|>"]
    chatml = load_tokenizer(
        word_level(words, specials={"eos_token": "<|im_end|>"}, markers=markers, chat_template=CHATML),
        chat_template=None,
    )
    assert expected_of(chatml) == Expected(None, None, chatml.end_token_ids, 2)
    assert expected_of(chatml) is expected_of(chatml)


def test_a_template_with_bos_before_every_turn_may_have_it_anywhere(word_level: Callable[..., Path]) -> None:
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(word_level(["\n"], specials=specials, chat_template=CHATML), chat_template=None)
    assert expected_of(tokenizer).bos is None


def test_a_bos_that_is_also_eos_may_be_anywhere(byte_level: Path, tmp_path: Path) -> None:
    from tests.data.conftest import save_byte_level

    both = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "gpt2", ["Paris"] * 9, **both), chat_template=None)
    assert expected_of(tokenizer) == Expected(None, None, tokenizer.end_token_ids, 1)


# --- whole datasets


def with_bos(word_level: Callable[..., Path], template: str, **options: Any) -> Tokenizer:
    folder = word_level(
        ["\n", "Hi", "yes", "no", "maybe"],
        specials={"bos_token": "<s>", "eos_token": "</s>"} | options.pop("specials", {}),
        adds_bos=True,
        chat_template=template,
    )
    return load_tokenizer(folder, chat_template=None)


def conversations(path: Path, *answers: str) -> list[DatasetConfig]:
    rows = [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": "maybe"}],
        }
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [DatasetConfig(path=str(path))]


LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def test_faults_are_counted_with_the_first_row_and_reported(word_level: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = with_bos(word_level, LLAMA_LIKE)
    datasets = conversations(tmp_path / "a.jsonl", "yes", "yes</s>", "yes</s>no", "yes<s>no", "no</s>no")
    data = prepare_pairs(datasets, tokenizer, max_length=16, cache_dir=tmp_path / "cache")
    faults = {name: (data.counts[name], data.examples[name]) for name in token_checks.FAULTS if name in data.counts}
    assert faults == {
        END_TWICE: (1, "a.jsonl:2"),
        END_INSIDE: (2, "a.jsonl:3"),
        BOS_INSIDE: (1, "a.jsonl:4"),
    }
    assert f"  2 {END_INSIDE} (the first: a.jsonl:3)" in data.summary()
    again = prepare_pairs(datasets, tokenizer, max_length=16, cache_dir=tmp_path / "cache")
    assert (again.from_cache, again.summary()) == (True, data.summary())


def test_conversations_without_the_bos_of_plain_text_are_counted(
    word_level: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = with_bos(word_level, LLAMA_LIKE.removeprefix("{{ bos_token }}"))
    data = prepare_pairs(
        conversations(tmp_path / "a.jsonl", "yes", "no"), tokenizer, max_length=16, cache_dir=tmp_path / "cache"
    )
    assert data.counts[NO_BOS] == 2


def test_a_template_that_ends_no_answer_gives_a_warning(word_level: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = with_bos(word_level, LLAMA_LIKE.replace("</s>", ""))
    data = prepare_completions(
        conversations(tmp_path / "a.jsonl", "yes", "no"), tokenizer, max_length=16, cache_dir=tmp_path / "cache"
    )
    assert data.counts[NO_END] == 2
    assert "  note: no answer ends with an end token" in data.summary()


def test_a_pad_token_that_is_eos_is_noted_once_and_hides_nothing(
    word_level: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = with_bos(word_level, LLAMA_LIKE, specials={"pad_token": "</s>"})
    data = prepare_pairs(
        conversations(tmp_path / "a.jsonl", "yes", "no"), tokenizer, max_length=16, cache_dir=tmp_path / "cache"
    )
    assert data.summary().count("the pad token is also an end token") == 1
    assert data[0].chosen_ids[-1] == tokenizer.eos_token_id


def test_rows_that_all_start_with_bos_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"all 3 rows start with BOS twice \(the first: a:1\)"):
        token_checks.refuse_ruined({BOS_TWICE: 3}, 3, {BOS_TWICE: "a:1"})
    token_checks.refuse_ruined({BOS_TWICE: 2}, 3, {BOS_TWICE: "a:1"})
