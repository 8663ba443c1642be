"""The prompt of a row of any schema: what a model is asked, whether or not the row has answers."""

from __future__ import annotations

from typing import Any, NamedTuple

from jdpo.data.schemas import messages
from jdpo.data.schemas.comparing import comparable
from jdpo.data.schemas.formats import AS_FOUND, HISTORIES_DIFFER, Dropped, Reading, columns_of, detect, find
from jdpo.data.schemas.messages import Raw
from jdpo.data.schemas.ranked import TIED, Asked
from jdpo.data.schemas.row_building import EMPTY_SIDE, SYSTEM_ELSEWHERE, Frame, answer_row, read_frame, with_system
from jdpo.data.schemas.schema_table import EXTRAS, PROMPT_SCHEMAS, UNANSWERED_SCHEMAS
from jdpo.types import Text

NOTHING_ASKED = "no turn to answer"
NO_PROMPT = "the prompt is null"

_ASKED_IN = ("prompt", "instruction", "input", "question", "history", "context", "system", "tools", "loss_mask")
_CONVERSATIONS = ("messages", "conversation", "conversations")
_OF_PROMPT = {*_ASKED_IN, *_CONVERSATIONS, "chat_template_kwargs"}


class PromptRow(NamedTuple):
    """The prompt of a row.

    Attributes:
      prompt: the text or conversation to answer.
      origin: file and row, for messages.
      tools, template_kwargs: as in `PreferenceRow`.
      columns: the columns of the row that are not part of the prompt, under their names in the file, without nulls.
    """

    prompt: Text
    origin: str
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any] | None
    columns: dict[str, Any]


def prompt_row(raw: Raw, origin: str, reading: Reading = AS_FOUND) -> PromptRow | Dropped:
    """Reads the prompt of a raw row of any preference or supervised schema, or of a row without answers.

    The prompt of a conversation is every message before its final assistant turn; all of it if it ends with another
    turn. Which answer of a pair is better, and by how much, does not matter.

    Args:
      raw: {column: value}.
      origin: where the row came from, for messages.
      reading: how to read the rows of the dataset; only its `column_map` is used.

    Raises:
      ValueError: no schema fits the columns, a role is unknown, a content is not text, or column_map names a missing
        column. The message names the row.
    """
    try:
        if has_null_prompt(raw, origin, reading):
            return Dropped(NO_PROMPT, origin)
        columns, schema = detect(raw, PROMPT_SCHEMAS, reading, origin)
        # An answer that is not wanted has a prompt like any other.
        asked = schema.read({name: value for name, value in columns.items() if name != "label"}, origin)
        if isinstance(asked, Dropped) and asked.reason == TIED:
            # Nobody needs to have won for the prompt to be asked.
            alone = find(columns, UNANSWERED_SCHEMAS, reading)
            asked, schema = (asked, schema) if alone is None else (alone.read(columns, origin), alone)
        if isinstance(asked, Dropped):
            return asked
        frame = read_frame(columns, origin)
        prompt = _prompt(asked, frame, origin)
    except RecursionError:
        raise ValueError(f"{origin}: the row is nested too deeply") from None
    if isinstance(prompt, Dropped):
        return prompt
    # A column such as `question` next to a `prompt` is not part of the prompt.
    used = _OF_PROMPT & {*schema.columns, *EXTRAS, "chat_template_kwargs"}
    of_file = {(reading.column_map or {}).get(name, name) for name in used}
    rest = {name: value for name, value in raw.items() if name not in of_file and value is not None}
    return PromptRow(prompt, origin, frame.tools, frame.template_kwargs, rest)


def has_null_prompt(raw: Raw, origin: str, reading: Reading = AS_FOUND) -> bool:
    """Returns whether no schema reads a row because the column of its prompt is null.

    Args:
      raw, origin, reading: see `prompt_row`.

    Raises:
      ValueError: column_map names a missing column, or a cell with a conversation cannot be parsed.
    """
    names = ("prompt", "instruction", "question", *_CONVERSATIONS)
    in_file = [(reading.column_map or {}).get(name, name) for name in names]
    if not any(name in raw and raw[name] is None for name in in_file):
        return False
    # Tables have all columns in all rows, so another one may hold the prompt.
    return find(columns_of(raw, reading, origin), PROMPT_SCHEMAS, reading) is None


def _prompt(asked: Asked, frame: Frame, origin: str) -> Text | Dropped:
    if not asked.answers:
        if isinstance(asked.prompt, str) and not frame.is_chat:
            return asked.prompt if asked.prompt.strip() else Dropped(NOTHING_ASKED, origin)
        return _whole(messages.as_messages(asked.prompt), frame, origin)
    prompts = []
    for answer in asked.answers:
        last = answer.text[-1]["role"] if answer.text and not isinstance(answer.text, str) else "assistant"
        # A conversation that nobody has answered yet.
        if not asked.prompt and not isinstance(answer.text, str) and last in ("user", "tool"):
            prompts.append(_whole(answer.text, frame, origin))
            continue
        row = answer_row(asked.prompt, answer.text, frame, origin)
        prompts.append(row if isinstance(row, Dropped) else row.prompt)
    # A side without words does not change what both were asked.
    counted = [one for one in prompts if not isinstance(one, Dropped) or one.reason != EMPTY_SIDE] or prompts[:1]
    first, *others = counted
    for other in others:
        if isinstance(first, Dropped) or isinstance(other, Dropped):
            break
        if comparable(other) != comparable(first):
            return Dropped(HISTORIES_DIFFER, origin)
    faults = [one for one in counted if isinstance(one, Dropped)]
    return faults[0] if faults else first or Dropped(NOTHING_ASKED, origin)


def _whole(conversation: list[dict[str, Any]], frame: Frame, origin: str) -> Text | Dropped:
    if not any(message["role"] != "system" for message in conversation):
        return Dropped(NOTHING_ASKED, origin)
    return with_system(conversation, frame.system) or Dropped(SYSTEM_ELSEWHERE, origin)
