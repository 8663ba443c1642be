"""Claim: under every chat template, exactly the answer is learnt, on exactly the prompt that inference gives it.

    python benchmarks/token_rules.py [--rows 200] [--templates llama3 qwen3] [--rule prefix] [--out report.md]

It takes a minute on two CPU cores. Every template of tests/data/templates, with thinking on and off where it has such
a switch, gets generated conversations (with system turns, tools, thoughts, several turns, and prompts that end with the
assistant) as preference pairs and, with `loss_on: assistant_turns`, as supervised rows. transformers renders them here,
without jdpo's own code, and the tokens that jdpo trains on are decoded and compared with those texts:

    prompt    the prompt reads as the template writes it with a generation prompt, or the row is reported as shortened
              and misses nothing but the end of the generation prompt
    answer    the completion contains the whole answer, or the row is reported
    foreign   the completion holds no word of another message, and no second generation header
    end       exactly one end of turn closes the answer
    whole     if the conversation starts with the prompt, the tokens are those of the rendered conversation
    dropped   such a row is kept, and under `assistant_turns` each such turn is learnt exactly once

The exit status is 1 if a check fails or a template keeps no row. `--rule prefix` replaces jdpo's rule by the common
token prefix of prompt and conversations, which learns words of the prompt: it must fail.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from token_rules_rows import WORD, Conversation, Message, conversations, words_of
from token_rules_templates import templates_of, with_switches
from toy_tokenizers import give_template, train_tokenizer

from jdpo.data.schemas.formats import Dropped
from jdpo.data.templates.chat_template import TEMPLATE_DAY
from jdpo.data.tokens import prompt_end, row_notes, unwritten
from jdpo.data.tokens.tokenize import tokenize_pairs, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import CompletionRow, PreferenceRow

CHECKS = ("prompt", "answer", "foreign", "end", "whole", "dropped")
MAX_LENGTH = 1_000_000
MOST_SHOWN = 5
"""Failures that are printed of each template at most."""

SHORTENED = {prompt_end.SHORTER_PREFIX, prompt_end.PROMPT_SHORTENED}
UNWRITTEN = {row_notes.ANSWER_CHANGED, *unwritten.UNWRITTEN.values()}
"""Notes that report a prompt whose end is lost, and an answer that the template does not write whole."""

_MARKER = re.compile(r"(?<!<)<[^<>\s'\"{}]*\w[^<>\s'\"{}]*>(?!>)|\[/?[A-Z_]+\]")
_TODAY = re.compile(r"strftime_now\('([^']*)'\)")
_PLAIN_MARKERS = ("llama2", "mistral_v1", "zephyr")
"""Templates whose markers are plain text to the tokenizer."""


class Stretch(NamedTuple):
    """Token ids that are learnt, and all ids of the sequence before them."""

    before: list[int]
    learnt: list[int]


class Turn(NamedTuple):
    """An assistant turn to learn, and the messages before it."""

    history: list[Message]
    answer: Message


class Result(NamedTuple):
    """The outcome of a row: stretches of text, or why it was dropped; and the notes about it."""

    stretches: list[Stretch]
    dropped: str
    notes: frozenset[str]


class Failure(NamedTuple):
    """A check that a row failed."""

    check: str
    origin: str
    what: str


class Renderer:
    """A tokenizer with its template, read by transformers without jdpo."""

    def __init__(self, hf: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.hf = hf
        self._kwargs = dict(kwargs or {})
        # transformers reads the clock, jdpo always writes the same day.
        self._template = _TODAY.sub(lambda found: repr(TEMPLATE_DAY.strftime(found[1])), hf.chat_template)

    def write(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str | None:
        """Renders a conversation with BOS at most once; returns None if the template refuses it."""
        try:
            text = self.hf.apply_chat_template(
                [_named_twice(message) for message in messages],
                chat_template=self._template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._kwargs,
            )
        except Exception:  # templates raise any exception of their expressions
            return None
        bos = self.hf.bos_token
        while bos and text.startswith(bos + bos):
            text = text.removeprefix(bos)
        return str(text)

    def encode(self, text: str) -> list[int]:
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), clean_up_tokenization_spaces=False))

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Finds special tokens and added markers."""
        tokens = sorted({*self.hf.all_special_tokens, *self.hf.get_added_vocab()}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)))

    @cached_property
    def question_markers(self) -> frozenset[str]:
        """The markers that a question is written with, such as the end of its turn."""
        return frozenset(self.markers.findall(self.write([{"role": "user", "content": "Hi"}], None) or ""))


