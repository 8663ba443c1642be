"""Requests to an OpenAI-compatible server: bounded concurrency, retries, and failures that are counted, never lost.

What a server does not take, such as `logprobs`, is left out if it is optional and named in `not_taken`. Sampling is
never left out: a server that refuses it refuses the request.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from jdpo.config.addresses import public_text
from jdpo.generation.servers.responses import UnreadableReplyError, error_message, json_object, retry_after
from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.safe_text import terminal
from jdpo.words import figure, listed

T = TypeVar("T")
Path = Literal["chat/completions", "completions", "models"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WORTH_A_RETRY = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed later."""

_LONGEST_BACKOFF_SECONDS = 60.0
_FEWEST_FAILURES = 8
"""Failures in a row, however low the concurrency, after which a server may count as gone."""
_MOST_OF_A_MESSAGE = 300
"""Characters of a server's error message that are shown."""


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
      detail: the server's own words.
      lasting: whether the server refused this request, so that sending it again would not help.
    """

    reason: str
    detail: str
    lasting: bool


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
        self._begun: set[asyncio.Task[Any]] = set()
        self._slots = asyncio.Semaphore(settings.concurrency)
        # Some servers know only max_tokens, and some refuse it.
        self._max_tokens_key = "max_tokens"
        # Of the clock; a server that is asked too often names it for all requests.
        self._resume_at = 0.0
        self._failed_in_a_row = 0
        self._has_succeeded = False

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
        # Not `asyncio.all_tasks()`: tasks inside of these are the HTTP library's to end.
        pending = [task for task in self._begun if not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await self._openai.close()

    def run(self, task: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine, and tasks that earlier ones have begun, until the coroutine returns.

        Raises:
          ValueError: the server refuses everything, such as an unknown key or model.
          ConnectionError: the server has stopped responding.
        """
        return self._runner.run(task)

    def begin(self, task: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins a coroutine that calls `ask`, inside of one that runs; it is cancelled when the context ends."""
        begun = asyncio.ensure_future(task)
        self._begun.add(begun)
        begun.add_done_callback(self._begun.discard)
        return begun

    def ask_all(self, requests: Iterable[Request], read: Callable[[dict[str, Any]], T]) -> list[T | Failure]:
        """Sends requests, as `ask` does each; returns what became of them in their order."""

        async def gathered() -> list[T | Failure]:
            return await asyncio.gather(*(self.begin(self.ask(request, read)) for request in requests))

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
                max_tokens_key = self._max_tokens_key
                outcome = await self._attempt(request, left_out | self.not_taken, read)
            if not isinstance(outcome, _Failed):
                self.not_taken |= left_out
                self._failed_in_a_row = 0
                # A list of models says nothing about requests for answers.
                self._has_succeeded = self._has_succeeded or request.path != "models"
                return outcome
            failure = outcome.failure
            if failure.lasting and max_tokens_key == "max_tokens" and "max_completion_tokens" in outcome.message:
                self._max_tokens_key = "max_completion_tokens"
                continue
            if failure.lasting and (key := self._may_leave_out(outcome.message, request, left_out)):
                left_out.add(key)
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
        """Ends the command if the server is gone, or takes nothing: else 100,000 prompts would be tried in vain."""
        self._failed_in_a_row += 1
        if failure.lasting:
            # Once a request has succeeded, a refusal is about the prompt, and many long ones may follow each other.
            ends = not self._has_succeeded and self._failed_in_a_row >= 2 * self.settings.concurrency
        else:
            # Everything in flight has failed with all its retries.
            ends = self._failed_in_a_row >= self.settings.concurrency
        if ends and self._failed_in_a_row >= _FEWEST_FAILURES:
            text = (
                f"{self.settings.shown}: the last {figure(self._failed_in_a_row, 'request')} failed; the last of them: "
                f"{failure.reason}: {failure.detail}"
            )
            raise ValueError(text) if failure.lasting else ConnectionError(text)

    def _may_leave_out(self, message: str, request: Request, left_out: set[str]) -> str | None:
        """Returns an optional key of a refused request that the next attempt may leave out.

        Args:
          message: the server's.
          left_out: keys that this attempt has left out.
        """
        left = [key for key in request.optional if key in request.body and key not in left_out | self.not_taken]
        named = [key for key in left if re.search(rf"\b{key}\b", message)]
        # Without a name the prompt itself may be at fault, so what is left out counts only once the request succeeds.
        return next(iter([*named, *left]), None)

    async def _attempt(self, request: Request, left_out: set[str], read: Callable[[dict[str, Any]], T]) -> T | _Failed:
        openai = import_openai()
        try:
            # The client's own timeout starts again with each byte that arrives.
            async with asyncio.timeout(self.settings.timeout):
                text = await self._send(request, left_out)
            return read(json_object(text))
        except (openai.APITimeoutError, TimeoutError):
            return self._failed("timeout", f"no reply within {self.settings.timeout:g} seconds")
        except openai.APIStatusError as error:
            return self._of_status(error)
        except openai.APIConnectionError as error:
            return self._failed("no connection", str(error.__cause__ or error))
        except UnreadableReplyError as error:
            return self._failed("unreadable reply", str(error))
        except KeyError as error:
            return self._failed("unreadable reply", f"it lacks {error}")
        except (LookupError, TypeError, AttributeError) as error:
            return self._failed("unreadable reply", f"a part of it has another type or length than it should: {error}")

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
        message = error_message(error)
        shown = f"status {status}: {self._safe(message)}"
        if self._has_succeeded and status in (401, 404, 405):
            # The key, the address and the model were right, and may be again.
            return self._failed(f"status {status}", message)
        if status in (401, 403) and not self._has_succeeded:
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
        wait = min(retry_after(error.response.headers.get("retry-after")), self.settings.timeout)
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
      message: all of the server's words about a request that it refused.
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
