"""The error for columns that fit no known format, with a `column_map` to paste."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from jdpo.data.schemas.describing import MOST_NAMED, kind, named, printable, shown
from jdpo.data.schemas.messages import Raw
from jdpo.data.schemas.schema_table import Schema
from jdpo.words import listed

MOST_ROWS = 3
"""Maximum number of sample rows in a message."""

LONGEST_PASTED = 200
"""Longer names are not suggested for a column_map, where a name cannot be shortened."""


_SAMPLE_WIDTH = 200
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*")
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")

_PROMPTS = ("prompt", "question", "instruction", "input", "query", "context", "history", "post", "request", "problem")
_COMPLETIONS = ("completion", "response", "answer", "output", "solution", "target", "text")
_BETTER = re.compile(r"chosen|better|best|prefer+ed|winner|winning|win|accepted|good|positive|pos|yw")
_WORSE = re.compile(r"rejected|worse|worst|dispreferred|loser|losing|lose|bad|negative|neg|yl")
_ONE_OF_TWO = re.compile(r"(?P<stem>.*[A-Za-z])[_-]?(?P<mark>[abAB]|[0-2]|left|right)")
_ANSWER = re.compile(r"response|answer|completion|output|repl|generation|text|conversation")
_VOTE = re.compile(r"prefer|winner|better|choice|vote|verdict|judg", re.IGNORECASE)
_SAYS_WHICH = re.compile(rf"{_VOTE.pattern}|label|score|rank|rating", re.IGNORECASE)
_VOTED_MARKS = (("a", "b"), ("0", "1"), ("1", "2"))

_ADVICE = (
    "To name the columns, add this to the dataset in the config (in Python, rename the columns of your rows), "
    "and fill in what is in <>:\n  column_map:"
)

Sample = tuple[Raw, str]
"""A raw row and its origin."""


class ColumnsError(ValueError):
    """Rows that no schema reads, with advice on how a config names their columns."""

    def with_advice(self, advice: str) -> str:
        """Returns the message with other advice, for a command without a config."""
        return str(self).replace(_ADVICE, advice)


def refusal(
    samples: Sequence[Sample], schemas: Sequence[Schema], *, mapped: Sequence[Raw] = (), wanted: Sequence[str]
) -> str:
    """Returns the message for rows that no schema reads.

    Args:
      samples: raw rows; the message starts with the origin of the first and shows `MOST_ROWS` of them.
      schemas: the schemas that were tried.
      mapped: the columns of each sample after `column_map` is applied; empty without a `column_map`.
      wanted: jdpo's names of the columns that are needed; the first is prompt.
    """
    raws = [raw for raw, _ in samples]
    lines = [f"{samples[0][1]}: the columns fit no known format.", f"Found: {_columns(raws)}"]
    if mapped:
        lines.append(f"Under column_map: {_columns(mapped)}")
    lines += ["Rows:", *(f"  {origin}: {_sample(raw)}" for raw, origin in samples[:MOST_ROWS])]
    lines += ["Known formats:", *(f"  {schema.description}" for schema in schemas)]
    if not mapped:
        lines += _suggestion(raws[0], wanted=wanted)
    return "\n".join(lines)


def _columns(raws: Sequence[Raw]) -> str:
    """Describes every column by the types of its values.

    >>> _columns([{"a": "x", "b": None}, {"a": "y", "b": 3}])
    'a (string), b (null or number)'
    """
    kinds: dict[str, dict[str, None]] = {}
    for raw in raws:
        for name, value in raw.items():
            kinds.setdefault(str(name), {})[_closer_kind(value)] = None
    return listed([f"{printable(name)} ({' or '.join(found)})" for name, found in kinds.items()], MOST_NAMED) or "none"


def _closer_kind(value: object, depth: int = 3) -> str:
    """Describes the type of a value, and of the first element of a list.

    >>> _closer_kind([{"role": "user", "content": "Hi"}]), _closer_kind(["Hi"]), _closer_kind({"text": "Hi"})
    ('list of {role, content}', 'list of string', 'object {text}')
    """
    if isinstance(value, list) and value and depth:
        # The first element only, so that the message has one short description per column.
        return f"list of {_closer_kind(value[0], depth - 1).removeprefix('object ')}"
    if isinstance(value, dict) and value:
        keys = [printable(name) for name in map(str, itertools.islice(value, 6))]
        return f"object {{{', '.join(keys)}{', ...' if len(value) > 6 else ''}}}"
    return kind(value)


def _sample(raw: Raw) -> str:
    text = ", ".join(f"{named([name])}: {shown(value, 40)}" for name, value in itertools.islice(raw.items(), 20))
    return f"{{{text}}}" if len(text) <= _SAMPLE_WIDTH else f"{{{text[:_SAMPLE_WIDTH]}...}}"


def _suggestion(raw: Raw, *, wanted: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a column_map to paste; none if the columns have the right names and wrong values."""
    # The names are right, so a column_map would not help.
    if all(name in raw for name in wanted):
        return
    # Nobody would paste a longer name, and the message must stay readable.
    texts = [
        name for name, value in raw.items() if isinstance(value, str | list | dict) and len(name) <= LONGEST_PASTED
    ]
    prompt = _first_like(texts, _PROMPTS)
    rest = [name for name in texts if name != prompt]
    yield _ADVICE
    yield f"    prompt: {_yaml(prompt or '<column of the prompt>')}"
    if "rejected" not in wanted:
        if "completion" in wanted:
            yield f"    completion: {_yaml(_first_like(rest, _COMPLETIONS) or '<column of the answer to learn>')}"
        return
    # The worse side first: "dispreferred" contains "preferred", and "rejected" is less ambiguous than "best".
    worse = next((name for name in rest if _WORSE.search(name.lower())), None)
    better = next((name for name in rest if name != worse and _BETTER.search(name.lower())), None)
    twins = _twins({name: raw[name] for name in rest}) if better is None or worse is None else None
    others = [name for name in raw if twins and name not in twins and len(name) <= LONGEST_PASTED]
    # A column that may tell row by row which of the two is better.
    judges = [name for name in others if _SAYS_WHICH.search(name)]
    voted = _vote_lines(twins, judges) if twins else []
    if voted:
        yield from voted
        return
    unsure = f"  # or {_yaml(twins[1])}: the columns do not tell which is better" if twins else ""
    better, worse = twins or (better, worse)
    yield f"    chosen: {_yaml(better or '<column of the better answer>')}{unsure}"
    yield f"    rejected: {_yaml(worse or '<column of the worse answer>')}"
    if "chosen" in raw and "rejected" in raw:
        yield (
            "chosen and rejected have no prompt: add a column with what both answer, or start both with the whole "
            "conversation, as lists of {role, content}."
        )
    if judges:
        yield (
            f"If {named(judges)} tells row by row which answer is better, write the rows again with chosen and "
            "rejected: a column_map names the same column as better in every row."
        )