def _named_twice(message: Message) -> Message:
    """Gives a thought both names that templates read."""
    return message | {"thinking": message["reasoning_content"]} if "reasoning_content" in message else message


class Texts(NamedTuple):
    """A turn as transformers writes it: the prompt, what follows it at inference, and the end of turn.

    Attributes:
      prompt: the history with the generation prompt.
      whole: the history and the answer.
      header: what the generation prompt adds to the history.
      end: the first special token after the answer's words that also ends a question; if there is none, the first
        special token after the words, or nothing.
    """

    prompt: str
    whole: str
    header: str
    end: str


def texts_of(turn: Turn, tools: Any, renderer: Renderer) -> Texts | None:
    """Renders a turn; returns None if the template refuses it."""
    prompt = renderer.write(turn.history, tools, prompt=True)
    whole = renderer.write([*turn.history, turn.answer], tools)
    if prompt is None or whole is None:
        return None
    bare = renderer.write(turn.history, tools) or ""
    same = next((i for i, (a, b) in enumerate(zip(prompt, bare, strict=False)) if a != b), min(len(prompt), len(bare)))
    found = [marker.group() for marker in renderer.markers.finditer(whole, end_of_answer(whole, turn.answer))]
    # Not the first one of all: it may only close a part of the turn, such as `<|END_RESPONSE|>`.
    end = next((marker for marker in found if marker in renderer.question_markers), found[0] if found else "")
    if end and end in prompt:  # some templates open the next answer after every conversation
        whole = whole.removesuffix(prompt.rpartition(end)[2].lstrip())
    return Texts(prompt, whole, prompt[same:], end)


def end_of_answer(text: str, answer: Message) -> int:
    """Returns where the last word of an answer ends in a text; the text's end if it has no such word."""
    words = words_of(answer)
    return max((found.end() for found in WORD.finditer(text) if found.group() in words), default=len(text))


def visible(answer: Message) -> str:
    """Returns the words of an answer after its thought."""
    return (answer["content"] or "").split("</think>")[-1].strip()


def is_plain_case(turn: Turn, texts: Texts) -> bool:
    """Returns whether the conversation starts with the prompt and then holds the whole answer, which has words."""
    answer, words = texts.whole.removeprefix(texts.prompt), words_of(turn.answer)
    return texts.whole.startswith(texts.prompt) and bool(words) and words <= set(WORD.findall(answer))


def check_stretch(turn: Turn, stretch: Stretch, texts: Texts, row: Result, renderer: Renderer) -> Iterator[Failure]:
    """Compares one learnt answer with its rendering and returns the failures, with empty origins."""
    before, learnt = renderer.decode(stretch.before), renderer.decode(stretch.learnt)
    lost = texts.prompt[len(before) :]
    if before != texts.prompt and not (
        row.notes & SHORTENED
        and texts.prompt.startswith(before)
        and len(lost) <= len(texts.header) + 2  # newlines before the header merge with it
        and not WORD.search(lost)
    ):
        yield Failure("prompt", "", f"{before[-60:]!r} is not the prompt {texts.prompt[-60:]!r}")
    missing = words_of(turn.answer) - set(WORD.findall(learnt))
    if visible(turn.answer) not in learnt or (missing and not row.notes & UNWRITTEN):
        yield Failure("answer", "", f"{learnt!r} lacks {sorted(missing) or visible(turn.answer)}")
    foreign = [word for word in WORD.findall(learnt) if word not in words_of(turn.answer)]
    if foreign:
        yield Failure("foreign", "", f"{learnt!r} has {foreign}")
    at = end_of_answer(learnt, turn.answer)
    # Only a thought has its own end of turn, before the header of the words that follow it.
    places = [learnt[at:]] if turn.answer.get("reasoning_content") else [learnt[at:], learnt[:at]]
    opening = renderer.markers.match(texts.header.strip())
    if opening and any(text.count(opening.group()) and text.count(texts.header.strip()) for text in places):
        yield Failure("foreign", "", f"{learnt!r} has the header {texts.header!r}")
    if texts.end and sum(text.count(texts.end) for text in places) != 1:
        yield Failure("end", "", f"{learnt!r} has not {texts.end} once")


# --- the two kinds of rows


