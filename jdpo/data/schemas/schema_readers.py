"""The reader of each schema: it returns the prompt of a row and its answers, ordered by their standing."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from jdpo.data.schemas import messages
from jdpo.data.schemas.describing import kind, shown
from jdpo.data.schemas.messages import Raw, read_messages, read_side
from jdpo.data.schemas.ranked import Answer, Asked, Dropped
from jdpo.types import Message, Text

UNWANTED = "completion labelled false"

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Columns with the scores of the chosen and the rejected side, in the order in which they are tried."""

SIDE_SCORES = (*(name for pair in SCORES for name in pair), "rating", "generations")
"""All columns from which scores of the sides are read."""


def number(value: Any) -> float | None:
    """Returns a finite number, also if it is written as text; None for any other value.

    >>> number(7), number("7.5"), number(True), number(float("nan"))
    (7.0, 7.5, None, None)
    """
    # bool is an int in Python, but no score.
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _required_number(value: Any, place: str, origin: str) -> float:
    found = number(value)
    if found is None:
        raise ValueError(f"{origin}: {place} is {shown(value)} ({kind(value)}); expected a number")
    return found


def side_scores(raw: Raw, chosen: Text, rejected: Text) -> tuple[float | None, float | None]:
    """Returns the scores of the two sides, or (None, None) unless the row has both."""
    for names in SCORES:
        first, second = (number(raw.get(name)) for name in names)
        if first is not None and second is not None:
            return first, second
    ratings = raw.get("rating")
    if isinstance(ratings, list) and len(ratings) == 2:
        first, second = map(number, ratings)
        # Ratings are in the order of the generations; without those it is unknown which rating is whose.
        is_known = raw.get("generations") in ([chosen, rejected], [rejected, chosen])
        if first is not None and second is not None and is_known:
            return (first, second) if raw["generations"][0] == chosen else (second, first)
    return None, None


def two_sides(raw: Raw, origin: str, *, names: tuple[str, str] = ("chosen", "rejected")) -> tuple[Answer, Answer]:
    """Reads two sides as messages.

    Args:
      names: the columns of the better and the worse side.
    """
    better, worse = (raw[name] for name in names)
    scores = side_scores(raw, better, worse)
    texts = [read_side(side, name, origin) for side, name in zip((better, worse), names, strict=True)]
    # The columns decide which side is better; scores that contradict them only make the margin negative.
    return Answer(texts[0], 1, scores[0]), Answer(texts[1], 0, scores[1])


