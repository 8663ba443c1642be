"""The table of all known schemas of preference and supervised rows: how to recognise a row, and how to read it.

A row is read by the first schema in `PREFERENCE_SCHEMAS` or `COMPLETION_SCHEMAS` whose columns it has, with values of
the right types. More specific schemas come first: `prompt` before `question`, an explicit prompt before one implied by
whole conversations.

Rows of strings under prompt, chosen and rejected (or prompt and completion) are plain text, as in TRL. All other rows
are conversations, because columns such as `question` and `answers` imply two speakers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jdpo.data.schemas import conversation_columns, messages, schema_readers, votes
from jdpo.data.schemas.messages import Raw
from jdpo.data.schemas.ranked import Asked, Dropped

EXTRAS = ("system", "tools", "loss_mask", *schema_readers.SIDE_SCORES)
"""Columns that are read in addition to those of any schema."""


class Schema(NamedTuple):
    """A schema of rows.

    Attributes:
      name: a short name, for reports.
      description: its columns, for the user.
      columns: names of all columns that it reads, besides `EXTRAS`.
      matches: returns whether it fits a row (without nulls).
      read: returns the row's prompt and answers.
      ranked: whether a row may have more than two answers.
      joined: whether the answers are whole conversations that include the row's prompt.
    """

    name: str
    description: str
    columns: tuple[str, ...]
    matches: Callable[[Raw], bool]
    read: Callable[[Raw, str], Asked | Dropped]
    ranked: bool = False
    joined: bool = False


_MESSAGES = (list, dict)
_SIDE = (str, list, dict)


def _has(raw: Raw, **types: type | tuple[type, ...]) -> bool:
    return all(isinstance(raw.get(name), types_of) for name, types_of in types.items())


def _answers_only(side: Any) -> bool:
    """Returns whether a side contains only the answer, and does not repeat its prompt."""
    first = side[0] if isinstance(side, list) and side else side
    # A side that starts with a system or user turn repeats the prompt; tool turns may start an answer.
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return not isinstance(side, list) or messages.ROLES.get(str(role).lower()) not in ("system", "user")


def _ranked(raw: Raw, column: str, *keys: str) -> bool:
    """Returns whether a column is a list of objects with these keys, judging by its first element."""
    items = raw.get(column)
    # An empty list fits too; the row is then dropped for having too few answers, with that reason.
    return isinstance(items, list) and (not items or (isinstance(items[0], dict) and items[0].keys() >= {*keys}))


def _unprompted(raw: Raw, **types: type | tuple[type, ...]) -> bool:
    # With a prompt, an earlier and more specific schema applies.
    return "prompt" not in raw and _has(raw, **types)


def _asked_in(column: str, name: str, description: str) -> Schema:
    """Returns the schema of pairs whose question is in another column than prompt."""
    return Schema(
        name,
        description,
        (column, "chosen", "rejected"),
        lambda raw: _unprompted(raw, **{column: str}, chosen=_SIDE, rejected=_SIDE),
        schema_readers.asked_under(column),
    )


def _answered_elsewhere(raw: Raw) -> bool:
    """Returns whether `messages` contains no answer, but other columns do."""
    if conversation_columns.ends_in_answer(raw["messages"]):
        return False
    return _has(raw, chosen=_SIDE, rejected=_SIDE) or votes.is_vote(raw)


def _responses(column: str) -> Schema:
    return Schema(
        f"{column}-responses",
        f"{column}, chosen_response and rejected_response: strings",
        (column, "chosen_response", "rejected_response"),
        lambda raw: _has(raw, **{column: str}, chosen_response=str, rejected_response=str),
        schema_readers.asked_under(column, "chosen_response", "rejected_response"),
    )


PREFERENCE_SCHEMAS: Sequence[Schema] = (
    Schema(
        "sharegpt",
        "conversations: [{from, value}, ...], chosen and rejected: {from, value}",
        ("conversations", "chosen", "rejected"),
        lambda raw: (
            _has(raw, conversations=list, chosen=_SIDE, rejected=_SIDE)
            and all(_answers_only(raw[side]) for side in ("chosen", "rejected"))
        ),
        conversation_columns.conversation_pair,
        joined=True,
    ),
    Schema(
        "conversation",
        "messages, conversation, conversations, context or history: the messages that chosen and rejected answer",
        (*conversation_columns.COLUMNS, "chosen", "rejected"),
        lambda raw: bool(conversation_columns.prompt_columns(raw)),
        conversation_columns.conversation_pair,
        joined=True,
    ),
    Schema(
        "nemo-rl",
        "context: messages, completions: [{rank, completion: messages}, ...], the lowest rank is best",
        ("context", "completions"),
        lambda raw: _has(raw, context=_SIDE) and _ranked(raw, "completions", "rank", "completion"),
        schema_readers.nemo,
        ranked=True,
    ),
    Schema(
        "nectar",
        "prompt: a string or transcript, answers: [{answer, rank}, ...], the lowest rank is best",
        ("prompt", "answers"),
        lambda raw: _has(raw, prompt=str) and _ranked(raw, "answers", "answer", "rank"),
        schema_readers.nectar,
        ranked=True,
    ),
    Schema(
        "stack-exchange-preferences",
        "question, answers: [{text, pm_score}, ...], the highest pm_score is best",
        ("question", "answers"),
        lambda raw: _has(raw, question=str) and _ranked(raw, "answers", "text", "pm_score"),
        schema_readers.stack_exchange,
        ranked=True,
    ),
    Schema(
        "shp",
        "history, human_ref_A, human_ref_B, labels: 1 where A is better, 0 where B is",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),
        # Copies of the dataset have labels of different types, so only their presence counts.
        lambda raw: _has(raw, history=str, human_ref_A=str, human_ref_B=str) and "labels" in raw,
        schema_readers.shp,
    ),
    Schema(
        "stack-exchange-paired",
        "question, response_j (the better one) and response_k",
        ("question", "response_j", "response_k"),
        lambda raw: _has(raw, question=str, response_j=str, response_k=str),
        schema_readers.asked_under("question", "response_j", "response_k"),
    ),
    Schema(
        "standard",
        "prompt, chosen and rejected: strings (plain text)",
        ("prompt", "chosen", "rejected"),
        lambda raw: _has(raw, prompt=str, chosen=str, rejected=str),
        schema_readers.explicit_pair,
    ),
    Schema(
        "conversational",
        "prompt: messages, chosen and rejected: messages or strings",
        ("prompt", "chosen", "rejected"),
        lambda raw: _has(raw, prompt=_MESSAGES, chosen=_SIDE, rejected=_SIDE),
        schema_readers.explicit_pair,
    ),
    Schema(
        "binarized",
        "prompt: a string, chosen and rejected: messages, which may be whole conversations",
        ("prompt", "chosen", "rejected"),
        lambda raw: _has(raw, prompt=str, chosen=_SIDE, rejected=_SIDE),
        schema_readers.explicit_pair,
    ),
    _asked_in("question", "orca", "question (and system), chosen and rejected"),
    Schema(
        "alpaca",
        "instruction (and input, history), chosen and rejected; or output: [chosen, rejected]",
        ("instruction", "input", "history", "chosen", "rejected", "output"),
        lambda raw: (
            _unprompted(raw, instruction=str)
            and isinstance(raw.get("input", ""), str)
            and (
                _has(raw, chosen=_SIDE, rejected=_SIDE)
                or ("chosen" not in raw and _has(raw, output=list) and len(raw["output"]) == 2)
            )
        ),
        schema_readers.alpaca_pair,
    ),
    _asked_in("input", "distilabel", "input (and system), chosen and rejected"),
    _responses("prompt"),
    _responses("instruction"),
    Schema(
        "implicit",
        "chosen and rejected without prompt: whole conversations, lists of {role, content}",
        ("chosen", "rejected"),
        lambda raw: _unprompted(raw, chosen=list, rejected=list),
        schema_readers.whole_conversations,
    ),
    Schema(
        "hh-rlhf",
        r"chosen and rejected without prompt: transcripts like '\n\nHuman: ...\n\nAssistant: ...'",
        ("chosen", "rejected"),
        lambda raw: (
            _unprompted(raw, chosen=str, rejected=str)
            and all(messages.is_transcript(raw[side]) for side in ("chosen", "rejected"))
        ),
        schema_readers.transcripts,
    ),
    # Last: a row that names its sides chosen and rejected needs no vote.
    Schema(
        "votes",
        "prompt, response_a and response_b (or _0 and _1, _1 and _2), and a vote such as winner or better_response_id",
        votes.COLUMNS_READ,
        votes.is_vote,
        votes.read_vote,
    ),
)
"""Schemas of preference rows, in the order in which they are tried."""

COMPLETION_SCHEMAS: Sequence[Schema] = (
    Schema(
        "messages",
        "messages: a conversation, a list of {role, content} that ends in an assistant turn",
        ("messages",),
        lambda raw: _has(raw, messages=list) and not _answered_elsewhere(raw),
        schema_readers.conversation,
    ),
    Schema(
        "conversations",
        "conversations: a conversation, a list of {from, value} that ends in an assistant turn",
        ("conversations",),
        # With sides the column is the prompt of a pair.
        lambda raw: _has(raw, conversations=list) and "chosen" not in raw and "rejected" not in raw,
        schema_readers.conversation,
    ),
    Schema(
        "prompt-completion",
        "prompt and completion: strings, or lists of {role, content}",
        ("prompt", "completion", "label"),
        lambda raw: _has(raw, prompt=_SIDE, completion=_SIDE),
        schema_readers.explicit_completion,
    ),
    Schema(
        "alpaca-completion",
        "instruction (and input, history), output: strings",
        ("instruction", "input", "history", "output"),
        lambda raw: (
            _unprompted(raw, instruction=str, output=str)
            and isinstance(raw.get("input", ""), str)
            and "chosen" not in raw
            and "rejected" not in raw
        ),
        schema_readers.alpaca_completion,
    ),
    *PREFERENCE_SCHEMAS,
)
"""Schemas of supervised rows, in the order in which they are tried; preference rows give their best answer."""

UNANSWERED_SCHEMAS: Sequence[Schema] = (
    Schema(
        "prompt",
        "prompt: a string (plain text), or messages",
        ("prompt",),
        lambda raw: _has(raw, prompt=_SIDE),
        schema_readers.prompt_alone,
    ),
    Schema(
        "instruction",
        "instruction (and input, history): strings",
        ("instruction", "input", "history"),
        lambda raw: _has(raw, instruction=str) and isinstance(raw.get("input", ""), str),
        schema_readers.instruction_alone,
    ),
    Schema(
        "question",
        "question: a string",
        ("question",),
        lambda raw: _has(raw, question=str),
        schema_readers.question_alone,
    ),
)
"""Schemas of rows without an answer."""

PROMPT_SCHEMAS: Sequence[Schema] = (*COMPLETION_SCHEMAS, *UNANSWERED_SCHEMAS)
"""Schemas of rows whose prompt is to be answered, in the order in which they are tried."""

CANONICAL = tuple(dict.fromkeys([*(name for schema in COMPLETION_SCHEMAS for name in schema.columns), *EXTRAS]))
"""All column names that a schema reads, which are the names that `column_map` may use."""