def _vote_lines(twins: tuple[str, str], judges: Sequence[str]) -> list[str]:
    """Returns the lines that map two answers and a vote; none without a vote, or if the answers have other marks."""
    marks = tuple(match["mark"].lower() for name in twins if (match := _ONE_OF_TWO.fullmatch(name)))
    vote = next((name for name in judges if _VOTE.search(name)), None)
    # Other marks, such as left and right, are not understood by the schema of votes.
    if vote is None or marks not in _VOTED_MARKS:
        return []
    answers = [f"    response_{mark}: {_yaml(name)}" for mark, name in zip(marks, twins, strict=True)]
    return [*answers, f"    winner: {_yaml(vote)}  # names the better answer of each row"]


def _first_like(names: Sequence[str], words: Sequence[str]) -> str | None:
    """Returns the first column that is one of the words, or else the first that contains one."""
    exact = next((word for word in words if word in names), None)
    return exact or next((name for word in words for name in names if word in name.lower()), None)


def _twins(columns: Mapping[str, object]) -> tuple[str, str] | None:
    """Returns two columns whose names differ in a mark such as a and b: columns of answers first, then longer texts.

    >>> _twins({"id": 1, "model_a": "x", "model_b": "y", "response_a": "Hi", "response_b": "Hello"})
    ('response_a', 'response_b')
    """
    stems: dict[str, list[str]] = {}
    for name in columns:
        match = _ONE_OF_TWO.fullmatch(name)
        if match:
            stems.setdefault(match["stem"], []).append(name)

    def rank(stem: str) -> tuple[bool, int]:
        texts = [columns[name] for name in stems[stem]]
        return bool(_ANSWER.search(stem.lower())), sum(len(text) for text in texts if isinstance(text, str))

    # model_a and model_b are twins too; columns of answers, and longer texts, are more likely the sides.
    found = max((stem for stem, names in stems.items() if len(names) == 2), key=rank, default=None)
    return None if found is None else (stems[found][0], stems[found][1])


def _yaml(name: str) -> str:
    """Writes a column's name as a YAML scalar.

    >>> _yaml("response_a"), _yaml("no"), _yaml("the answer: a")
    ('response_a', '"no"', '"the answer: a"')
    """
    if name.startswith("<") or (_PLAIN.fullmatch(name) and name.lower() not in _YAML_WORDS):
        return name
    return json.dumps(name)