def explicit_pair(raw: Raw, origin: str) -> Asked:
    prompt, chosen, rejected = raw["prompt"], raw["chosen"], raw["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        scores = side_scores(raw, chosen, rejected)
        return Asked(prompt, (Answer(chosen, 1, scores[0]), Answer(rejected, 0, scores[1])))
    return Asked(_prompt(raw, origin), two_sides(raw, origin))


def _prompt(raw: Raw, origin: str) -> Text:
    prompt = raw["prompt"]
    return prompt if isinstance(prompt, str) else read_messages(prompt, "prompt", origin)


def nemo(raw: Raw, origin: str) -> Asked:
    context = raw["context"]
    answers = [
        # The best answer has the lowest rank, but the highest standing.
        Answer(
            read_side(item.get("completion"), f"completions[{index}].completion", origin),
            -_required_number(item.get("rank"), f"completions[{index}].rank", origin),
        )
        for index, item in _items(raw, "completions", origin)
    ]
    return Asked(context if isinstance(context, str) else read_messages(context, "context", origin), answers)


def nectar(raw: Raw, origin: str) -> Asked:
    prompt: Text = raw["prompt"]
    if messages.is_transcript(prompt):
        turns = messages.read_transcript(raw["prompt"])
        # The transcript ends in "Assistant:", the header of the answer.
        prompt = turns[:-1] if turns[-1] == messages.assistant("") else turns
    answers = [
        Answer(
            _words(item, "answer", f"answers[{index}]", origin),
            -_required_number(item.get("rank"), f"answers[{index}].rank", origin),
        )
        for index, item in _items(raw, "answers", origin)
    ]
    return Asked(prompt, answers)


def stack_exchange(raw: Raw, origin: str) -> Asked:
    answers = []
    for index, item in _items(raw, "answers", origin):
        score = _required_number(item.get("pm_score"), f"answers[{index}].pm_score", origin)
        # Both the order and the score, so that min_margin applies to it.
        answers.append(Answer(_words(item, "text", f"answers[{index}]", origin), score, score))
    return Asked(raw["question"], answers)


def _items(raw: Raw, column: str, origin: str) -> list[tuple[int, dict[str, Any]]]:
    for index, item in enumerate(raw[column]):
        if not isinstance(item, dict):
            raise ValueError(f"{origin}: {column}[{index}] is {kind(item)}; expected an object")
    return list(enumerate(raw[column]))


def _words(item: dict[str, Any], key: str, place: str, origin: str) -> list[Message]:
    if not isinstance(item.get(key), str):
        raise ValueError(f"{origin}: {place}.{key} is {kind(item.get(key))}; expected a string")
    return [messages.assistant(item[key])]


def shp(raw: Raw, origin: str) -> Asked:
    # Some copies of SHP store the label as a boolean.
    a_is_better = number(int(raw["labels"]) if isinstance(raw["labels"], bool) else raw["labels"])
    if a_is_better not in (0, 1):
        raise ValueError(f"{origin}: labels is {shown(raw['labels'])}; expected 1 (human_ref_A is better) or 0")
    answers = (
        Answer([messages.assistant(raw["human_ref_A"])], a_is_better, number(raw.get("score_A"))),
        Answer([messages.assistant(raw["human_ref_B"])], 1 - a_is_better, number(raw.get("score_B"))),
    )
    return Asked(raw["history"], answers)


def asked_under(column: str, better: str = "chosen", worse: str = "rejected") -> Callable[[Raw, str], Asked]:
    return lambda raw, origin: Asked(raw[column], two_sides(raw, origin, names=(better, worse)))


def _alpaca_prompt(raw: Raw, origin: str) -> list[Message]:
    history = messages.read_history(raw["history"], origin) if "history" in raw else []
    # One user turn: the input is what the instruction is about.
    words = "\n".join(filter(None, (raw["instruction"], raw.get("input"))))
    return history + messages.as_messages(words)


def alpaca_pair(raw: Raw, origin: str) -> Asked:
    if "chosen" not in raw:
        # LLaMA-Factory's older format: the better answer comes first.
        raw = {**raw, "chosen": raw["output"][0], "rejected": raw["output"][1]}
    return Asked(_alpaca_prompt(raw, origin), two_sides(raw, origin))


def whole_conversations(raw: Raw, origin: str) -> Asked:
    return Asked([], two_sides(raw, origin))


def transcripts(raw: Raw, origin: str) -> Asked:
    scores = side_scores(raw, raw["chosen"], raw["rejected"])
    chosen, rejected = (messages.read_transcript(raw[side]) for side in ("chosen", "rejected"))
    return Asked([], (Answer(chosen, 1, scores[0]), Answer(rejected, 0, scores[1])))


def conversation(raw: Raw, origin: str) -> Asked:
    column = "messages" if "messages" in raw else "conversations"
    return Asked([], (Answer(read_messages(raw[column], column, origin), 0),))


def explicit_completion(raw: Raw, origin: str) -> Asked | Dropped:
    # Unpaired preferences label unwanted answers false. CSV files have the label as text, other files as a number.
    if str(raw.get("label")).lower() in ("false", "0", "0.0"):
        return Dropped(UNWANTED, origin)
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Asked(prompt, (Answer(completion, 0),))
    return Asked(_prompt(raw, origin), (Answer(read_side(completion, "completion", origin), 0),))


def alpaca_completion(raw: Raw, origin: str) -> Asked:
    return Asked(_alpaca_prompt(raw, origin), (Answer([messages.assistant(raw["output"])], 0),))


def prompt_alone(raw: Raw, origin: str) -> Asked:
    prompt = raw["prompt"]
    # A cell of a CSV file holds a conversation as text.
    if messages.is_written_out(prompt):
        prompt = messages.from_text(prompt, "prompt", origin)
    return Asked(prompt if isinstance(prompt, str) else read_messages(prompt, "prompt", origin), ())


def instruction_alone(raw: Raw, origin: str) -> Asked:
    return Asked(_alpaca_prompt(raw, origin), ())


def question_alone(raw: Raw, origin: str) -> Asked:
    return Asked(messages.as_messages(raw["question"]), ())
