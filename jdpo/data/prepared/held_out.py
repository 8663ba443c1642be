"""Training and evaluation rows told apart by a hash of their prompt, so that no prompt is on both sides."""

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
    """One side of a split by prompt.

    Attributes:
      side: the rows to train on, or those held out.
      fraction: share of the prompts that is held out.
    """

    side: Literal["train", "eval"]
    fraction: float

    def has(self, key: int) -> bool:
        """Whether a row with this `prompt_key` is on this side.

        >>> [Part("eval", 0.25).has(key) for key in (0, 2**62 - 1, 2**62, 2**64 - 1)]
        [True, True, False, False]
        """
        return (key < self.fraction * 2.0**64) == (self.side == "eval")  # Python compares int and float exactly

    @property
    def others(self) -> str:
        """What the rows of the other side are counted as."""
        return HELD_OUT if self.side == "train" else KEPT_FOR_TRAINING


def prompt_key(prompt: Text) -> int:
    """A 64-bit hash of a prompt, the same for every data set, tokenizer and machine.

    A prompt in plain text has the key of the one user turn that says the same.

    >>> prompt_key("Hi") == prompt_key([{"content": "Hi", "role": "user"}])
    True
    """
    messages = comparable(prompt)
    # ASCII alone, since half of a surrogate pair has no UTF-8; repr for what a Parquet file has and JSON has not.
    text = json.dumps(messages, sort_keys=True, separators=(",", ":"), default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def turn_key(key: int, number: int) -> int:
    """The key of an earlier turn that is a sequence of its own, of a row whose prompt has `key`.

    It is neither the row's, as the turns of a row do not repeat one another, nor that of the turn's own history, since
    rows are held out as a whole.
    """
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest(), "big")
