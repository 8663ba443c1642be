"""The split into training and evaluation rows by a hash of the prompt, so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, NamedTuple

from jdpo.data.schemas.comparing import comparable
from jdpo.types import Text

HELD_OUT = "held out for evaluation"
KEPT_FOR_TRAINING = "kept for training"
TOLD_IN_TRAINING = "without a prompt to tell them by: dropped, and counted among the training rows"


class Part(NamedTuple):
    """One side of the split.

    Attributes:
      side: "train" for the rows to train on, "eval" for those held out.
      fraction: share of the prompts that is held out.
    """

    side: Literal["train", "eval"]
    fraction: float

    def has(self, key: int) -> bool:
        """Returns whether a row with this `prompt_key` is on this side.

        >>> [Part("eval", 0.25).has(key) for key in (0, 2**62 - 1, 2**62, 2**64 - 1)]
        [True, True, False, False]
        """
        # Python compares int and float exactly, so no key near the boundary is on both sides or on none.
        return (key < self.fraction * 2.0**64) == (self.side == "eval")

    @property
    def others(self) -> str:
        """The name under which rows of the other side are counted."""
        return HELD_OUT if self.side == "train" else KEPT_FOR_TRAINING


def prompt_key(prompt: Text) -> int:
    """Returns a 64-bit hash of a prompt that is the same for every dataset, tokenizer and machine.

    A prompt in plain text has the same key as a conversation of one user turn with that text.

    >>> prompt_key("Hi") == prompt_key([{"content": "Hi", "role": "user"}])
    True
    """
    messages = comparable(prompt)
    # ASCII, because half of a surrogate pair has no UTF-8 form; repr for values of Parquet files that JSON lacks.
    text = json.dumps(messages, sort_keys=True, separators=(",", ":"), default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def turn_key(key: int, number: int) -> int:
    """Returns the key of an earlier turn that is a sequence of its own, given the key of its row's prompt.

    It differs from the row's key, so that the turns of a row do not count as repeats of one prompt, and from the key of
    the turn's own history, because rows are held out as a whole.
    """
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest(), "big")
