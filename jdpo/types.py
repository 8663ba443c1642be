"""The values that travel between the packages of jdpo.

Axes, here and in every file: b pairs, n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Indices of the axis n of every array of pairs.
CHOSEN, REJECTED = 0, 1

Message = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`, in the form that chat templates take."""

Text = str | list[Message]
"""Plain text, or a list of messages."""

HOST_MEMORY = "pinned_host"
"""JAX's name for host memory that a device can read and write directly."""

if TYPE_CHECKING:
    import jax

    AnyArray = jax.Array | NDArray[Any]
else:
    AnyArray = Any  # everything imports this module, so it imports jax for type checkers only
"""An array of numpy, as the host builds batches, or of jax, as a step reads them."""


class PreferenceRow(NamedTuple):
    """A preference as people write it. The three parts are all strings or all message lists.

    Attributes:
      prompt: the text or conversation to answer.
      chosen: the better answer.
      rejected: the worse answer.
      origin: file and row, for messages: "pairs.jsonl:17".
      margin: score of the chosen answer minus score of the rejected one, in the units of the file; None: no scores.
      tools: the tools that the conversation may call, as chat templates take them; None: no tools, or plain text.
      notes: remarks on how the row was read, which are counted.
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
    """A supervised example: a prompt and the completion to learn, both strings or both message lists.

    The completion of a `messages` row is its last assistant turn, and the prompt is everything before it. `tools`,
    `notes` and `template_kwargs` are those of `PreferenceRow`.
    """

    prompt: Text
    completion: Text
    origin: str
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    template_kwargs: dict[str, Any] | None = None


class TokenizedPair(NamedTuple):
    """A preference row as token ids, int32 vectors. Both sides share `prompt_ids`.

    The model reads two sequences, prompt_ids + chosen_ids and prompt_ids + rejected_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    origin: str


class MaskedPair(NamedTuple):
    """A `TokenizedPair` with a mask for each completion, bool, True on the tokens to learn.

    The other completion tokens, of tools and users between the assistant turns, are read but not learnt.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_mask: np.ndarray
    origin: str


AnyPair = TokenizedPair | MaskedPair


def completions_of(pair: AnyPair) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns token ids and mask of the chosen and the rejected completion; a TokenizedPair is learnt whole."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    if isinstance(pair, MaskedPair):
        return (chosen, pair.chosen_mask), (rejected, pair.rejected_mask)
    return (chosen, np.ones(len(chosen), bool)), (rejected, np.ones(len(rejected), bool))


class TokenizedCompletion(NamedTuple):
    """A supervised example as token ids: tokens int32 [t], completion_mask bool [t], True on the tokens to learn."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    origin: str


class PreferenceBatch(NamedTuple):
    """A right-padded batch of pairs, chosen at side 0 and rejected at side 1.

    Attributes:
      tokens: int32 [b, 2, t].
      attention_mask: bool [b, 2, t], True on real tokens.
      completion_mask: bool [b, 2, t], True on completion tokens; the mask at t is that of the token at t.
      reference_logps: float32 [b, 2] summed or [b, 2, t] per token (the value at t is that of the token at t), or None.
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
    """Counts of the routers of a model's layers, for each sequence or row, summed over layers and tokens.

    Each token has a weight: 0 for padding, and the number of sequences for a token that several sequences share.

    Attributes:
      assignments: float [n, e], number of tokens sent to each expert.
      probabilities: float [n, e], sum of the routers' probabilities of each expert.
      tokens: float [n], number of tokens.
    """

    assignments: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


class Routed(NamedTuple):
    """The output of a model with experts: `output` is what a model without experts returns."""

    output: jax.Array
    router: RouterStats


class PackedBatch(NamedTuple):
    """The items of a step (pairs or supervised rows), packed into rows of slots, each prompt once.

    Attention sees a sequence for each side of each item, its prompt and its completion. Sequences are back to back in
    attention rows, from place 0 of a row on, and padding comes after the last one.

    Unused entries are zero unless stated otherwise. Indices in them are in range, so that computing with them is safe,
    and nothing that is scored reads them.

    Axes: k micro-batches, m rows of slots, s slots, p items of a row, n sides of an item (2 for a pair), q attention
    rows of a row of slots, u sequences of an attention row, t places of an attention row, c scored tokens. On a device,
    a micro-batch has no axis k. See `jdpo.data.batching.packing`.

    Attributes:
      tokens: int32 [k, m, s].
      positions: int32 [k, m, s], starting at 0 for each item; the second side continues where the prompt ends.
      gather: int32 [k, m, q, t], the slot that each place of an attention row reads; places after its last sequence
        read any slot.
      lengths: int32 [k, m, q, u], numbers of tokens of the sequences of each attention row, in order; 0 for none. Where
        u is 1, side j of item i is row n * i + j, and lengths are at least 1.
      scatter: int32 [k, m, s], the place among (q t) whose attention output belongs to a slot; for prompts, a place in
        the first side.
      readers: int32 [k, m, n, s], all places among (q t) that read a slot, one for each side; q * t for none. The
        transpose of `gather` is a sum over them, which needs no scatter-add. readers[..., 0, :] equals `scatter` except
        for completions of second sides, whose place is in readers[..., 1, :], and for unused slots, which have none.
      logp_slot: int32 [k, m, c], the slot whose hidden state predicts a scored token.
      logp_target: int32 [k, m, c], the scored token.
      logp_pair: int32 [k, m, c], n * item + side within the row; n * p after the last scored token.
      pair_weight: float32 [k, m, p], 1 for items and 0 for padding.
      pair_row: int32 [k, m, p], the row number of an item in the data.
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
