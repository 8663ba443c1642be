"""Requests to an OpenAI-compatible server: bounded concurrency, retries, and failures that are counted, never lost.

What a server does not take, such as `logprobs`, is left out if it is optional and named in `not_taken`. Sampling is
never left out: a server that refuses it refuses the request.
"""

from __future__ import annotations

import asyncio
import collections
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from jdpo.config.addresses import public_text
from jdpo.safe_text import terminal
from jdpo.words import figure, listed

T = TypeVar("T")
Path = Literal["chat/completions", "completions", "models"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WORTH_A_RETRY = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed later."""

_LONGEST_BACKOFF_SECONDS = 60.0
_MOST_OF_A_MESSAGE = 300
"""Characters of a server's error message that are shown."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where a server is, and how it is asked.

    Attributes:
      url: its address, which usually ends in /v1.
      model: the name of the model; None: the only one that the server lists.
      api_key_env: the environment variable that holds the API key; the key is "none" if it is not set.
      concurrency: largest number of requests at a time.
      timeout: seconds until a request counts as failed.
      retries: how often a failed request is sent again.
      backoff: seconds before the first of them, doubled before each further one.

    Raises:
      ValueError: a value is out of range, or the address holds a password.
    """

    url: str
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 5
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency: expected 1 or more, found {self.concurrency}")
        # Not `<= 0`, so that NaN is refused as well.
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: expected seconds above 0, found {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries: expected 0 or more, found {self.retries}")
        try:
            parts = urlsplit(self.url)
            found = parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            found = None
        if not found:
            raise ValueError(f"expected the address of a server, as http://localhost:8000/v1, found {self.shown!r}")
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                f"{self.shown}: the address of a server may not hold a password or a query, since it is written to "
                f"files; put the API key into the environment variable {self.api_key_env}"
            )

    @property
    def shown(self) -> str:
        """The address without anything that may be secret, for messages and files."""
        return public_text(self.url).rstrip("/")


class Request(NamedTuple):
    """A request for an answer.

    Attributes:
      path: below the server's address.
      body: everything but the model.
      optional: keys of `body` that are left out if the server refuses them.
    """

    path: Path
    body: dict[str, Any]
    optional: tuple[str, ...] = ()


class Failure(NamedTuple):
    """A request that failed after all retries.

    Attributes:
      reason: a few words, the same for all failures of a kind, to count them by.
      detail: what the server said.
      lasting: whether the server refused this request, so that sending it again would not help.
    """

    reason: str
    detail: str
    lasting: bool


class UnreadableReplyError(ValueError):
    """A reply that is not what the API promises."""


class ServerClient:
    """Sends requests to one server. A context manager, whose connections are closed at its end.

    Attributes:
      settings: as given.
      model: the model's name, known once the context is entered.
      retried: number of requests sent again, by reason.
      not_taken: optional keys that the server refused.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Opens no connection yet.

        Raises:
          ValueError: the extra `endpoint` is not installed.
        """
        openai = import_openai()
        self.settings = settings
        self.model = settings.model or ""
        self.retried: collections.Counter[str] = collections.Counter()
        self.not_taken: set[str] = set()
        self._key = os.environ.get(settings.api_key_env) or "none"
        # Proxies of the environment are for other machines, and `no_proxy` is often forgotten.
        local = urlsplit(settings.url).hostname in _LOOPBACK
        http_client = openai.DefaultAsyncHttpxClient(trust_env=False) if local else None
        self._openai = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=self._key,
            timeout=settings.timeout,
            # Retries are this class's own, so that they can be counted and unreadable replies are among them.
            max_retries=0,
            http_client=http_client,
        )
        self._runner = asyncio.Runner()
        self._slots = asyncio.Semaphore(settings.concurrency)
        # Some servers know only max_tokens, and some refuse it.
        self._max_tokens_key = "max_tokens"
        # Of the clock; a server that is asked too often names it for all requests.
        self._resume_at = 0.0
        self._failed_in_a_row = 0

    def __enter__(self) -> Self:
        try:
            if not self.model:
                self.model = self._runner.run(self._only_model())
        except BaseException:
            self._close()  # nothing else does if this method raises
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        self._runner.run(self._shut())
        self._runner.close()

    async def _shut(self) -> None:
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await self._openai.close()

    def run(self, task: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine that calls `ask`, and tasks that earlier ones have begun, until the coroutine returns.

        Raises:
          ValueError: the server refuses everything, such as an unknown key or model.
          ConnectionError: the server has stopped responding.
        """
        return self._runner.run(task)

    def ask_all(self, requests: Iterable[Request], read: Callable[[dict[str, Any]], T]) -> list[T | Failure]:
        """Sends requests, as `ask` does each; returns what became of them in their order."""

        async def gathered() -> list[T | Failure]:
            return await asyncio.gather(*(self.ask(request, read) for request in requests))

        return self.run(gathered())

    async def ask(self, request: Request, read: Callable[[dict[str, Any]], T]) -> T | Failure:
        """Sends a request, and sends it again while that may help.

        Args:
          read: reads the reply; it raises UnreadableReplyError, KeyError, IndexError or TypeError if it cannot.

        Raises:
          ValueError, ConnectionError: as `run`.
        """
        left_out: set[str] = set()
        failures = 0
        while True:
            async with self._slots:
                await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
                outcome = await self._attempt(request, left_out | self.not_taken, read)
            if not isinstance(outcome, _Failed):
                self.not_taken |= left_out
                self._failed_in_a_row = 0
                return outcome
            failure = outcome.failure
            if failure.lasting and self._can_adapt(outcome.message, request, left_out):
                continue
            failures += 1
            if failure.lasting or failures > self.settings.retries:
                self._count_failed(failure)
                return failure
            self.retried[failure.reason] += 1
            await asyncio.sleep(outcome.wait or self._backoff(failures))

    def _backoff(self, failures: int) -> float:
        # Random, so that requests that failed together are not sent again together.
        doubled = min(self.settings.backoff * 2 ** (failures - 1), _LONGEST_BACKOFF_SECONDS)
        return doubled * random.uniform(0.75, 1.0)

    def _count_failed(self, failure: Failure) -> None:
        self._failed_in_a_row += 1
        # Every request in flight and as many again have failed since the last success: the server is gone, or takes
        # nothing. Without this, each of 100,000 prompts would wait for all of its retries.
        if self._failed_in_a_row < 2 * self.settings.concurrency + 8:
            return
        text = (
            f"{self.settings.shown}: the last {figure(self._failed_in_a_row, 'request')} failed; the last of them: "
            f"{failure.reason}: {failure.detail}"
        )
        raise ValueError(text) if failure.lasting else ConnectionError(text)

    def _can_adapt(self, message: str, request: Request, left_out: set[str]) -> bool:
        """Changes what is sent after a refusal, where that may help; returns whether it did.

        Args:
          message: the server's.
          left_out: optional keys that the next attempt leaves out, which this function extends.
        """
        if self._max_tokens_key == "max_tokens" and "max_completion_tokens" in message:
            self._max_tokens_key = "max_completion_tokens"
            return True
        left = [key for key in request.optional if key not in left_out | self.not_taken]
        named = [key for key in left if re.search(rf"\b{key}\b", message)]
        # Without a name the prompt itself may be at fault, so what is left out counts only once the request succeeds.
        left_out |= set(named or left)
        return bool(left)

    async def _attempt(self, request: Request, left_out: set[str], read: Callable[[dict[str, Any]], T]) -> T | _Failed:
        openai = import_openai()
        try:
            # The client's own timeout starts anew with each byte that arrives.
            async with asyncio.timeout(self.settings.timeout):
                text = await self._send(request, left_out)
            return read(_json_object(text))
        except (openai.APITimeoutError, TimeoutError):
            return self._failed("timeout", f"no reply within {self.settings.timeout:g} seconds")
        except openai.APIStatusError as error:
            return self._of_status(error)
        except openai.APIConnectionError as error:
            return self._failed("no connection", str(error.__cause__ or error))
        except (UnreadableReplyError, LookupError, TypeError, AttributeError) as error:
            return self._failed("unreadable reply", f"{type(error).__name__}: {error}")

    async def _send(self, request: Request, left_out: set[str]) -> str:
        """Returns the reply as text: the client passes on what is not JSON, and hides fields that it does not know."""
        if request.path == "models":
            reply = await self._openai.models.with_raw_response.list()
        else:
            body = {key: value for key, value in request.body.items() if key not in left_out}
            if "max_tokens" in body:
                body[self._max_tokens_key] = body.pop("max_tokens")
            if request.path == "completions":
                create, asked = self._openai.completions.with_raw_response.create, "prompt"
            else:
                create, asked = self._openai.chat.completions.with_raw_response.create, "messages"
            reply = await create(model=self.model, **{asked: body.pop(asked)}, extra_body=body)
        text: str = reply.http_response.text
        return text

    def _of_status(self, error: Any) -> _Failed:
        status: int = error.status_code
        message = _message_of(error)
        shown = f"status {status}: {self._safe(message)}"
        if status in (401, 403):
            raise ValueError(
                f"{self.settings.shown} refuses the API key ({shown}); the key is read from the environment variable "
                f"{self.settings.api_key_env}"
            )
        if status in (404, 405):
            raise ValueError(
                f"{self.settings.shown} has no such model or address ({shown}); the model asked for is "
                f"{terminal(self.model)!r}, and the address usually ends in /v1"
            )
        if status < 500 and status not in _WORTH_A_RETRY:
            return _Failed(Failure(f"status {status}", self._safe(message), lasting=True), message=message)
        wait = min(_retry_after(error.response.headers.get("retry-after")), self.settings.timeout)
        if status == 429 and wait:
            self._resume_at = max(self._resume_at, time.monotonic() + wait)
        return self._failed(f"status {status}", message, wait)

    def _failed(self, reason: str, detail: str, wait: float = 0.0) -> _Failed:
        return _Failed(Failure(reason, self._safe(detail), lasting=False), wait)

    def _safe(self, text: str) -> str:
        """Returns foreign text as one line without the key, cut to a readable length."""
        if self._key != "none":
            text = text.replace(self._key, "***")
        line = terminal(public_text(" ".join(text.split())))
        return line if len(line) <= _MOST_OF_A_MESSAGE else line[:_MOST_OF_A_MESSAGE] + "..."

    async def _only_model(self) -> str:
        """Returns the name of the only model that the server lists."""
        names = await self.ask(
            Request("models", {}), lambda reply: [terminal(str(model["id"])) for model in reply["data"]]
        )
        if isinstance(names, Failure):
            raise ConnectionError(f"{self.settings.shown} does not list its models: {names.reason}: {names.detail}")
        if len(names) == 1:
            return names[0]
        found = figure(len(names), "model") + (f": {listed(names, 10)}" if names else "")
        raise ValueError(f"{self.settings.shown} lists {found}; name the model to ask")


class _Failed(NamedTuple):
    """An attempt that failed.

    Attributes:
      wait: seconds that the server asks to wait before the next attempt; 0: it names no time.
      message: the whole of what the server said about a request that it refused.
    """

    failure: Failure
    wait: float = 0.0
    message: str = ""


def import_openai() -> Any:
    """Imports the client library.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ValueError(
            "asking a server needs the openai package; install it with `pip install 'jdpo[endpoint]'`"
        ) from error
    return openai


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UnreadableReplyError(f"not JSON: {text[:100]!r}") from None
    if not isinstance(value, dict):
        raise UnreadableReplyError(f"expected a JSON object, found {text[:100]!r}")
    return value


def _message_of(error: Any) -> str:
    """Returns a server's own words about an error."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or error.response.text or error)


def _retry_after(header: str | None) -> float:
    """Returns the seconds that a Retry-After header asks for, as a number or a date; 0 without one.

    >>> _retry_after("2"), _retry_after("0.5"), _retry_after(None), _retry_after("soon")
    (2.0, 0.5, 0.0, 0.0)
    """
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