def check_pair(row: Conversation, result: Result, renderer: Renderer) -> Iterator[Failure]:
    """Compares a pair with its renderings."""
    turns = [Turn(row.prompt, answer) for answer in row.answers]
    texts = [texts_of(turn, row.tools, renderer) for turn in turns]
    if result.dropped:
        if all(text is not None and is_plain_case(turn, text) for turn, text in zip(turns, texts, strict=True)):
            yield Failure("dropped", "", f"could be kept, and is dropped as {result.dropped}")
        return
    for turn, text, stretch in zip(turns, texts, result.stretches, strict=True):
        assert text is not None, "jdpo cannot render what transformers refuses"
        yield from check_stretch(turn, stretch, text, result, renderer)
        ids = stretch.before + stretch.learnt
        if text.whole.startswith(text.prompt) and ids != renderer.encode(text.whole):
            yield Failure("whole", "", f"{renderer.decode(ids)!r} is not {text.whole!r}")


def check_turns(row: Conversation, result: Result, renderer: Renderer) -> Iterator[Failure]:
    """Compares every learnt turn of a supervised row with its rendering."""
    messages = [*row.prompt, row.answers[0]]
    turns = [Turn(messages[:i], message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [texts_of(turn, row.tools, renderer) for turn in turns]
    found = Counter[int]()
    for stretch in (piece for one in result.stretches for piece in _single_turns(one, turns, texts, renderer)):
        number = _turn_in(renderer.decode(stretch.learnt), turns)
        if number is None:
            yield Failure("answer", "", f"{renderer.decode(stretch.learnt)!r} is learnt, which is no answer")
            continue
        found[number] += 1
        text = texts[number]
        assert text is not None, "jdpo cannot render what transformers refuses"
        yield from check_stretch(turns[number], stretch, text, result, renderer)
    for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        must = all(texts) and text is not None and is_plain_case(turn, text)
        if found[number] > 1 or (must and not found[number]):
            what = f"turn {number + 1} of {len(turns)} is learnt {found[number]} times"
            yield Failure("dropped", "", f"{what}; {result.dropped or 'the row is kept'}")


def _turn_in(learnt: str, turns: Sequence[Turn]) -> int | None:
    """Returns the first turn with words in a learnt text; names of tools do not identify a turn."""
    words = {word for word in WORD.findall(learnt) if not word.startswith("use")}
    return next((i for i, turn in enumerate(turns) if words_of(turn.answer) & words), None)


def _single_turns(
    stretch: Stretch, turns: Sequence[Turn], texts: Sequence[Texts | None], renderer: Renderer
) -> Iterator[Stretch]:
    """Cuts a stretch where the prompt of a later turn ends inside it: templates may write nothing between turns."""
    ids = stretch.before + stretch.learnt
    places = range(len(stretch.before) + 1, len(ids))
    ends = {renderer.decode(ids[:place]): place for place in places} if len(turns) > 1 else {}
    cuts = sorted({ends[text.prompt] for text in texts if text is not None and text.prompt in ends})
    for start, stop in itertools.pairwise([len(stretch.before), *cuts, len(ids)]):
        yield Stretch(ids[:start], ids[start:stop])


# --- rules under test


def jdpo_pair(row: Conversation, tokenizer: Tokenizer) -> Result:
    """Tokenizes a pair as jdpo trains on it."""
    chosen, rejected = ([answer] for answer in row.answers)
    (found,) = tokenize_pairs(
        [PreferenceRow(row.prompt, chosen, rejected, row.origin, tools=row.tools)], tokenizer, max_length=MAX_LENGTH
    )
    if isinstance(found, Dropped):
        return Result([], found.reason, frozenset())
    prompt, *sides = (ids.tolist() for ids in found.row[:3])
    return Result([Stretch(prompt, side) for side in sides], "", frozenset(found.notes))


def jdpo_turns(row: Conversation, tokenizer: Tokenizer) -> Result:
    """Tokenizes a supervised row as jdpo trains on every turn of it."""
    (found,) = tokenize_turns(
        [CompletionRow(row.prompt, [row.answers[0]], row.origin, row.tools)], tokenizer, max_length=MAX_LENGTH
    )
    kept = [one for one in found if not isinstance(one, Dropped)]
    dropped = [one.reason for one in found if isinstance(one, Dropped)]
    stretches = [_stretches(one.row.tokens.tolist(), one.row.completion_mask.tolist()) for one in kept]
    notes = frozenset(note for one in kept for note in one.notes)
    return Result([one for sequence in stretches for one in sequence], dropped[0] if dropped else "", notes)


def _stretches(tokens: list[int], mask: list[bool]) -> Iterator[Stretch]:
    start = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or mask[place] != mask[place - 1]:
            if mask[place - 1]:
                yield Stretch(tokens[:start], tokens[start:place])
            start = place


def prefix_pair(row: Conversation, tokenizer: Tokenizer) -> Result:
    """Cuts a pair at the common token prefix of prompt and conversations, even within a message."""
    renderer = Renderer(tokenizer.hf, tokenizer.probe.renderer.kwargs)
    prompt = renderer.write(row.prompt, row.tools, prompt=True)
    wholes = [renderer.write([*row.prompt, answer], row.tools) for answer in row.answers]
    if prompt is None or None in wholes:
        return Result([], "refused", frozenset())
    ids, *sequences = (renderer.encode(text) for text in (prompt, *wholes) if text is not None)
    length = 0
    while length < len(ids) and all(ids[: length + 1] == sequence[: length + 1] for sequence in sequences):
        length += 1
    notes = SHORTENED if length < len(ids) else set()
    return Result([Stretch(ids[:length], sequence[length:]) for sequence in sequences], "", frozenset(notes))


Rule = Callable[[Conversation, Tokenizer], Result]
Check = Callable[[Conversation, Result, Renderer], Iterator[Failure]]
RULES: dict[str, dict[str, tuple[Rule, Check]]] = {
    "jdpo": {"pairs": (jdpo_pair, check_pair), "assistant_turns": (jdpo_turns, check_turns)},
    "prefix": {"pairs": (prefix_pair, check_pair)},
}


# --- the whole


class Outcome(NamedTuple):
    """The outcomes of one kind of rows under one template."""

    kept: int
    dropped: Counter[str]
    reported: int
    failures: list[Failure]


def run_template(
    template: Path, rows: Sequence[Conversation], rule: str, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Outcome]:
    """Tokenizes and checks all rows under a template with these variables."""
    texts = [message["content"] or "" for row in rows for message in row.prompt]
    hf = train_tokenizer("byte_bos", texts, 400)
    source = template.read_text(encoding="utf-8")
    markers = [] if template.stem in _PLAIN_MARKERS else [*dict.fromkeys(_MARKER.findall(source))]
    give_template(hf, template, [*markers, *(f"<|{role}|>" for role in ("user", "assistant", "tool"))])
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tokenizer = load_tokenizer(Path(folder), chat_template=None, chat_template_kwargs=kwargs)
    renderer = Renderer(hf, kwargs)
    outcomes = {}
    for kind, (tokenize, check) in RULES[rule].items():
        results = [tokenize(row, tokenizer) for row in rows]
        failures = [
            failure._replace(origin=row.origin)
            for row, result in zip(rows, results, strict=True)
            for failure in check(row, result, renderer)
        ]
        dropped = Counter(result.dropped for result in results if result.dropped)
        reported = sum(bool(result.notes & (SHORTENED | UNWRITTEN)) for result in results)
        outcomes[kind] = Outcome(len(rows) - dropped.total(), dropped, reported, failures)
    return outcomes


def report(found: dict[str, dict[str, Outcome]]) -> tuple[list[str], bool]:
    """Returns a table of all outcomes with the failures below it, and whether every check passed."""
    lines = ["| template | rows | kept | reported | " + " | ".join(CHECKS) + " |", "|---" * (4 + len(CHECKS)) + "|"]
    details: list[str] = []
    passed = True
    for name, outcomes in found.items():
        for kind, outcome in outcomes.items():
            counts = Counter(failure.check for failure in outcome.failures)
            figures = " | ".join(str(counts[check]) for check in CHECKS)
            lines.append(f"| {name} | {kind} | {outcome.kept} | {outcome.reported} | {figures} |")
            details += [f"{name}, {kind}: {count} dropped: {reason}" for reason, count in outcome.dropped.items()]
            shown = outcome.failures[:MOST_SHOWN]
            details += [f"{name}, {kind}: FAILED {one.check}: {one.origin}: {one.what}" for one in shown]
            if not outcome.kept:
                details.append(f"{name}, {kind}: FAILED: no row is kept")
            passed = passed and not outcome.failures and outcome.kept > 0
    return [*lines, "", *details], passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the templates and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="generated conversations per template")
    parser.add_argument("--seed", type=int, default=0, help="of the conversations")
    parser.add_argument("--templates", nargs="*", help="names of templates; default: all")
    parser.add_argument("--rule", choices=RULES, default="jdpo", help="the rule under test")
    parser.add_argument("--out", type=Path, help="Markdown file for the report")
    options = parser.parse_args(arguments)
    rows = conversations(options.rows, options.seed)
    found = {
        name: run_template(path, rows, options.rule, kwargs)
        for path in templates_of(options.templates)
        for name, kwargs in with_switches(path)
    }
    lines, passed = report(found)
    lines.append(f"rule {options.rule}: {'every check holds' if passed else 'FAILED'}")
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
