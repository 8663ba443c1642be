"""Prompts files: rows of any schema that jdpo reads, as the questions that a model is asked.

A repeated prompt is asked once. What is not asked is counted by its reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdpo.config import DatasetConfig, public_text
from jdpo.data.schemas.formats import Dropped, Reading, check_prompts
from jdpo.data.schemas.messages import as_messages
from jdpo.data.schemas.prompt_rows import PromptRow, has_null_prompt, prompt_row
from jdpo.data.sources import open_source
from jdpo.data.tokens.row_rendering import NOT_UNICODE, is_unicode
from jdpo.generation.values import Question
from jdpo.types import Message, Text
from jdpo.words import figure, listed

SAMPLE_ROWS = 3
"""The schema of this many rows is found before all are read, so that an error shows more than one of them."""


class Prompts(NamedTuple):
    """The questions of a prompts file.

    Attributes:
      questions: one per different prompt, in the order of the file.
      place: the file, folder or dataset, for messages.
      num_rows: rows read.
      duplicates: rows whose prompt an earlier row has.
      other_columns: duplicates whose other columns differ from those of the earlier row, which are kept.
      dropped: {reason: number of rows that give no question}.
      examples: {reason: the first such row}.
    """

    questions: list[Question]
    place: str
    num_rows: int
    duplicates: int
    other_columns: int
    dropped: dict[str, int]
    examples: dict[str, str]

    def lines(self) -> list[str]:
        """Returns sentences on what was read."""
        lines = [
            f"prompts: {figure(len(self.questions), 'question')} from {figure(self.num_rows, 'row')} of {self.place}"
        ]
        if self.duplicates:
            lines.append(f"  {figure(self.duplicates, 'row')} repeated a prompt, which is asked once")
        if self.other_columns:
            lines.append(f"  {self.other_columns:,} of them had other columns, which are left out")
        lines += [
            f"  {figure(count, 'row')} dropped: {reason} (first: {self.examples[reason]})"
            for reason, count in self.dropped.items()
        ]
        return lines


def read_prompts(
    dataset: DatasetConfig, *, num_prompts: int | None = None, system: str | None = None, chat: bool = False
) -> Prompts:
    """Reads the questions of a dataset.

    Args:
      dataset: what to read; `path`, `split`, `name`, `revision` and `column_map` are used.
      num_prompts: read until there are this many questions; None: read all.
      system: the system turn of conversations that have none; plain text becomes a conversation with it.
      chat: make plain text the user turn of a conversation, so that it is written with the chat template.

    Raises:
      ValueError: rows cannot be read, or none of them gives a question; the message says where and why.
    """
    reading = Reading(dataset.column_map)
    rows = iter(open_source(dataset).rows())
    samples = list(itertools.islice(rows, SAMPLE_ROWS))
    check_prompts([one for one in samples if not has_null_prompt(*one, reading)], reading)
    found: dict[str, Question] = {}
    counts, examples = Counter[str](), dict[str, str]()
    num_rows = duplicates = other_columns = 0
    for raw, origin in itertools.chain(samples, rows):
        num_rows += 1
        row = prompt_row(raw, origin, reading)
        # A row that cannot be asked is counted, and does not end the reading of thousands of others.
        question = row if isinstance(row, Dropped) else _question(row, system, chat=chat)
        if isinstance(question, Dropped):
            counts[question.reason] += 1
            examples.setdefault(question.reason, origin)
        elif (earlier := found.setdefault(question.prompt_id, question)) is not question:
            duplicates += 1
            other_columns += earlier.columns != question.columns
        elif len(found) == num_prompts:
            # Before the rest is read, which may be a large dataset or come over the network.
            break
    place = public_text(dataset.path)
    if not found:
        reasons = [f"{figure(count, 'row')}: {reason}" for reason, count in counts.items()]
        raise ValueError(f"{place}: no row gives a question ({listed(reasons, 10)})")
    return Prompts(list(found.values()), place, num_rows, duplicates, other_columns, dict(counts), examples)


def _question(row: PromptRow, system: str | None, *, chat: bool) -> Question | Dropped:
    prompt = row.prompt
    if isinstance(prompt, str) and (chat or system is not None):
        prompt = as_messages(prompt)
    if system is not None and not isinstance(prompt, str) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    if not is_unicode(json.dumps([prompt, row.tools, row.template_kwargs], ensure_ascii=False)):
        return Dropped(NOT_UNICODE, row.origin)
    return make_question(
        prompt, row.origin, tools=row.tools, template_kwargs=row.template_kwargs, columns=row.columns or None
    )


def make_question(
    prompt: Text,
    origin: str,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
) -> Question:
    """Returns a question, whose id follows from the prompt, its tools and its variables of the chat template.

    Args:
      prompt, origin, tools, template_kwargs, columns: see `Question`.
    """
    messages: Text = prompt if isinstance(prompt, str) else [_plain(message) for message in prompt]
    kwargs = dict(template_kwargs) if template_kwargs is not None else None
    known = {"prompt": messages, "tools": tools, "template_kwargs": kwargs}
    # Sorted and without spaces, so that the id does not depend on how a file writes the row.
    text = json.dumps(known, sort_keys=True, separators=(",", ":"))
    return Question(hashlib.sha256(text.encode()).hexdigest()[:16], messages, origin, tools, kwargs, columns)


def _plain(message: Message) -> Message:
    # Marks of turns that are not learnt are a subclass of dict, and mean nothing where nothing is learnt.
    return dict(message)
