"""A model that takes part in a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.messages import assistant
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.generation.asking.answer_message import read_message, stripped
from jdpo.generation.asking.channels import ChannelView, has_channels
from jdpo.generation.chat.chat_view import TokenLine
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import FinishReason, Sampling
from jdpo.types import Message, Text

_PARTS = "\ufffd"
"""What decoders write for bytes that are no whole character."""


class AnswerStream:
    """An answer that is being drawn.

    Attributes:
      text: what has been drawn so far, the markers of thoughts and channels included.
      end: why it ended; None before its end.
    """

    def __init__(self, pieces: Generator[str, None, FinishReason], row: RowTexts, tokenizer: Tokenizer) -> None:
        """
        Args:
          row: the prompt.
          tokenizer: of the model.
        """
        self._drawn, self._row, self._tokenizer = pieces, row, tokenizer
        self.text = ""
        self.end: FinishReason | None = None

    def pieces(self) -> Generator[str, None, None]:
        """Yields what is shown of the answer, piece by piece: its text, or its channels by name."""
        view = ChannelView() if not self._row.is_text and has_channels(self._tokenizer) else None
        for piece in self._recorded():
            self.text += piece
            if shown := piece if view is None else view.push(piece):
                yield shown
        if view is not None and (rest := view.finish()):
            yield rest

    def _recorded(self) -> Generator[str, None, None]:
        self.end = yield from self._drawn

    def message(self) -> Message:
        """Returns the answer as a message, as the next prompt has it."""
        read = read_message(self.text, self._row, self._tokenizer, ended=self.end == "stop")
        return assistant(self.text) if read is None else stripped(read)


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
        row = RowTexts(prompt, (), "the conversation")
        ids = encode_prompt(row, self.model.tokenizer)
        # What the template refuses is refused below, with the reason.
        num_tokens = 0 if isinstance(ids, Dropped) else len(ids)
        positions = self.model.model.config.max_positions
        if num_tokens >= positions:
            raise ValueError(
                f"the conversation has {num_tokens} tokens, and {self.model.name} has {positions} positions; /undo or "
                "/reset shortens it"
            )
        drawn = self.model.stream(prompt, **dataclasses.asdict(sampling), sample=sample)
        return AnswerStream(drawn, row, self.model.tokenizer)

    def next_tokens(self, prompt: Text, start: str, num: int) -> list[TokenLine]:
        """Returns the most probable next tokens of an answer that begins with `start`, or starts."""
        found = self.model.next_tokens(prompt, num, start=start)
        return [TokenLine(self._shown(one.piece, one.token), one.logp) for one in found]

    def logps(self, prompt: Text, answer: Text) -> list[TokenLine]:
        """Returns the tokens of an answer with their log-probabilities."""
        found = self.model.logps(prompt, answer)
        tokens = zip(found.pieces, found.tokens, found.logps, strict=True)
        return [TokenLine(self._shown(piece, token), logp) for piece, token, logp in tokens]

    def _shown(self, piece: str, token: int) -> str:
        """Returns the text of a token; its name in the vocabulary if it is only a part of a character."""
        return piece if piece.strip(_PARTS) else str(self.model.tokenizer.hf.convert_ids_to_tokens(token))
