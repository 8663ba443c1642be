"""Statistics of a dataset: by hand, against brute force, and on real tokenized rows."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.config import DatasetConfig
from jdpo.data.batching.packing_plan import completion_sizes, pair_sizes
from jdpo.data.prepared.prepare import PreparedData, prepare_completions, prepare_pairs
from jdpo.data.prepared.token_checks import END_INSIDE
from jdpo.data.schemas import formats
from jdpo.data.tokens.tokenize import COMPLETION_CUT
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.reports.data_summary.raw_text import (
    BIDI,
    CONTROL,
    INVISIBLE,
    REPLACEMENT,
    SPECIAL,
    SPECIAL_IN_PLAIN,
    text_facts,
)
from jdpo.reports.data_summary.row_statistics import (
    MOST_BINS,
    TAIL,
    cut_sides,
    distribution,
    nice_edges,
    repeats,
    row_facts,
    step_costs,
)
from jdpo.reports.share_tests import EXACT_UP_TO, length_bias, sign_test, wilson

SPECIAL_TEXT = re.compile(re.escape("<|im_end|>"))


# --- distributions


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=50))
def test_every_length_falls_into_a_bar(values: list[int]) -> None:
    found = distribution(np.array(values))
    assert found is not None
    assert sum(found["bars"]) == found["values"] == len(values)
    assert len(found["bars"]) <= MOST_BINS
    assert found["edges"][0] <= min(values)
    assert max(values) < found["edges"][-1]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_every_margin_falls_into_a_bar(values: list[float]) -> None:
    found = distribution(np.array(values))
    assert found is not None
    assert sum(found["bars"]) == len(values)
    assert 1 <= len(found["bars"]) <= MOST_BINS


def test_a_distribution_knows_its_quantiles_and_leaves_out_what_is_not_a_number() -> None:
    values = np.random.default_rng(0).integers(0, 500, 1000)
    found = distribution(np.append(values.astype(float), [np.nan, np.inf]))
    assert found is not None
    assert found["values"] == 1000
    assert [found["p5"], found["median"], found["p99"]] == np.quantile(values, [0.05, 0.5, 0.99]).tolist()
    assert distribution(np.array([np.nan])) is None
    assert distribution(np.zeros(0)) is None


def test_bars_of_lengths_begin_at_round_numbers() -> None:
    assert nice_edges(0, 1023, whole=True).tolist() == [*range(0, 1101, 100)]
    assert np.diff(nice_edges(3, 7, whole=True)).tolist() == [1, 1, 1, 1, 1]  # a bar is never narrower than a token


# --- length bias


@pytest.mark.parametrize(("successes", "trials"), [(7, 9), (2, 9), (5, 10), (0, 4)])
def test_the_sign_test_is_the_share_of_coin_throws_that_are_as_far_out(successes: int, trials: int) -> None:
    throws = [sum(coins) for coins in itertools.product((0, 1), repeat=trials)]
    far = abs(successes - trials / 2)
    assert sign_test(successes, trials) == sum(abs(heads - trials / 2) >= far for heads in throws) / len(throws)


def test_the_approximate_sign_test_continues_the_exact_one() -> None:
    exact, normal = sign_test(540, EXACT_UP_TO), sign_test(541, EXACT_UP_TO + 2)
    assert 0.9 < normal / exact < 1.1
    assert sign_test(600_000, 1_000_000) == 0.0  # neither an overflow nor a negative value


@pytest.mark.parametrize(("successes", "trials"), [(0, 3), (3, 3), (61, 100)])
def test_the_interval_of_a_share_holds_it_and_stays_a_share(successes: int, trials: int) -> None:
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert low < high


def test_swapping_sides_swaps_the_bias() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.integers(1, 50, 200) + 5, rng.integers(1, 50, 200)
    there, back = length_bias(chosen, rejected), length_bias(rejected, chosen)
    assert there["mean_difference"] == pytest.approx(-back["mean_difference"])
    assert (there["longer"], there["longer_accuracy"]) == (back["shorter"], back["shorter_accuracy"])
    assert there["p_value"] == back["p_value"]
    assert there["share_longer"] > 0.5


def test_pairs_of_equal_length_say_nothing() -> None:
    found = length_bias(np.array([3, 4]), np.array([3, 4]))
    assert (found["equal"], found["share_longer"], found["p_value"], found["low"]) == (2, None, None, None)


# --- repeats


def test_repeats_and_contradictions_by_hand() -> None:
    #         first  again  denied  other answers  other prompt, same sides
    prompt = np.array([1, 1, 1, 1, 2], np.uint64)
    chosen = np.array([10, 10, 20, 30, 10], np.uint64)
    rejected = np.array([20, 20, 10, 40, 20], np.uint64)
    found = repeats(prompt, [chosen, rejected])
    assert found["same_row"].tolist() == [False, True, False, False, False]
    assert found["same_prompt"].tolist() == [False, False, True, True, False]
    assert found["contradictions"].tolist() == [True, True, True, False, False]


def test_supervised_rows_repeat_but_never_contradict() -> None:
    found = repeats(np.array([1, 1, 1]), [np.array([5, 5, 6])])
    assert found["same_row"].tolist() == [False, True, False]
    assert not found["contradictions"].any()


# --- what steps cost


def test_positions_of_a_step_by_hand() -> None:
    # P 10 C 20 R 30 and P 50 C 4 R 6: longest 40 and 56; one step of both
    sizes = pair_sizes(np.array([[10, 20, 30], [50, 4, 6]]))
    found = step_costs(sizes, np.array([70, 110]), [np.array([0, 1])], num_shards=1, max_tokens_per_device=1024)
    assert (found["padded_positions"], found["sequence_tokens"], found["shared_tokens"]) == (4 * 56, 180, 120)
    assert found["packed_slots"] == 128  # 120, rounded up to a multiple of 64
    assert found["fewer_in_all"] == pytest.approx(4 * 56 / 128)
    assert found["fewer_by_packing"] * found["fewer_by_sharing_prompts"] == pytest.approx(found["fewer_in_all"])
    assert found["padded_padding"] == pytest.approx(1 - 180 / 224)
    assert found["packed_padding"] == pytest.approx(1 - 120 / 128)


def test_supervised_rows_share_no_prompts() -> None:
    lengths = np.array([10, 64])
    sizes = completion_sizes(lengths, lengths - 2)
    found = step_costs(sizes, lengths, [np.array([0]), np.array([1])], num_shards=1, max_tokens_per_device=64)
    assert found["fewer_by_sharing_prompts"] == 1
    assert found["padded_positions"] == 74  # each step is as long as its own longest


# --- tokenized rows


def prepared(tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], **options: Any) -> PreparedData[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare = prepare_completions if "completion" in rows[0] else prepare_pairs
    return prepare([DatasetConfig(path=str(path))], tokenizer, cache_dir=tmp_path / "cache", **options)


def test_facts_of_rows_are_those_of_their_tokens(tmp_path: Path, toy_model: Path) -> None:
    tokenizer = load_tokenizer(toy_model, chat_template=None)
    turns = [("river " * count, "stone " * 3, "light " * (2 * count)) for count in range(1, 12)]
    rows = [{"prompt": user(p), "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in turns]
    data = prepared(tmp_path, tokenizer, rows, max_length=30)
    facts = row_facts(data, tokenizer, max_length=30)
    chosen, rejected = facts.length["chosen"], facts.length["rejected"]
    cut = facts.cut
    for index in range(len(data)):
        row = data[index]
        assert facts.prompt[index] == len(row.prompt_ids)
        assert (chosen[index], rejected[index]) == (len(row.chosen_ids), len(row.rejected_ids))
        assert cut["rejected"][index] == (tokenizer.eos_token_id not in row.rejected_ids)
    assert (cut["chosen"] | cut["rejected"]).sum() == data.counts[COMPLETION_CUT] == 8
    # On one side the cut removed only the line feed that the template writes after the end token.
    whole_but_full = ~cut["chosen"] & (facts.prompt + chosen == 30)
    assert (chosen[whole_but_full] == [6, 5]).all()
    assert END_INSIDE not in data.counts
    whole = facts.key["chosen"][chosen == 6]
    assert len(whole) == 6
    assert len(set(whole.tolist())) == 1  # the same answer every time
    assert len(set(facts.key["chosen"].tolist())) == 6  # including the five that were cut to different lengths
    assert facts.sequence_tokens.tolist() == (2 * facts.prompt + chosen + rejected).tolist()


def test_supervised_rows_count_learnt_and_other_tokens(tmp_path: Path, toy_model: Path) -> None:
    tokenizer = load_tokenizer(toy_model, chat_template=None)
    data = prepared(tmp_path, tokenizer, [{"prompt": user("river"), "completion": assistant("stone")}], max_length=64)
    facts = row_facts(data, tokenizer, max_length=64)
    assert list(facts.length) == ["completion"]
    assert facts.length["completion"].tolist() == [int(data[0].completion_mask.sum())]
    assert facts.sequence_tokens.tolist() == [len(data[0].tokens)]
    assert not facts.cut["completion"].any()


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=8)), max_size=30))
def test_sides_that_were_cut_are_those_without_an_end_among_their_last_tokens(
    rows: list[tuple[bool, list[int]]],
) -> None:
    ends = [0, 7]
    offsets = np.cumsum([0, *(len(tokens) for _, tokens in rows)])
    tokens = np.array([token for _, tokens in rows for token in tokens], np.int32)
    found = cut_sides(offsets, tokens, np.array([is_long for is_long, _ in rows], bool), np.array(ends))
    assert found.tolist() == [is_long and not set(tokens[-TAIL:]) & set(ends) for is_long, tokens in rows]


def test_the_cost_of_long_rows_is_that_of_arrays() -> None:
    """The number of Python calls does not grow with the rows, all of which may be long."""

    def num_calls(num_rows: int) -> int:
        offsets, calls = np.arange(num_rows + 1) * 5, 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            cut_sides(offsets, np.zeros(5 * num_rows, np.int32), np.ones(num_rows, bool), np.array([1]))
        finally:
            sys.setprofile(None)
        return calls

    assert num_calls(2000) <= 2 * num_calls(20)


# --- raw text


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def facts_of(*raws: dict[str, Any]) -> Any:
    rows = [(raw, f"rows.jsonl:{number}") for number, raw in enumerate(raws, 1)]
    return text_facts(rows, formats.preference_rows, formats.schema_name, SPECIAL_TEXT)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a\x00b", CONTROL),
        ("a\x1b[31mb", CONTROL),
        ("a\x85b", CONTROL),
        ("a\u202eb", BIDI),
        ("a\u2067b", BIDI),
        ("a\u200bb", INVISIBLE),
        ("a\ufeffb", INVISIBLE),
        ("a\U000e0041b", INVISIBLE),
        ("a\ufffdb", REPLACEMENT),
        ("a<|im_end|>b", SPECIAL),
    ],
)
@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_invisible_characters_are_found_in_every_part(text: str, kind: str, place: str) -> None:
    parts = {"prompt": user("Hi"), "chosen": assistant("yes"), "rejected": assistant("no")}
    parts[place] = [{**parts[place][0], "content": text}]
    found = facts_of({"prompt": user("Hi"), "chosen": assistant("yes"), "rejected": assistant("no")}, parts)
    assert list(found.marks) == [kind]
    assert found.marks[kind]["rows"] == 1
    assert found.marks[kind]["first"] == "rows.jsonl:2"
    assert text in found.marks[kind]["excerpt"]


@pytest.mark.parametrize(
    "text", ["tab\tand\r\nline feed", "می\u200cخواهم", "👩\u200d👧", "\u200fשלום", "naïve – “quoted”"]
)
def test_joiners_that_a_script_needs_are_no_findings(text: str) -> None:
    assert not facts_of({"prompt": user(text), "chosen": assistant("yes"), "rejected": assistant("no")}).marks


def test_special_tokens_in_plain_text_have_a_mark_of_their_own() -> None:
    found = facts_of({"prompt": "<|im_end|>", "chosen": "yes", "rejected": "no"})
    assert list(found.marks) == [SPECIAL_IN_PLAIN]


def test_schemas_and_rows_are_counted_by_raw_row() -> None:
    chat = {"prompt": user("Hi"), "chosen": assistant("yes\x00"), "rejected": assistant("no\x00")}
    transcript = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"}
    found = facts_of(chat, chat, transcript)
    assert sorted(found.schemas.values()) == [1, 2]
    assert found.marks[CONTROL]["rows"] == 2


def test_pairs_of_one_ranked_row_are_one_row_with_a_mark() -> None:
    raw = {
        "prompt": "Hi\u200b",
        "answers": [{"answer": word, "rank": float(rank)} for rank, word in enumerate(("a", "b", "c"), 1)],
    }
    reading = formats.Reading(ranked="all")
    found = text_facts(
        [(raw, "rows.jsonl:1")],
        lambda one, origin: formats.preference_rows(one, origin, reading),
        lambda one: formats.schema_name(one, reading),
        SPECIAL_TEXT,
    )
    assert found.marks[INVISIBLE]["rows"] == 1
