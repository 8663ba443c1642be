"""The values that travel between the rooms of jdpo.

Axes, here and in every file: b pairs, n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHOSEN, REJECTED = 0, 1

Message = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`, in the form chat templates take."""

Text = str | list[Message]
"""Plain text, or a list of messages."""

HOST_MEMORY = "pinned_host"
"""Memory of the host that a device reads and writes by itself, by JAX's name."""

if TYPE_CHECKING:
    import jax

    AnyArray = jax.Array | NDArray[Any]
else:
    AnyArray = Any  # everything imports this module, so it imports jax for type checkers only
"""An array of numpy, as the host builds batches, or of jax, as a step reads them."""


class PreferenceRow(NamedTuple):
    """One preference as people write it. The three parts are all strings or all message lists.

    Attributes:
      prompt: what is answered.
      chosen: the better answer.
      rejected: the worse one.
      origin: where the row came from, for messages: "pairs.jsonl:17".
      margin: the score of the chosen side minus that of the rejected one, in the units of the file; None: no scores.
      tools: what the conversation may call, as chat templates take them; None where it has none, and in plain text.
      notes: what is worth counting of how the row was read.
      template_kwargs: variables for the chat template, which override `chat_template_kwargs` of the config.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    origin: str
    margin: float | None = None
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    template_kwargs: dict[str, Any] | None = None


class CompletionRow(NamedTuple):
    """One supervised example: a prompt and the completion to learn, both strings or both message lists.

    A `messages` row has its last assistant turn as the completion and all before it as the prompt. `tools`, `notes` and
    `template_kwargs`: as in `PreferenceRow`.
    """

    prompt: Text
    completion: Text
    origin: str
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    template_kwargs: dict[str, Any] | None = None


class TokenizedPair(NamedTuple):
    """A preference row as token ids, int32 vectors; `prompt_ids` is shared by both sides.

    The two sequences a model sees are prompt_ids + chosen_ids and prompt_ids + rejected_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    origin: str


class MaskedPair(NamedTuple):
    """A preference row of which some completion tokens are read and not learnt: those of tools and users between turns.

    As `TokenizedPair`, with a mask bool of the length of each completion, True on the tokens to learn.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_mask: np.ndarray
    origin: str


AnyPair = TokenizedPair | MaskedPair


def completions_of(pair: AnyPair) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns token ids and mask of the chosen and of the rejected completion; a TokenizedPair is learnt whole."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    if isinstance(pair, MaskedPair):
        return (chosen, pair.chosen_mask), (rejected, pair.rejected_mask)
    return (chosen, np.ones(len(chosen), bool)), (rejected, np.ones(len(rejected), bool))


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
      score_margins: float32 [b], by how much the chosen answer was scored higher than the rejected one, above 0 for
        real pairs. Only for losses with an option that reads scores; None otherwise.
    """

    tokens: AnyArray
    attention_mask: AnyArray
    completion_mask: AnyArray
    reference_logps: AnyArray | None = None
    weights: AnyArray | None = None
    score_margins: AnyArray | None = None


class CompletionBatch(NamedTuple):
    """A right-padded batch of supervised examples: tokens int32 [b, t], masks bool [b, t], weights f32 [b]."""

    tokens: AnyArray
    attention_mask: AnyArray
    completion_mask: AnyArray
    weights: AnyArray


class RouterStats(NamedTuple):
    """What the routers of a model's layers did with sequences or rows, summed over layers and tokens.

    Each token counts with a weight: 0 on padding, and for one that stands for several sequences their number.

    Attributes:
      assignments: float [n, e], tokens that went to each expert.
      probabilities: float [n, e], the routers' probabilities of each expert.
      tokens: float [n], tokens.
    """

    assignments: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


class Routed(NamedTuple):
    """What a model with experts gives: `output` is what others give."""

    output: jax.Array
    router: RouterStats


class PackedBatch(NamedTuple):
    """A step's items (pairs or supervised rows) in rows of slots, each prompt once.

    There are q = n * p attention sequences; that of side j of item i is n * i + j.

    Everything that is not in use holds zeros unless said otherwise, and indices stay in range: it may be computed
    with, is read by nothing that is scored, and may hold anything in range.

    Axes: k micro-batches, m rows of slots, s slots, p items of a row, n sides of an item (2 of a pair), t places of a
    sequence, c scored tokens; on a device, a micro-batch is without k. See `jdpo.data.batching.packing`.

    Attributes:
      tokens: int32 [k, m, s].
      positions: int32 [k, m, s], restarting with each item; a second side goes on where the prompt ends.
      gather: int32 [k, m, q, t], the slot that each place of an attention sequence reads; places behind its length
        read any slots.
      lengths: int32 [k, m, q], places in use of each attention sequence, at least 1.
      scatter: int32 [k, m, s], the place among (q t) whose attention output is a slot's: of prompts in the first side.
      readers: int32 [k, m, n, s], all the places that read a slot, in the sequence of each side, q * t for none. The
        transpose of `gather` is a sum over them (no scatter-add): readers[..., 0, :] is `scatter` but for completions
        of second sides, whose place is in readers[..., 1, :], and slots that are not in use, which have none.
      logp_slot: int32 [k, m, c], the slot whose hidden state predicts a scored token.
      logp_target: int32 [k, m, c], that token.
      logp_pair: int32 [k, m, c], n * item + side within the row; n * p behind the last scored token.
      pair_weight: float32 [k, m, p], 1 for items and 0 for padding.
      pair_row: int32 [k, m, p], the row of the data that an item is.
      logp_reference: float32 or float64 [k, m, c], the reference's log-prob of each scored token; None: not cached.
      pair_score_margin: float32 [k, m, p], `PreferenceBatch.score_margins` of each pair, and 1 for padding; None: the
        loss reads no scores.
    """

    tokens: AnyArray
    positions: AnyArray
    gather: AnyArray
    lengths: AnyArray
    scatter: AnyArray
    readers: AnyArray
    logp_slot: AnyArray
    logp_target: AnyArray
    logp_pair: AnyArray
    pair_weight: AnyArray
    pair_row: AnyArray
    logp_reference: AnyArray | None = None
    pair_score_margin: AnyArray | None = None
