"""A model that can be asked: its answers, their log-probabilities, and the tokens that may come next."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.messages import assistant, content_text
from jdpo.data.tokens.boundaries import split_rows
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import NOT_UNICODE, RowTexts, is_unicode
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.generation.asking.answer_message import message_of
from jdpo.generation.asking.answer_text import PieceDecoder
from jdpo.generation.asking.token_logps import NextToken, TokenLogps, completion_logps, next_logps
from jdpo.generation.engine import Drawn, Engine
from jdpo.generation.prompts import make_question
from jdpo.generation.values import Answer, FinishReason, Sampling
from jdpo.models.transformer import Params, Transformer, Weights, float32_products
from jdpo.types import Message, Text


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LoadedModel:
    """A model with its tokenizer, opened with `jdpo.load`.

    A prompt is plain text, which is continued as it is, or a list of messages, which the chat template writes:

        model = jdpo.load("runs/first")
        model.generate([{"role": "user", "content": "What is the capital of Ireland?"}], n=4)

    Attributes:
      model: the network.
      params: its weights on `mesh`: a tree of arrays, or `Weights` with adapters that are not merged.
      tokenizer: the tokenizer with its chat template.
      mesh: the devices that hold the weights.
      name: what was opened, for messages.
      digest: a digest of the weights and the config.
      end_token_ids: the tokens that end an answer: those of the tokenizer and of generation_config.json.
    """

    model: Transformer
    params: Params | Weights
    tokenizer: Tokenizer
    mesh: Mesh
    name: str
    digest: str
    end_token_ids: tuple[int, ...]

    def __repr__(self) -> str:
        # Without the weights, which would fill a notebook.
        return f"<LoadedModel {self.name!r}: {self.model.config.family}, {self.dtype}, {dict(self.mesh.shape)}>"

    @property
    def dtype(self) -> str:
        """The dtype of the computation, such as "bfloat16"."""
        return jnp.dtype(self.model.compute_dtype).name

    # --- answers

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        *,
        n: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        tools: list[dict[str, Any]] | None = ...,
        template_kwargs: Mapping[str, Any] | None = ...,
    ) -> list[Answer]: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[Message]],
        *,
        n: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        tools: list[dict[str, Any]] | None = ...,
        template_kwargs: Mapping[str, Any] | None = ...,
    ) -> list[list[Answer]]: ...

    def generate(
        self,
        prompt: str | list[Message] | list[str] | list[list[Message]],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Answer] | list[list[Answer]]:
        """Draws answers to one prompt, or to each of a list of prompts.

        The draws of an answer depend on the seed, its prompt and its number alone, not on the other prompts.

        Args:
          prompt: text or messages; or a list of texts, or of lists of messages.
          n: number of answers to each prompt.
          temperature, top_p, top_k, max_new_tokens, seed: see `jdpo generate --help`; temperature 0 is greedy.
          tools: JSON schemas of the tools that the conversations may call.
          template_kwargs: variables for the chat template.

        Returns:
          The n answers to the prompt; for a list of prompts, a list with the n answers to each.

        Raises:
          ValueError: a value is out of range, a prompt is too long for the model, or the chat template refuses it.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
        if not (isinstance(n, Integral) and n >= 1):
            raise ValueError(f"n: expected 1 or more answers to each prompt, found {n}")
        if not isinstance(prompt, str | list):
            raise ValueError(f"prompt: expected text, messages, or a list of these, found {type(prompt).__name__}")
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], dict))
        prompts = cast("list[Text]", [prompt] if is_one else prompt)
        rows = [self._row(text, tools, template_kwargs) for text in prompts]
        ids = [self._ids(row) for row in rows]
        found: list[list[Answer]] = [[] for _ in rows]
        prompt_ids = [
            make_question(row.prompt, "", tools=tools, template_kwargs=template_kwargs).prompt_id for row in rows
        ]
        for drawn in self.draw(ids, n, sampling):
            at = drawn.prompt
            found[at].append(self.answer_of(drawn, prompt_ids[at], rows[at], ids[at]))
        # Shorter answers are complete earlier.
        for answers in found:
            answers.sort(key=lambda answer: answer.sample)
        return found[0] if is_one else found

    def stream(
        self,
        prompt: Text,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        sample: int = 0,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[str, None, FinishReason]:
        """Yields the text of one answer piece by piece, as it is drawn; `generate` draws the very same answer.

        A piece holds whole characters: one whose bytes span several tokens is yielded with the last of them. The text
        of the end token is not part of the answer. Thoughts, and the markers around them, are part of the text here.

        Args:
          prompt: text or messages.
          sample: number of the answer among those of `generate`.
          temperature, top_p, top_k, max_new_tokens, seed, tools, template_kwargs: see `generate`.

        Returns:
          The value of the generator is why the answer ends.

        Raises:
          ValueError: see `generate`.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
        ids = self._ids(self._row(prompt, tools, template_kwargs))
        pieces = PieceDecoder(self.tokenizer, ids)
        with float32_products(self.model):
            tokens = self.engine(sampling).stream(ids, sample)
        # Not the generator itself: wrong arguments should be errors of this call, not of the first piece.
        return self._pieces(tokens, pieces)

    def _pieces(self, tokens: Iterator[tuple[int, float]], pieces: PieceDecoder) -> Generator[str, None, FinishReason]:
        reason: FinishReason = "length"
        while True:
            # Entered for each token, since a context that is open at a yield would also hold for the caller.
            with float32_products(self.model):
                token = next(tokens, None)
            if token is None:
                break
            if token[0] in self.end_token_ids:
                reason = "stop"
                break
            if piece := pieces.push(token[0]):
                yield piece
        if rest := pieces.finish():
            yield rest
        return reason

    def engine(self, sampling: Sampling) -> Engine:
        """Returns the engine that draws answers in this way."""
        return self._engine.with_sampling(sampling)

    # Made for the first answer, since it copies the weights, and kept for all ways of drawing.
    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(self.model, self.params, end_token_ids=self.end_token_ids, sampling=Sampling(), mesh=self.mesh)

    def free_engine(self) -> None:
        """Frees the engine's copy of the weights; the next call that draws an answer makes it again."""
        self.__dict__.pop("_engine", None)

    def draw(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling) -> Iterator[Drawn]:
        """Yields answers to prompts of token ids as they are completed, in the precision of the model's dtype."""
        with float32_products(self.model):
            answers = self.engine(sampling).run_as_completed(prompts, num_samples)
        while True:
            with float32_products(self.model):
                drawn = next(answers, None)
            if drawn is None:
                return
            yield drawn

    def answer_of(self, drawn: Drawn, prompt_id: str, row: RowTexts, prompt_ids: Sequence[int]) -> Answer:
        """Returns an answer as a message.

        Args:
          row, prompt_ids: the prompt that it answers, and its tokens.

        Raises:
          FloatingPointError: the model's logits are not finite.
        """
        ended = drawn.finish_reason == "stop"
        tokens = drawn.tokens[:-1] if ended else drawn.tokens
        message = message_of(row, prompt_ids, tokens, self.tokenizer, ended=ended)
        # In float64, since float32 would lose digits over a thousand tokens.
        logp = float(np.sum(np.array(drawn.logps, np.float64)))
        if not np.isfinite(logp):
            raise FloatingPointError(
                f"{self.name} gives logits of NaN or infinity for {row.origin}: the weights are damaged, training has "
                "ruined them, or they overflow in this dtype; try float32"
            )
        return Answer(prompt_id, drawn.sample, message, drawn.tokens, drawn.finish_reason, logp)

    # --- probabilities

    def logps(
        self,
        prompt: Text,
        answer: Text,
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokenLogps:
        """Returns the log-probability of each token of an answer, with the tokens that training would learn.

        Args:
          prompt: text or messages.
          answer: the text of the answer, or the messages that answer.
          tools, template_kwargs: see `generate`.

        Raises:
          ValueError: the answer cannot be learnt: it is empty, too long for the model, or refused by the template.
        """
        _check_text(answer, "answer")
        side = [assistant(answer)] if isinstance(answer, str) and not isinstance(prompt, str) else answer
        row = self._row(prompt, tools, template_kwargs)._replace(completions=(side,))
        (split,) = split_rows([row], self.tokenizer)
        if isinstance(split, Dropped):
            raise ValueError(f"the answer cannot be scored: {_why(split)}")
        if not len(split.prompt):
            raise ValueError(
                "the answer cannot be scored: empty prompt, after which its first token has no probability"
            )
        (completion,) = split.completions
        with float32_products(self.model):
            logps = completion_logps(self.model, self.params, self.mesh, split.prompt, completion)
        decoder = PieceDecoder(self.tokenizer, split.prompt)
        pieces = [decoder.push(token) for token in completion]
        pieces[-1] += decoder.finish()
        return TokenLogps(completion, pieces, logps.tolist())

    def next_tokens(
        self,
        prompt: Text,
        k: int = 10,
        *,
        start: str = "",
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[NextToken]:
        """Returns the k most probable tokens that an answer begins or continues with, the most probable first.

        Args:
          prompt: text or messages.
          k: number of tokens.
          start: the text with which the answer begins.
          tools, template_kwargs: see `generate`.

        Raises:
          ValueError: see `generate`.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more tokens, found {k}")
        ids = self._ids(self._row(prompt, tools, template_kwargs))
        if start:
            ids = [*ids, *self.tokenizer.encode_completions([start])[0]]
        with float32_products(self.model):
            logps = next_logps(self.model, self.params, self.mesh, ids)
        # Stable, so that tokens of equal probability are in the order of their ids.
        best = np.argsort(-logps, kind="stable")[:k].tolist()
        return [NextToken(token, self._piece(ids, token), float(logps[token])) for token in best]

    def _piece(self, context: Sequence[int], token: int) -> str:
        decoder = PieceDecoder(self.tokenizer, context)
        return decoder.push(token) + decoder.finish()

    # --- prompts

    def _row(
        self, prompt: Text, tools: list[dict[str, Any]] | None, template_kwargs: Mapping[str, Any] | None
    ) -> RowTexts:
        _check_text(prompt, "prompt")
        if not is_unicode(json.dumps([prompt, tools], ensure_ascii=False)):
            raise ValueError(f"prompt: {NOT_UNICODE}")
        return RowTexts(prompt, (), "the prompt", tools, template_kwargs)

    def _ids(self, row: RowTexts) -> list[int]:
        ids = encode_prompt(row, self.tokenizer)
        if isinstance(ids, Dropped):
            raise ValueError(f"the prompt cannot be answered: {_why(ids)}")
        return ids


def _check_text(text: object, name: str) -> None:
    is_conversation = isinstance(text, list) and all(isinstance(message, dict) for message in text)
    if not (isinstance(text, str) or is_conversation):
        raise ValueError(f"{name}: expected text or a list of messages, found {type(text).__name__}")
    for index, message in enumerate(text if isinstance(text, list) else []):
        # Templates of multimodal models would write a placeholder for an image that the model does not get.
        if isinstance(message.get("content"), list):
            content_text(message["content"], f"the content of message {index}", name)


def _why(dropped: Dropped) -> str:
    return f"{dropped.reason}: {dropped.detail}" if dropped.detail else dropped.reason
