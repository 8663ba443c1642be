"""The values that travel between the rooms of jdpo.

Axes, here and in every file: b pairs, n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

CHOSEN, REJECTED = 0, 1

Message = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`, in the form chat templates take."""

Text = str | list[Message]
"""Plain text, or a list of messages."""

Array = Any
"""A numpy or jax array (jax is not imported here: this module is imported by everything)."""


class PreferenceRow(NamedTuple):
    """One preference as people write it. The three parts are all strings or all message lists."""

    prompt: Text
    chosen: Text
    rejected: Text
    origin: str  # where the row came from, for messages: "pairs.jsonl:17"


class CompletionRow(NamedTuple):
    """One supervised example: a prompt and the completion to learn, both strings or both message lists.

    A `messages` row has its last assistant turn as the completion and all before it as the prompt.
    """

    prompt: Text
    completion: Text
    origin: str


class TokenizedPair(NamedTuple):
    """A preference row as token ids, int32 vectors; `prompt_ids` is shared by both sides.

    The two sequences a model sees are prompt_ids + chosen_ids and prompt_ids + rejected_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    origin: str


class TokenizedCompletion(NamedTuple):
    """A supervised example as token ids: tokens int32 [t], completion_mask bool [t], True where the loss falls."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    origin: str


class PreferenceBatch(NamedTuple):
    """A right-padded batch of pairs, chosen at side 0 and rejected at side 1.

    Attributes:
      tokens: int32 [b, 2, t].
      attention_mask: bool [b, 2, t], True on real tokens.
      completion_mask: bool [b, 2, t], True on completion tokens (the mask at t speaks of the token at t).
      reference_logps: float32 [b, 2] summed or [b, 2, t] per token (the value at t is of the token at t), or None.
      weights: float32 [b], 1 for real pairs and 0 for padding pairs; None means all 1.
    """

    tokens: Array
    attention_mask: Array
    completion_mask: Array
    reference_logps: Array | None = None
    weights: Array | None = None


class CompletionBatch(NamedTuple):
    """A right-padded batch of supervised examples: tokens int32 [b, t], masks bool [b, t], weights f32 [b]."""

    tokens: Array
    attention_mask: Array
    completion_mask: Array
    weights: Array
