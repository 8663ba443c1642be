"""Worked examples with ids written down by hand, and properties over random rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jdpo.data.schemas.formats import EMPTY_SIDE, Dropped
from jdpo.data.schemas.turn_marks import take_marks
from jdpo.data.tokens import boundaries, prompt_end, row_rendering, tokenize, turns
from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair, tokenize_pairs, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_completion, tokenize_pair

WORDS = ["user", "assistant", "system", "\n", "Hi", "Hello", " there", "Bye", ".", "Sky", " is", " blue", " green"]
UNK, BOS, EOS, USER, ASSISTANT, SYSTEM, NL, HI, HELLO, THERE, BYE, DOT, SKY, IS, BLUE, GREEN, START, END = range(18)
"""Ids of `load_with_bos`; <|im_start|> and <|im_end|> come with chatml."""

LLAMA_2_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'user\n' + m['content'] + '\n' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def pair(prompt: str | list[Message], chosen: str, rejected: str) -> PreferenceRow:
    if isinstance(prompt, str):
        return PreferenceRow(prompt, chosen, rejected, "x:1")
    return PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)], "x:1")


def as_lists(result: KeptPair | Dropped) -> tuple[list[int], list[int], list[int]]:
    assert isinstance(result, KeptPair), result
    row = result.row
    assert [ids.dtype for ids in row[:3]] == [np.int32] * 3
    return row.prompt_ids.tolist(), row.chosen_ids.tolist(), row.rejected_ids.tolist()


def masked(result: KeptCompletion | Dropped) -> tuple[list[int], list[int]]:
    assert isinstance(result, KeptCompletion), result
    assert result.row.completion_mask.dtype == np.bool_
    return result.row.tokens.tolist(), result.row.completion_mask.astype(int).tolist()


def every_turn(row: CompletionRow, tokenizer: Tokenizer, **lengths: Any) -> KeptCompletion | Dropped:
    """Returns the single sequence of a row with every turn learnt."""
    ((result,),) = tokenize_turns([row], tokenizer, **lengths)
    return result


@pytest.fixture
def load_with_bos(word_level: Callable[..., Path]) -> Callable[..., Tokenizer]:
    def load(chat_template: str | None = None, own: str | None = None) -> Tokenizer:
        specials = {"bos_token": "<s>", "eos_token": "</s>"}
        folder = word_level(WORDS, specials=specials, adds_bos=True, chat_template=own)
        return load_tokenizer(folder, chat_template=chat_template)

    return load


@pytest.fixture
def with_bos(load_with_bos: Callable[..., Tokenizer]) -> Tokenizer:
    """A tokenizer that starts plain text with BOS and has no chat template."""
    return load_with_bos()


@pytest.fixture
def chatml(load_with_bos: Callable[..., Tokenizer]) -> Tokenizer:
    return load_with_bos("chatml")


def test_a_conversation_with_bos(chatml: Tokenizer) -> None:
    result = tokenize_pair(pair([user("Hi there")], "Hello", "Bye."), chatml, max_length=64)
    assert as_lists(result) == (
        [BOS, START, USER, NL, HI, THERE, END, NL, START, ASSISTANT, NL],
        [HELLO, END, NL],
        [BYE, DOT, END, NL],
    )
    assert isinstance(result, KeptPair)
    assert (result.notes, result.row.origin) == ((), "x:1")


def test_a_conversation_without_bos(word_level: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(word_level(WORDS), chat_template="chatml")
    unk, eos, user_, assistant_, _, nl, hi, hello, _, bye = range(10)
    start, end = len(WORDS) + 2, len(WORDS) + 3
    assert as_lists(tokenize_pair(pair([user("Hi")], "Hello", "Bye?"), tokenizer, max_length=64)) == (
        [start, user_, nl, hi, end, nl, start, assistant_, nl],
        [hello, end, nl],
        [bye, unk, end, nl],
    )
    assert eos not in tokenizer.encode(["<|im_end|>"])[0]


def test_earlier_assistant_turns_belong_to_the_prompt(chatml: Tokenizer) -> None:
    history = [{"role": "system", "content": "."}, user("Hi"), assistant("Hello"), user("Bye")]
    assert as_lists(tokenize_pair(pair(history, "Bye", "."), chatml, max_length=64)) == (
        [
            *[BOS, START, SYSTEM, NL, DOT, END, NL],
            *[START, USER, NL, HI, END, NL],
            *[START, ASSISTANT, NL, HELLO, END, NL],
            *[START, USER, NL, BYE, END, NL, START, ASSISTANT, NL],
        ],
        [BYE, END, NL],
        [DOT, END, NL],
    )


def test_a_template_that_ends_with_eos(load_with_bos: Callable[..., Tokenizer]) -> None:
    tokenizer = load_with_bos(own=LLAMA_2_LIKE)
    assert tokenizer.pad_token_id == EOS  # pad is EOS, yet the real EOS below is learnt
    assert as_lists(tokenize_pair(pair([user("Hi")], "Hello", "Bye"), tokenizer, max_length=64)) == (
        [BOS, USER, NL, HI, NL],
        [HELLO, EOS],
        [BYE, EOS],
    )


def test_a_second_bos_is_taken_away(load_with_bos: Callable[..., Tokenizer]) -> None:
    tokenizer = load_with_bos(own="{{ bos_token }}" + LLAMA_2_LIKE)
    prompt, _, _ = as_lists(tokenize_pair(pair([user("Hi")], "Hello", "Bye"), tokenizer, max_length=64))
    assert prompt == [BOS, USER, NL, HI, NL]


def test_plain_text_has_bos_at_the_start_and_eos_at_the_end(with_bos: Tokenizer) -> None:
    result = tokenize_pair(pair("Sky is", " blue", " green.</s>"), with_bos, max_length=64)
    assert as_lists(result) == ([BOS, SKY, IS], [BLUE, EOS], [GREEN, DOT, EOS])
    assert isinstance(result, KeptPair)
    assert result.notes == ()


def test_plain_text_that_spells_bos_out_has_one(with_bos: Tokenizer) -> None:
    assert as_lists(tokenize_pair(pair("<s>Sky", " is", "."), with_bos, max_length=64))[0] == [BOS, SKY]


def test_an_empty_plain_prompt_is_only_bos(with_bos: Tokenizer, byte_level: Path) -> None:
    assert as_lists(tokenize_pair(pair("", "Hi", "Bye"), with_bos, max_length=64)) == ([BOS], [HI, EOS], [BYE, EOS])
    without_bos = load_tokenizer(byte_level, chat_template=None)
    assert tokenize_pair(pair("", "Hi", "Bye"), without_bos, max_length=64) == Dropped(boundaries.EMPTY_PROMPT, "x:1")


def test_plain_text_does_not_merge_across_the_boundary_and_is_noted(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level, chat_template=None)
    (capital,) = tokenizer.encode([" capital"])
    assert len(capital) == 1, "the training text of the fixture makes this one token"
    result = tokenize_pair(pair("The cap", "ital", "tain"), tokenizer, max_length=64)
    prompt, chosen, _ = as_lists(result)
    assert isinstance(result, KeptPair)
    assert capital[0] not in prompt + chosen
    assert tokenizer.hf.decode(prompt) == "The cap"
    assert result.notes == (boundaries.WOULD_MERGE,)
    clean = tokenize_pair(pair("The capital", " of", " is"), tokenizer, max_length=64)
    assert isinstance(clean, KeptPair)
    assert clean.notes == ()


def test_sentencepiece_sides_follow_the_prompt_without_a_space(metaspace: Path) -> None:
    tokenizer = load_tokenizer(metaspace, chat_template=None)
    prompt, chosen, rejected = as_lists(tokenize_pair(pair("is ", "Paris", " Dublin"), tokenizer, max_length=64))
    assert (prompt[0], chosen[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.hf.decode(prompt[1:] + chosen[:-1]) == "is Paris"
    assert tokenizer.hf.decode(prompt[1:] + rejected[:-1]) == "is  Dublin"


@pytest.mark.parametrize(
    ("max_length", "chosen", "rejected", "is_cut"),
    [
        (15, [HELLO, THERE, END, NL], [BYE, END, NL], False),
        (14, [HELLO, THERE, END], [BYE, END, NL], True),
        (13, [HELLO, THERE], [BYE, END], True),
        (12, [HELLO], [BYE], True),
    ],
)
def test_a_completion_is_cut_from_its_right_and_gains_no_eos(
    chatml: Tokenizer, max_length: int, chosen: list[int], rejected: list[int], is_cut: bool
) -> None:
    result = tokenize_pair(pair([user("Hi there")], "Hello there", "Bye"), chatml, max_length=max_length)
    assert as_lists(result)[1:] == (chosen, rejected)
    assert isinstance(result, KeptPair)
    assert result.notes == ((tokenize.COMPLETION_CUT,) if is_cut else ())


def test_a_cut_plain_completion_has_no_eos(with_bos: Tokenizer) -> None:
    row = pair("Sky is", " blue.", " green")
    assert as_lists(tokenize_pair(row, with_bos, max_length=6))[1:] == ([BLUE, DOT, EOS], [GREEN, EOS])
    assert as_lists(tokenize_pair(row, with_bos, max_length=5))[1:] == ([BLUE, DOT], [GREEN, EOS])
    assert as_lists(tokenize_pair(row, with_bos, max_length=4))[1:] == ([BLUE], [GREEN])


@pytest.mark.parametrize(
    ("max_prompt_length", "prompt"),
    [(4, [BOS, HI, THERE, DOT]), (3, [BOS, THERE, DOT]), (2, [BOS, DOT]), (1, [BOS])],
)
def test_a_prompt_is_cut_from_its_left_and_keeps_bos(
    with_bos: Tokenizer, max_prompt_length: int, prompt: list[int]
) -> None:
    result = tokenize_pair(pair("Hi there.", "Hi", "Bye"), with_bos, max_length=64, max_prompt_length=max_prompt_length)
    assert as_lists(result) == (prompt, [HI, EOS], [BYE, EOS])
    assert isinstance(result, KeptPair)
    assert result.notes == (() if max_prompt_length == 4 else (tokenize.PROMPT_CUT,))


def test_a_prompt_without_bos_is_cut_to_its_end(word_level: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(word_level(["a", " b", " c", " d"]), chat_template=None)
    row = pair("a b c d", "a", " b")
    assert as_lists(tokenize_pair(row, tokenizer, max_length=64, max_prompt_length=2))[0] == [4, 5]


@pytest.mark.parametrize(
    ("row", "max_length", "reason"),
    [
        (pair([user("Hi")], "", "Bye"), 64, EMPTY_SIDE),
        (pair([user("Hi")], "Hi", " \n"), 64, EMPTY_SIDE),
        (pair("Hi", "", "Bye"), 64, EMPTY_SIDE),
        (pair([user("Hi")], "Bye", "Bye"), 64, boundaries.IDENTICAL_SIDES),
        (pair("Hi", "what", "that"), 64, boundaries.IDENTICAL_SIDES),  # both are <unk>
        (pair([], "Bye", "Hi"), 64, boundaries.EMPTY_PROMPT),
        (pair([user("Hi")], "Bye", "Hello"), 10, tokenize.LONG_PROMPT),
        (pair([user("Hi")], "Bye", "Hello"), 5, tokenize.LONG_PROMPT),
        (pair([user("Hi")], "Bye there", "Bye."), 11, tokenize.IDENTICAL_AFTER_CUT),
    ],
)
def test_pairs_with_nothing_to_learn_are_dropped_with_the_reason(
    chatml: Tokenizer, row: PreferenceRow, max_length: int, reason: str
) -> None:
    assert tokenize_pair(row, chatml, max_length=max_length) == Dropped(reason, "x:1")


def test_a_shorter_common_prefix_is_taken_and_counted(load_with_bos: Callable[..., Tokenizer]) -> None:
    # The generation prompt is longer than the conversation's own header, as in templates with an empty thought.
    tokenizer = load_with_bos(
        own="{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n..' }}{% endif %}"
    )
    result = tokenize_pair(pair([user("Hi")], "Hello", ".Bye"), tokenizer, max_length=64)
    assert as_lists(result) == ([USER, NL, HI, EOS, ASSISTANT, NL], [HELLO, EOS], [DOT, BYE, EOS])
    assert isinstance(result, KeptPair)
    assert result.notes == (prompt_end.PROMPT_SHORTENED,)


def test_a_conversation_without_a_template_is_an_error(with_bos: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"x:1 is a conversation, .* no chat template; give --chat_template chatml"):
        tokenize_pair(pair([user("Hi")], "Hello", "Bye"), with_bos, max_length=64)


def test_a_row_that_the_template_refuses_is_dropped(load_with_bos: Callable[..., Tokenizer]) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    rows = [
        pair([{"role": "system", "content": "."}, user("Hi")], "Hello", "Bye"),
        pair([user("Hi")], "Hello", "Bye"),
    ]
    refused, kept = tokenize_pairs(rows, load_with_bos(own=refuse + LLAMA_2_LIKE), max_length=64)
    assert refused == Dropped(row_rendering.REFUSED, "x:1", "no system turns")
    assert isinstance(kept, KeptPair)


def test_rows_of_both_kinds_keep_their_order(chatml: Tokenizer) -> None:
    rows = [pair("Hi", "Bye", "."), pair([user("Hi")], "Bye", "."), pair("Hi", "", "."), pair("Sky", " is", ".")]
    together = tokenize_pairs(rows, chatml, max_length=64)
    for row, result in zip(rows, together, strict=True):
        alone = tokenize_pair(row, chatml, max_length=64)
        assert alone == result if isinstance(result, Dropped) else as_lists(alone) == as_lists(result)


def test_the_last_turn_is_learnt(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant("Bye.")], "x:1")
    tokens, mask = masked(tokenize_completion(row, chatml, max_length=64))
    assert tokens == [
        *[BOS, START, USER, NL, HI, END, NL, START, ASSISTANT, NL, HELLO, END, NL],
        *[START, USER, NL, BYE, END, NL, START, ASSISTANT, NL, BYE, DOT, END, NL],
    ]
    assert mask == [0] * 22 + [1, 1, 1, 1]


def test_every_assistant_turn_is_learnt(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant("Bye.")], "x:1")
    result = every_turn(row, chatml, max_length=64)
    tokens, mask = masked(result)
    assert tokens == masked(tokenize_completion(row, chatml, max_length=64))[0]
    assert [token for token, learnt in zip(tokens, mask, strict=True) if learnt] == [HELLO, END, NL, BYE, DOT, END, NL]
    assert mask == [0] * 10 + [1, 1, 1] + [0] * 9 + [1, 1, 1, 1]


def test_history_alone_is_enough_for_assistant_turns(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant("Bye.")], "x:1")
    tokens, mask = masked(every_turn(row, chatml, max_length=12))
    assert (tokens[-2:], mask) == ([HELLO, END], [0] * 10 + [1, 1])
    assert tokenize_completion(row, chatml, max_length=12) == Dropped(tokenize.LONG_PROMPT, "x:1")


def test_turns_that_are_written_differently_later_are_sequences_of_their_own(
    load_with_bos: Callable[..., Tokenizer],
) -> None:
    # Only the last assistant turn keeps its dot, as in Qwen 3 only the last one keeps its thought.
    tokenizer = load_with_bos(
        own="{% for m in messages %}{{ m['role'] + '\n' + ('.' if loop.last and m['role'] == 'assistant' else '') "
        "+ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    short = CompletionRow([user("Hi")], [assistant("Bye")], "x:1")
    long = CompletionRow([user("Hi"), assistant("Bye"), user("Hi")], [assistant("Bye")], "x:2")
    one, two = tokenize_turns([short, long], tokenizer, max_length=64)
    assert [masked(result)[0][-3:] for result in one] == [[DOT, BYE, EOS]]
    assert [masked(result) for result in two] == [
        masked(tokenize_completion(short, tokenizer, max_length=64)),
        masked(tokenize_completion(long, tokenizer, max_length=64)),
    ]


def test_plain_text_is_learnt_alike_under_both_options(with_bos: Tokenizer) -> None:
    row = CompletionRow("Sky is", " blue", "x:1")
    for tokenize_one in (tokenize_completion, every_turn):
        assert masked(tokenize_one(row, with_bos, max_length=64)) == ([BOS, SKY, IS, BLUE, EOS], [0, 0, 0, 1, 1])


@pytest.mark.parametrize("tokenize_one", [tokenize_completion, every_turn])
@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "reason"),
    [
        ([user("Hi")], " ", 64, EMPTY_SIDE),
        ([], "Hi", 64, boundaries.EMPTY_PROMPT),
        ([user("Hi")], "Bye", 10, tokenize.LONG_PROMPT),
    ],
)
def test_supervised_rows_with_nothing_to_learn_are_dropped(
    chatml: Tokenizer, tokenize_one: Any, prompt: list[Message], completion: str, max_length: int, reason: str
) -> None:
    row = CompletionRow(prompt, [assistant(completion)], "x:1")
    assert tokenize_one(row, chatml, max_length=max_length) == Dropped(reason, "x:1")


def test_an_assistant_that_speaks_first_is_not_learnt(chatml: Tokenizer) -> None:
    row = CompletionRow([assistant("Hi"), user("Hi")], [assistant("Bye")], "x:1")
    result = every_turn(row, chatml, max_length=64)
    tokens, mask = masked(result)
    assert [token for token, learnt in zip(tokens, mask, strict=True) if learnt] == [BYE, END, NL]
    assert result.notes == (turns.LEFT_OUT + boundaries.EMPTY_PROMPT,)


def test_turns_before_one_that_cannot_be_learnt_are_learnt(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant(" ")], "x:1")
    first = CompletionRow([user("Hi")], [assistant("Hello")], "x:1")
    result = every_turn(row, chatml, max_length=64)
    assert masked(result) == masked(tokenize_completion(first, chatml, max_length=64))
    assert isinstance(result, KeptCompletion)
    assert result.notes == (turns.LEFT_OUT + EMPTY_SIDE,)


def shown(content: str) -> Message:
    return take_marks(assistant(content), {"weight": 0}, "messages[1]", "x:1")


def test_a_turn_that_is_marked_as_shown_is_not_learnt(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), shown("Hello"), user("Bye")], [assistant("Bye")], "x:1")
    plain = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant("Bye")], "x:1")
    result = every_turn(row, chatml, max_length=64)
    assert masked(result) == masked(tokenize_completion(plain, chatml, max_length=64))
    assert result.notes == (turns.SHOWN_TURN,)


def test_turns_after_the_last_learnt_turn_are_left_out(chatml: Tokenizer) -> None:
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [shown("Bye")], "x:1")
    first = CompletionRow([user("Hi")], [assistant("Hello")], "x:1")
    assert masked(every_turn(row, chatml, max_length=64)) == masked(tokenize_completion(first, chatml, max_length=64))
    dropped = Dropped(turns.NOT_LEARNT, "x:1")
    assert tokenize_completion(row, chatml, max_length=64) == dropped
    nothing = CompletionRow([user("Hi"), shown("Hello"), user("Bye")], [shown("Bye")], "x:1")
    assert every_turn(nothing, chatml, max_length=64) == dropped


def test_a_pair_with_a_side_that_is_shown_only_is_dropped(chatml: Tokenizer) -> None:
    for sides in (([shown("Hi")], [assistant("Bye")]), ([assistant("Hi")], [shown("Bye")])):
        row = PreferenceRow([user("Hi")], *sides, "x:1")
        assert tokenize_pair(row, chatml, max_length=64) == Dropped(turns.NOT_LEARNT, "x:1")
    row = PreferenceRow([user("Hi"), shown("Hi"), user("Hi")], [assistant("Hi")], [assistant("Bye")], "x:1")
    assert isinstance(tokenize_pair(row, chatml, max_length=64), KeptPair)


def test_a_supervised_prompt_is_cut_from_its_left(with_bos: Tokenizer) -> None:
    row = CompletionRow("Hi there.", "Hello there", "x:1")
    result = tokenize_completion(row, with_bos, max_length=4, max_prompt_length=2)
    assert masked(result) == ([BOS, DOT, HELLO, THERE], [0, 0, 1, 1])
    assert isinstance(result, KeptCompletion)
    assert result.notes == (tokenize.PROMPT_CUT, tokenize.COMPLETION_CUT)


TEXT = st.text(alphabet="Paris Dublin<|im_end|>\né", max_size=12)
LENGTHS = st.tuples(st.integers(4, 80), st.none() | st.integers(1, 40))


@pytest.fixture(scope="module")
def byte_chatml(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, lengths=LENGTHS, is_chat=st.booleans())
def test_truncation_takes_a_prefix_of_the_whole_sequence(
    byte_chatml: Tokenizer, prompt: str, chosen: str, rejected: str, lengths: tuple[int, int | None], is_chat: bool
) -> None:
    row = pair([user(prompt)] if is_chat else prompt, chosen, rejected)
    max_length, max_prompt_length = lengths
    whole = tokenize_pair(row, byte_chatml, max_length=10_000)
    cut = tokenize_pair(row, byte_chatml, max_length=max_length, max_prompt_length=max_prompt_length)
    if isinstance(whole, Dropped):
        assert isinstance(cut, Dropped)
        return
    if isinstance(cut, Dropped):
        assert cut.reason in (tokenize.LONG_PROMPT, tokenize.IDENTICAL_AFTER_CUT)
        return
    all_prompt, *all_sides = as_lists(whole)
    kept_prompt, *kept_sides = as_lists(cut)
    assert kept_prompt == all_prompt[len(all_prompt) - len(kept_prompt) :]
    assert len(kept_prompt) == min(len(all_prompt), max_prompt_length or len(all_prompt))
    assert (tokenize.PROMPT_CUT in cut.notes) == (len(kept_prompt) < len(all_prompt))
    budget = max_length - len(kept_prompt)
    for all_ids, kept_ids in zip(all_sides, kept_sides, strict=True):
        # A prefix: no EOS can have been added to what was cut.
        assert kept_ids == all_ids[:budget]
        assert 0 < len(kept_ids) <= budget
    assert (tokenize.COMPLETION_CUT in cut.notes) == any(len(side) > budget for side in all_sides)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_turns_are_found_by_token_prefix(byte_chatml: Tokenizer, texts: list[str]) -> None:
    messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]
    row = CompletionRow(messages[:-1], messages[-1:], "x:1")
    last = tokenize_completion(row, byte_chatml, max_length=10_000)
    every = every_turn(row, byte_chatml, max_length=10_000)
    tokens, mask = masked(every)
    (rendered,) = byte_chatml.encode([byte_chatml.render(messages)])
    assert tokens == rendered == masked(last)[0]
    learnt = byte_chatml.hf.decode([token for token, on in zip(tokens, mask, strict=True) if on])
    assert learnt == "".join(text + "<|im_end|>\n" for text in texts[1::2])
    assert masked(last)[1] == [0] * sum(not on for on in masked(last)[1]) + [1] * sum(masked(last)[1])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, completion=TEXT.filter(str.strip))
def test_plain_text_reads_as_it_was_written(byte_chatml: Tokenizer, prompt: str, completion: str) -> None:
    result = tokenize_completion(CompletionRow(prompt, completion, "x:1"), byte_chatml, max_length=10_000)
    if not prompt:
        assert result == Dropped(boundaries.EMPTY_PROMPT, "x:1")
        return
    tokens, mask = masked(result)
    end = byte_chatml.eos_token_id
    assert byte_chatml.hf.decode(tokens) == prompt + completion.removesuffix("<|im_end|>") + "<|im_end|>"
    assert (tokens[-1], mask[-1], mask[0]) == (end, 1, 0)
    split = mask.index(1)
    assert byte_chatml.hf.decode(tokens[:split]) == prompt
    assert all(mask[split:])


def test_a_template_that_thinks_in_the_last_turn_only(load_with_bos: Callable[..., Tokenizer]) -> None:
    thinking = (
        "{% for m in messages %}{{ m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}{{ '.\n' }}"
        "{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tokenizer = load_with_bos(own=thinking)
    row = CompletionRow([user("Hi"), assistant("Hello"), user("Bye")], [assistant("Bye")], "x:1")
    found = [masked(result) for result in tokenize_turns([row], tokenizer, max_length=64)[0]]
    learnt = [[token for token, on in zip(*sequence, strict=True) if on] for sequence in found]
    assert learnt == [[DOT, NL, HELLO, EOS], [DOT, NL, BYE, EOS]]
    assert DOT not in found[1][0][: found[1][1].index(1)]  # the history is rendered as at inference
    assert found[1] == masked(tokenize_completion(row, tokenizer, max_length=64))


def test_a_row_that_an_expression_of_the_template_breaks_on(load_with_bos: Callable[..., Tokenizer]) -> None:
    numbered = "{% for m in messages %}{{ m['content'] + ('\\n' if m['content'] != 'Bye' else 1) }}{% endfor %}"
    rows = [pair([user(words)], "Hello", ".") for words in ("Hi", "Bye")]
    kept, dropped = tokenize_pairs(rows, load_with_bos(own=numbered), max_length=64)
    assert isinstance(kept, KeptPair)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.detail[:11]) == (row_rendering.REFUSED, "TypeError: ")


@pytest.mark.parametrize("tokenize_one", [tokenize_completion, every_turn])
def test_half_a_surrogate_pair_in_text_or_in_a_further_key(
    load_with_bos: Callable[..., Tokenizer], tokenize_one: Any
) -> None:
    with_names = "{% for m in messages %}{{ m['name'] + m['content'] }}{% endfor %}"
    tokenizer = load_with_bos(own=with_names)
    for prompt, completion in (
        ("Hi", "\ud83d"),
        ("\ud83d", "Hi"),
        ([user("Hi") | {"name": ""}], [assistant("Hello") | {"name": "\ud83d"}]),
    ):
        row = CompletionRow(prompt, completion, "x:1")
        result = tokenize_one(row, tokenizer, max_length=64)
        assert result == Dropped("text that is not Unicode", "x:1")
