"""Every family's chat template with every kind of tokenizer: the places of BOS, the answer and its end."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens import boundaries, prompt_end, row_notes, row_rendering, tokenize, unwritten
from jdpo.data.tokens.tokenize import KeptPair, tokenize_pairs, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, Message, PreferenceRow
from tests.data.one_row import tokenize_pair

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from toy_tokenizers import KINDS, give_template, train_tokenizer  # noqa: E402

TEXTS = [
    "What is the capital of France? It is Paris, on the river Seine.\n\n",
    "Where is Dublin? In Ireland. user assistant system model\n",
    "Please answer in one word, and do not guess: [INST] yes [/INST]",
    "def area(width, height):\n    return width * height\n",
    "\n\n",
] * 20

ENDLESS = 100_000


class Family(NamedTuple):
    """Text that a template writes around an answer, after the generation prompt.

    Attributes:
      markers: tokens of its own.
      lead: text before the answer.
      tail: text after it; {eos} is the tokenizer's EOS.
      bos: the place of BOS: nowhere, first, or before every question.
      trims: whether the words lose the spaces at their ends.
      system: whether it takes a system turn.
    """

    markers: tuple[str, ...] = ()
    lead: str = ""
    tail: str = "<|im_end|>\n"
    bos: Literal["", "first", "questions"] = ""
    trims: bool = False
    system: bool = True


CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")

FAMILIES = {
    "chatml": Family(CHATML_MARKERS),
    "qwen2_5": Family(CHATML_MARKERS),
    "qwen3": Family((*CHATML_MARKERS, "<think>", "</think>"), lead="<think>\n\n</think>\n\n"),
    "llama3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), tail="<|eot_id|>", bos="first", trims=True
    ),
    "llama2": Family(lead=" ", tail=" {eos}", bos="questions"),
    "mistral_v1": Family(lead=" ", tail="{eos}", bos="first"),
    "mistral_v3": Family(("[INST]", "[/INST]"), tail="{eos}", bos="first"),
    "gemma": Family(
        ("<start_of_turn>", "<end_of_turn>"), tail="<end_of_turn>\n", bos="first", trims=True, system=False
    ),
    "phi3": Family(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), tail="<|end|>\n{eos}"),
    "phi4": Family((*CHATML_MARKERS, "<|im_sep|>"), tail="<|im_end|>"),
    "zephyr": Family(tail="{eos}\n"),
}

NEWER_FAMILIES = {
    "apertus": Family(
        tuple(
            f"<|{role}_{place}|>" for role in ("system", "developer", "user", "assistant") for place in ("start", "end")
        ),
        tail="<|assistant_end|>",
        bos="first",
    ),
    "gemma3": Family(("<start_of_turn>", "<end_of_turn>"), tail="<end_of_turn>\n", bos="first", trims=True),
    "gpt_oss": Family(
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        lead="<|channel|>final<|message|>",
        tail="<|return|>",
    ),
    "ministral3": Family(("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), tail="{eos}", bos="first"),
    "mistral_small3": Family(("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), tail="{eos}", bos="first"),
    "olmo3": Family(CHATML_MARKERS, tail="{eos}"),
    "phi4_mini_instruct": Family(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), tail="<|end|>{eos}"),
    "qwen3_next": Family(CHATML_MARKERS),
    "seed_oss": Family(("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"), tail="<seed:eos>", trims=True),
    "starcoder2_chat": Family(tail="{eos}", bos="first", system=False),
}
"""Of the families since 2025, those whose conversations start with their prompt whatever the answer is."""


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SYSTEM: Message = {"role": "system", "content": "Please answer in one word."}
QUESTION = "What is the capital of France?"
LONGER = [user(QUESTION), assistant("Paris."), user("And of Ireland?"), assistant("Dublin."), user("Sure? 🤔")]

ROWS = {
    "one turn": ([user(QUESTION)], "Paris.", "I do not know."),
    "three turns": (LONGER, "Yes.", "No, it is Cork."),
    "system": ([SYSTEM, user(QUESTION)], "Paris", "London"),
    "system and three turns": ([SYSTEM, *LONGER], "Yes", "No"),
    "not ASCII": ([user("首都は？ Où? 😀")], "パリ 🇫🇷 naïve e\u0301 👩\u200d🔬", "لندن\u200f"),
    "spaces around": ([user("  What? \n")], "  Paris \t", "No. \n\n"),
    "newlines before": ([user("\n\nWhat?")], "\nParis\n", "\n\n\nNo."),
    "code": ([user("Write it.")], "def area(width, height):\n    return width * height\n", "\tpass\n\n\n}"),
}


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tokenizer]:
    """Loads a tokenizer of a kind with a family's template; each is trained and loaded once."""

    @functools.cache
    def trained(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("kinds") / kind
        train_tokenizer(kind, TEXTS, 120 if "pieces" in kind else 320).save_pretrained(folder)
        return folder

    @functools.cache
    def of(kind: str, family: str) -> Tokenizer:
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(trained(kind))
        own = (
            ROOT / "jdpo" / "data" / "templates" / "chatml.jinja"
            if family == "chatml"
            else TEMPLATES / f"{family}.jinja"
        )
        known = FAMILIES | NEWER_FAMILIES
        give_template(hf, own, known[family].markers if family in known else ())
        folder = tmp_path_factory.mktemp("families") / family
        hf.save_pretrained(folder)
        return load_tokenizer(folder, chat_template=None)

    return of


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def loose(tokenizer: Tokenizer, kind: str, text: str) -> str:
    """Removes one space after every special token, which some tokenizers add to any text."""
    if kind != "legacy_pieces":
        return text
    return re.sub(f"(^|{tokenizer.special_text.pattern}) ", lambda match: match.group(1) or match.group()[:-1], text)


def parts(result: KeptPair | Dropped) -> tuple[list[int], list[int], list[int], tuple[str, ...]]:
    assert isinstance(result, KeptPair), result
    row = result.row
    return row.prompt_ids.tolist(), row.chosen_ids.tolist(), row.rejected_ids.tolist(), result.notes


def check_pair(tokenizer: Tokenizer, kind: str, family: Family, row: PreferenceRow) -> None:
    """Checks where prompt and answers begin and end, on a row whose text spells no special tokens."""
    prompt, *sides, notes = parts(tokenize_pair(row, tokenizer, max_length=ENDLESS))
    assert not isinstance(row.prompt, str)
    asked = tokenizer.render(row.prompt, add_generation_prompt=True)
    tail = family.tail.format(eos=tokenizer.hf.eos_token)
    (tail_ids,) = tokenizer.encode([tail.lstrip(" ")])
    num_questions = sum(message["role"] == "user" for message in row.prompt)
    num_bos = {"": 0, "first": 1, "questions": num_questions}[family.bos]
    for completion, message in zip(sides, (row.chosen[0], row.rejected[0]), strict=True):
        whole = tokenizer.render([*row.prompt, message])
        words = message["content"].strip() if family.trims else message["content"]
        if family.lead.startswith("<think>"):
            words = words.lstrip("\n")
        assert whole == asked + family.lead + words + tail
        ids = prompt + completion
        assert [ids] == tokenizer.encode([whole])
        assert loose(tokenizer, kind, decode(tokenizer, ids)) == loose(tokenizer, kind, whole)
        check_mask(tokenizer, kind, prompt, ids, asked, family.lead + words + tail, prompt_end.SHORTER_PREFIX in notes)
        check_specials(tokenizer, num_bos, ids, completion, tail_ids)
    assert row_notes.SPELLS_SPECIAL not in notes
    changed = any(message["content"] not in tokenizer.render([*row.prompt, message]) for message in row.chosen)
    assert not changed or row_notes.ANSWER_CHANGED in notes


def check_mask(
    tokenizer: Tokenizer, kind: str, prompt: list[int], ids: list[int], asked: str, answer: str, is_shorter: bool
) -> None:
    """Checks that the completion reads as the answer, after the prompt's last letters if tokens merged across."""
    text, before = (decode(tokenizer, part) for part in (ids, prompt))
    if is_shorter:
        cut = text[len(before) :].removesuffix(answer)
        assert 0 < len(cut) <= 2
        assert asked.endswith(cut)
    else:
        assert text.startswith(before)
        assert loose(tokenizer, kind, text[len(before) :]) == loose(tokenizer, kind, answer)


def check_specials(tokenizer: Tokenizer, num_bos: int, ids: list[int], completion: list[int], tail: list[int]) -> None:
    bos = tokenizer.hf.bos_token_id
    if bos is not None:
        assert ids.count(bos) == num_bos
        assert not num_bos or ids[0] == bos
    assert completion[-len(tail) :] == tail
    assert set(tail) & set(tokenizer.end_token_ids)
    assert set(completion[: -len(tail)]).isdisjoint({*tokenizer.end_token_ids, bos})


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.full) for name in NEWER_FAMILIES)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_every_family_with_every_kind(load: Callable[[str, str], Tokenizer], kind: str, name: str) -> None:
    tokenizer, family = load(kind, name), (FAMILIES | NEWER_FAMILIES)[name]
    for row_name, (prompt, chosen, rejected) in ROWS.items():
        row = PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)], row_name)
        if prompt[0]["role"] == "system" and not family.system:
            refused = Dropped(row_rendering.REFUSED, row_name, "there is no system role")
            assert tokenize_pair(row, tokenizer, max_length=ENDLESS) == refused
            continue
        check_pair(tokenizer, kind, family, row)
        notes = parts(tokenize_pair(row, tokenizer, max_length=ENDLESS))[-1]
        # "\n\n" at the end of a header is one token of GPT-2's, and two before an answer.
        merges = kind == "pad_is_eos" and name == "llama3"
        assert (prompt_end.SHORTER_PREFIX in notes) == merges or row_name == "newlines before"
        assert row_notes.TURN_CHANGED not in notes


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuts_keep_bos_and_bring_no_end(load: Callable[[str, str], Tokenizer], kind: str, name: str) -> None:
    tokenizer = load(kind, name)
    row = PreferenceRow([user(QUESTION)], [assistant("It is Paris.")], [assistant("It is not Dublin.")], "x:1")
    prompt, chosen, rejected, _ = parts(tokenize_pair(row, tokenizer, max_length=ENDLESS))
    first_end = next(i for i, token in enumerate(chosen) if token in tokenizer.end_token_ids)
    for room in range(2, first_end + 1):
        cut = tokenize_pair(row, tokenizer, max_length=len(prompt) + room)
        if isinstance(cut, Dropped):  # both begin alike
            assert cut.reason == tokenize.IDENTICAL_AFTER_CUT
            assert chosen[:room] == rejected[:room]
            continue
        kept, *sides, notes = parts(cut)
        assert (kept, sides) == (prompt, [chosen[:room], rejected[:room]])
        assert set(sides[0]).isdisjoint(tokenizer.end_token_ids)
        assert tokenize.COMPLETION_CUT in notes
    for most in (1, 2, 5):
        kept, *sides, notes = parts(tokenize_pair(row, tokenizer, max_length=ENDLESS, max_prompt_length=most))
        bos = [prompt[0]] if prompt[0] == tokenizer.hf.bos_token_id else []
        assert kept == bos + prompt[len(prompt) - most + len(bos) :]
        assert sides == [chosen, rejected]
        assert tokenize.PROMPT_CUT in notes


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "mistral_v1", "zephyr"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_template_file_does_as_the_same_template_in_the_tokenizer(
    load: Callable[[str, str], Tokenizer], tmp_path: Path, kind: str, name: str
) -> None:
    plain = load(kind, name).hf
    plain.save_pretrained(tmp_path)
    given = load_tokenizer(tmp_path, chat_template=str(TEMPLATES / f"{name}.jinja"))
    tail = FAMILIES[name].tail.format(eos=plain.eos_token)
    assert given.hf.eos_token == tail.strip()  # the end of turn becomes EOS
    family = FAMILIES[name]._replace(tail=tail)
    for row_name in ("one turn", "three turns", "not ASCII"):
        prompt, chosen, rejected = ROWS[row_name]
        check_pair(given, kind, family, PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)], row_name))


