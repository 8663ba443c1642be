"""Answers from an OpenAI-compatible server: vLLM, SGLang, `transformers serve` and others."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from jdpo.generation.servers.responses import UnreadableReplyError
from jdpo.generation.servers.server_client import Failure, Request, ServerClient
from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.generation.values import Answer, FinishReason, Question, Sampling, Unanswered
from jdpo.safe_text import terminal
from jdpo.words import figure

_logger = logging.getLogger(__name__)

_FINISHED: dict[Any, FinishReason] = {
    "stop": "stop",
    "length": "length",
    # The model has ended its turn with a call.
    "tool_calls": "stop",
    "function_call": "stop",
}
_KEPT = {"reasoning_content": "reasoning_content", "reasoning": "reasoning_content", "tool_calls": "tool_calls"}
"""Fields of a message that are part of the answer besides its content -> their names in chat templates."""

_FILTERED = "content_filter"
"""A finish_reason that asking again would not change."""
_LONGEST_REASON = 40

_IDENTICAL_SHARE = 0.5
"""A warning names a server that repeats itself for more than this share of the questions."""


class Choice(NamedTuple):
    """One answer of a reply; see `Answer`."""

    message: dict[str, Any]
    tokens: list[int] | None
    finish_reason: FinishReason
    logp: float | None


class Reply(NamedTuple):
    """A reply of the server.

    Attributes:
      choices: the answers; Failure for one that the server ended for another reason than the model.
      num_tokens: of all choices; 0: not known.
    """

    choices: list[Choice | Failure]
    num_tokens: int


class EndpointSource:
    """Asks a server for answers. A context manager, since it holds connections.

    A question's samples are asked for in one request with `n`. A server whose reply holds fewer choices is asked once
    per sample from then on, each time with a seed of its own.

    Attributes:
      client: the connections, with counts of retries.
    """

    def __init__(
        self,
        settings: ServerSettings,
        sampling: Sampling,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        on_answer: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """Opens no connection yet.

        Args:
          settings: where the server is.
          sampling: how it is to draw answers.
          template_kwargs: variables for the chat template of every conversation; those of a question override them.
          on_answer: called with the number of tokens of each answer as soon as it is there; 0: not known.

        Raises:
          ValueError: the extra `endpoint` is not installed.
        """
        self.client = ServerClient(settings)
        self._sampling, self._on_answer = sampling, on_answer
        self._template_kwargs = dict(template_kwargs or {})
        # Questions that have been begun, by prompt_id.
        self._begun: dict[str, asyncio.Task[list[Choice | Failure]]] = {}
        self._takes_n = True
        self._num_asked = 0
        self._num_identical = 0
        self._warned = False
        # The server's words about the first failure of each kind.
        self._failures: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.client.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.client.__exit__(*error)
        for task in self._begun.values():
            if not task.cancelled():
                task.exception()  # of a question that nobody asks for any more

    def describe(self) -> dict[str, Any]:
        """Returns the model's name, and under `about` where the server is and what has been seen of it.

        `identical_samples` counts the questions whose samples are all the same although the temperature is above 0.
        """
        about: dict[str, Any] = {"endpoint": self.client.settings.shown}
        if self._num_asked:
            about["server"] = {
                "questions": self._num_asked,
                "retried": dict(sorted(self.client.retried.items())),
                "not_taken": sorted(self.client.not_taken),
                "several_choices": self._takes_n,
                "identical_samples": self._num_identical,
                "first_failures": self._failures,
            }
        kwargs = {"template_kwargs": self._template_kwargs} if self._template_kwargs else {}
        return {"served_model": self.client.model, **kwargs, "about": about}

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> list[Answer | Unanswered]:
        """Asks for `num_samples` answers to each question.

        Args:
          following: questions of the next calls; some of them are asked already, so that the server stays busy.

        Returns:
          num_samples entries per question, question by question. A question that the server refuses, or cannot
          answer after all retries, has Unanswered entries.

        Raises:
          ValueError: the server refuses everything, such as an unknown key or model.
          ConnectionError: the server has stopped responding.
        """
        found = self.client.run(self._answered(questions, num_samples, following))
        entries: list[Answer | Unanswered] = []
        for question, choices in zip(questions, found, strict=True):
            entries += [self._entry(question, sample, choice) for sample, choice in enumerate(choices)]
            texts = {repr(choice.message) for choice in choices if isinstance(choice, Choice)}
            complete = all(isinstance(choice, Choice) for choice in choices)
            self._num_identical += complete and num_samples > 1 and self._sampling.temperature > 0 and len(texts) == 1
        self._num_asked += len(questions)
        self._name_a_server_that_repeats_itself()
        return entries

    def _entry(self, question: Question, sample: int, choice: Choice | Failure) -> Answer | Unanswered:
        if isinstance(choice, Choice):
            return Answer(question.prompt_id, sample, *choice)
        # The server's words may differ from prompt to prompt, so failures are counted without it.
        if choice.reason not in self._failures:
            self._failures[choice.reason] = choice.detail
            _logger.warning("%s: %s: %s", self.client.settings.shown, choice.reason, choice.detail)
        return Unanswered(question.prompt_id, sample, choice.reason, again=not choice.lasting)

    def _name_a_server_that_repeats_itself(self) -> None:
        if self._warned or self._num_identical <= _IDENTICAL_SHARE * self._num_asked:
            return
        self._warned = True
        _logger.warning(
            "%s gives identical answers to different seeds at temperature %g: all samples are the same for %s of %s. "
            "The server may ignore the temperature; `transformers serve` samples only if the model's "
            "generation_config.json has do_sample: true",
            self.client.settings.shown,
            self._sampling.temperature,
            f"{self._num_identical:,}",
            figure(self._num_asked, "question"),
        )

    async def _answered(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question]
    ) -> list[list[Choice | Failure]]:
        # As many as the server works on at a time: what a kill may cost besides this shard.
        ahead = following[: self.client.settings.concurrency]
        for question in (*questions, *ahead):  # requests wait for their turn in this order
            if question.prompt_id not in self._begun:
                self._begun[question.prompt_id] = self.client.begin(self._all_samples(question, num_samples))
        return await asyncio.gather(*(self._begun.pop(question.prompt_id) for question in questions))

    async def _all_samples(self, question: Question, num_samples: int) -> list[Choice | Failure]:
        choices: list[Choice | Failure] = []
        while len(choices) < num_samples:
            # Without `n`, one request after the other: other questions fill the server meanwhile.
            wanted = num_samples - len(choices) if self._takes_n else 1
            got = await self.client.ask(self._request(question, len(choices), wanted), _read_reply)
            if isinstance(got, Failure):
                return [*choices, *[got] * (num_samples - len(choices))]
            self._takes_n = self._takes_n and len(got.choices) >= wanted and "n" not in self.client.not_taken
            choices += got.choices[:wanted]
            for choice in got.choices[:wanted]:
                if isinstance(choice, Choice):
                    self._on_answer(got.num_tokens // len(got.choices))
        return choices

    def _request(self, question: Question, sample: int, num_choices: int) -> Request:
        sampling = self._sampling
        body: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request_seed(sampling.seed, question.prompt_id, sample),
            # vLLM and SGLang return the token ids for this.
            "return_token_ids": True,
        }
        if sampling.top_k is not None:
            body["top_k"] = sampling.top_k
        if num_choices > 1:
            body["n"] = num_choices
        optional = ("return_token_ids", "logprobs", "n")
        if isinstance(question.prompt, str):
            return Request("completions", {**body, "prompt": question.prompt, "logprobs": 1}, optional)
        body |= {"messages": question.prompt, "logprobs": True}
        if question.tools:
            body["tools"] = question.tools
        if kwargs := self._template_kwargs | (question.template_kwargs or {}):
            body["chat_template_kwargs"] = kwargs
        return Request("chat/completions", body, optional)


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Returns the seed of a request, from 0 to 2**31 - 1, which all servers take.

    >>> request_seed(0, "a", 0) == request_seed(0, "a", 0) != request_seed(0, "a", 1)
    True
    """
    digest = hashlib.sha256(f"{seed} {prompt_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _read_reply(reply: dict[str, Any]) -> Reply:
    choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
    if not choices:
        raise UnreadableReplyError("no choices")
    usage = reply.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply([_read_choice(choice) for choice in choices], num_tokens if isinstance(num_tokens, int) else 0)


def _read_choice(choice: dict[str, Any]) -> Choice | Failure:
    found = choice["finish_reason"]
    if not isinstance(found, str):
        raise UnreadableReplyError(f"expected text as finish_reason, found {type(found).__name__}")
    reason = _FINISHED.get(found)
    if reason is None:  # such as a content filter, or an engine that was stopped; other choices may be answers
        text = f"finish_reason {terminal(found)[:_LONGEST_REASON]}"
        return Failure(text, "the server, not the model, ended the answer", lasting=found == _FILTERED)
    theirs = choice["message"] if "message" in choice else {"content": choice["text"]}
    # The content of an answer that is a call or a refusal is null.
    content = theirs["content"] or theirs.get("refusal") or ""
    if not isinstance(content, str):
        raise UnreadableReplyError(f"expected text as content, found {type(content).__name__}")
    message = {"role": "assistant", "content": _unicode(content)}
    message |= {name: theirs[key] for key, name in _KEPT.items() if theirs.get(key)}
    return Choice(message, _token_ids(choice), reason, _summed_logp(choice))


def _unicode(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """Returns the answer's token ids where the server returns them."""
    ids = choice.get("token_ids")
    if not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        return None
    return ids


def _summed_logp(choice: dict[str, Any]) -> float | None:
    """Returns the sum of the tokens' log-probabilities; None if the server does not return all of them."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return None
    values = logprobs.get("token_logprobs")
    if isinstance(content := logprobs.get("content"), list):  # of a conversation
        values = [token.get("logprob") for token in content]
    if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    return float(sum(values))
