"""A model that takes part in a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.generation.chat.chat_view import TokenLine
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import FinishReason, Sampling
from jdpo.types import Text

_PARTS = "\ufffd"
"""What decoders write for bytes that are no whole character."""


class AnswerStream:
    """An answer that is being drawn.

    Attributes:
      end: why it ended; None before its end.
    """

    def __init__(self, pieces: Generator[str, None, FinishReason]) -> None:
        self._drawn = pieces
        self.end: FinishReason | None = None

    def pieces(self) -> Generator[str, None, None]:
        """Yields the text piece by piece."""
        self.end = yield from self._drawn


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model of a conversation.

    Attributes:
      model: the model.
    """

    model: LoadedModel

    @property
    def is_chat(self) -> bool:
        """True if it answers messages, False if it continues text."""
        return self.model.tokenizer.has_chat_template

    def stream(self, prompt: Text, sampling: Sampling, sample: int) -> AnswerStream:
        """Starts an answer.

        Args:
          sample: number of the answer among those to the same prompt.

        Raises:
          ValueError: the prompt leaves no position for an answer, or the chat template refuses it.
        """
        ids = encode_prompt(RowTexts(prompt, (), "the conversation"), self.model.tokenizer)
        # What the template refuses is refused below, with the reason.
        num_tokens = 0 if isinstance(ids, Dropped) else len(ids)
        positions = self.model.model.config.max_positions
        if num_tokens >= positions:
            raise ValueError(
                f"the conversation has {num_tokens} tokens, and {self.model.name} has {positions} positions; /undo or "
                "/reset shortens it"
            )
        return AnswerStream(self.model.stream(prompt, **dataclasses.asdict(sampling), sample=sample))

    def next_tokens(self, prompt: Text, start: str, num: int) -> list[TokenLine]:
        """Returns the most probable next tokens of an answer that begins with `start`, or starts."""
        found = self.model.next_tokens(prompt, num, start=start)
        return [TokenLine(self._shown(one.piece, one.token), one.logp) for one in found]

    def logps(self, prompt: Text, answer: str) -> list[TokenLine]:
        """Returns the tokens of an answer with their log-probabilities."""
        found = self.model.logps(prompt, answer)
        tokens = zip(found.pieces, found.tokens, found.logps, strict=True)
        return [TokenLine(self._shown(piece, token), logp) for piece, token, logp in tokens]

    def _shown(self, piece: str, token: int) -> str:
        """Returns the text of a token; its name in the vocabulary if it is only a part of a character."""
        return piece if piece.strip(_PARTS) else str(self.model.tokenizer.hf.convert_ids_to_tokens(token))