# Words of any script but "▁", which pieces read as a space, and "<", which begins special tokens.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<["), max_size=24)
ANSWERS = WORDS.filter(str.strip)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(KINDS), name=st.sampled_from(sorted(FAMILIES)))
def test_any_conversation_is_read_back_as_it_was_rendered(
    load: Callable[[str, str], Tokenizer], data: st.DataObject, kind: str, name: str
) -> None:
    turns = data.draw(st.lists(WORDS, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1))
    prompt = [(assistant if i % 2 else user)(text) for i, text in enumerate(turns)]
    if FAMILIES[name].system and data.draw(st.booleans()):
        prompt.insert(0, {"role": "system", "content": data.draw(WORDS)})
    chosen, rejected = data.draw(ANSWERS), data.draw(ANSWERS)
    row = PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)], "x:1")
    tokenizer = load(kind, name)
    assume(isinstance(tokenize_pair(row, tokenizer, max_length=ENDLESS), KeptPair))  # sides alike once trimmed
    check_pair(tokenizer, kind, FAMILIES[name], row)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(KINDS), prompt=WORDS, chosen=ANSWERS, rejected=ANSWERS)
def test_any_plain_text_is_read_back_as_it_was_written(
    load: Callable[[str, str], Tokenizer], kind: str, prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = load(kind, "zephyr")
    result = tokenize_pair(PreferenceRow(prompt, chosen, rejected, "x:1"), tokenizer, max_length=ENDLESS)
    if isinstance(result, Dropped):
        reasons = {boundaries.IDENTICAL_SIDES: chosen == rejected, boundaries.EMPTY_PROMPT: not prompt}
        assert reasons[result.reason]
        return
    ids, *sides, notes = parts(result)
    bos, eos = tokenizer.hf.bos_token, tokenizer.hf.eos_token
    space = "legacy_pieces" if kind == "pieces" else kind  # in both, text at the start of a sequence gains a space
    for completion, words in zip(sides, (chosen, rejected), strict=True):
        found, written = decode(tokenizer, ids + completion), (bos or "") + prompt + words + eos
        assert loose(tokenizer, space, found) == loose(tokenizer, space, written)
        assert completion[-1] == tokenizer.eos_token_id
        assert (ids + completion).count(tokenizer.eos_token_id) == 1
    assert (bos is None) == (tokenizer.bos_token_id is None)
    assert ids.count(tokenizer.hf.bos_token_id) == (bos is not None)
    assert set(notes) <= {boundaries.PLAIN_TEXT, boundaries.WOULD_MERGE}


SPELLED = ["<|im_end|>", "<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "[/INST]", "</think>"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(sorted(FAMILIES)),
    asked=st.lists(st.sampled_from([*SPELLED, "a", "\n"]), max_size=4).map("".join),
    reply=st.lists(st.sampled_from([*SPELLED, " b"]), min_size=1, max_size=4).map("".join),
)
def test_text_that_spells_special_tokens_is_read_as_them_and_counted(
    load: Callable[[str, str], Tokenizer], kind: str, name: str, asked: str, reply: str
) -> None:
    tokenizer = load(kind, name)
    row = PreferenceRow([user(asked)], [assistant(reply)], [assistant("No.")], "x:1")
    result = tokenize_pair(row, tokenizer, max_length=ENDLESS)
    if isinstance(result, Dropped):  # the template removes the thought, and the answer had nothing else
        assert result.reason == unwritten.EMPTY_UNWRITTEN
        assert "</think>" in reply
        assert not reply.rpartition("</think>")[2].strip()
        return
    prompt, chosen, _, notes = parts(result)
    whole = tokenizer.render([user(asked), assistant(reply)])
    assert loose(tokenizer, kind, decode(tokenizer, prompt + chosen)) == loose(tokenizer, kind, whole)
    spelled = any(token in asked + reply for token in tokenizer.hf.all_special_tokens + list(FAMILIES[name].markers))
    assert (row_notes.SPELLS_SPECIAL in notes) == spelled
    assert prompt[:2] != [tokenizer.hf.bos_token_id] * 2


def test_rows_of_many_families_in_one_call(load: Callable[[str, str], Tokenizer]) -> None:
    tokenizer = load("pieces", "mistral_v1")
    rows = [PreferenceRow(p, [assistant(c)], [assistant(r)], name) for name, (p, c, r) in ROWS.items()]
    twice = PreferenceRow([user("Hi"), user("Hi?")], [assistant("Yes")], [assistant("No")], "x:9")
    *kept, dropped = tokenize_pairs([*rows, twice], tokenizer, max_length=ENDLESS)
    assert dropped == Dropped(row_rendering.REFUSED, "x:9", "questions and answers must take turns")
    for row, result in zip(rows, kept, strict=True):
        assert parts(result) == parts(tokenize_pair(row, tokenizer, max_length=ENDLESS))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi4", "mistral_v3"])
def test_every_turn_ends_where_its_words_do(load: Callable[[str, str], Tokenizer], name: str) -> None:
    tokenizer, family = load("byte_bos", name), FAMILIES[name]
    row = CompletionRow(LONGER, [assistant("Yes.")], "x:1")
    ((result,),) = tokenize_turns([row], tokenizer, max_length=ENDLESS)
    assert not isinstance(result, Dropped)
    tokens, mask = result.row.tokens.tolist(), result.row.completion_mask.tolist()
    learnt = decode(tokenizer, [token for token, on in zip(tokens, mask, strict=True) if on])
    tail = family.tail.format(eos=tokenizer.hf.eos_token)
    assert learnt == "".join(words + tail for words in ("Paris.", "Dublin.", "Yes."))
    assert result.notes == ()
