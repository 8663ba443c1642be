"""An OpenAI-compatible server on this machine, which answers and fails as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Raw(NamedTuple):
    """A response that is sent as it is.

    Attributes:
      body: text, or an object that is sent as JSON.
      retry_after: the header of this name.
    """

    status: int
    body: Any = ""
    retry_after: str | None = None


DROP = "drop the connection"
HANG = "do not respond until the server closes"


class Fault(NamedTuple):
    """Something other than a response: DROP or HANG."""

    kind: str


Reply = str | list[str] | dict[str, Any] | Raw | Fault
"""The text of an answer, the texts of several choices, a choice with further fields, or something else entirely."""


@dataclass
class ChatServer:
    """Orders of a test to the server, and the requests that it has seen.

    Attributes:
      reply: is called with the body of each request for an answer, in one thread per request. The body has a key `path`
        as well, "/v1/chat/completions" or "/v1/completions".
      url: the address, which ends in /v1.
      models: names that /v1/models lists.
      requests: the bodies, in the order in which they came.
      headers: the headers of each request, by lower-case name.
    """

    reply: Callable[[dict[str, Any]], Reply]
    url: str = ""
    models: list[str] = field(default_factory=lambda: ["toy"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    memory: ChatServer
    protocol_version = "HTTP/1.1"
    # Headers and body are sent one after the other; otherwise the body waits for 40 ms.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(Raw(200, {"object": "list", "data": [{"id": name} for name in self.memory.models]}))
        else:
            self._send(Raw(404, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["path"] = self.path
        self.memory.requests.append(body)
        self.memory.headers.append({name.lower(): value for name, value in self.headers.items()})
        reply = self.memory.reply(body)
        if isinstance(reply, Fault):
            if reply.kind == HANG:
                self.memory.closed.wait()
            self.close_connection = True
        elif isinstance(reply, Raw):
            self._send(reply)
        else:
            choices = reply if isinstance(reply, list) else [reply]
            chat = self.path.endswith("/chat/completions")
            listed = [_choice(choice, index, chat) for index, choice in enumerate(choices)]
            self._send(Raw(200, {"object": "chat.completion", "model": body["model"], "choices": listed}))

    def _send(self, reply: Raw) -> None:
        text = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if reply.retry_after is not None:
            self.send_header("Retry-After", reply.retry_after)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output free of requests."""


def _choice(reply: str | dict[str, Any], index: int, chat: bool) -> dict[str, Any]:
    if isinstance(reply, dict):
        return {"index": index, "finish_reason": "stop", **reply}
    text = {"message": {"role": "assistant", "content": reply}} if chat else {"text": reply}
    return {"index": index, "finish_reason": "stop", **text}


class _Server(ThreadingHTTPServer):
    # The default of 5 refuses some of 32 connections that are opened at once.
    request_queue_size = 128

    def handle_error(self, *arguments: object) -> None:
        """Says nothing about clients that have gone away."""


@contextlib.contextmanager
def serving_chat(reply: Callable[[dict[str, Any]], Reply] | Reply, port: int = 0) -> Iterator[ChatServer]:
    """A server that answers while the block runs, with `reply(request)` or always with `reply`; port 0 is any."""
    memory = ChatServer(reply if callable(reply) else lambda request: reply)
    handler = type("Handler", (_Handler,), {"memory": memory})
    with _Server(("127.0.0.1", port), handler) as server:
        # A short poll interval, because each test waits for it when it ends.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        memory.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield memory
        finally:
            memory.closed.set()
            server.shutdown()


def compared_answers(request: dict[str, Any]) -> tuple[str, str]:
    """Returns the two answers in a judge's request, in the order in which it shows them."""
    found = re.search(
        r"\n<first_answer (\w+)>\n(.*)\n</first_answer \1>\n\n<second_answer \1>\n(.*)\n</second_answer \1>",
        request["messages"][-1]["content"],
        re.DOTALL,
    )
    assert found, "no judge's request"
    return found[2], found[3]


def verdict(winner: str) -> str:
    """Returns the text of a judge's reply; winner is "first", "second" or "tie"."""
    return json.dumps({"winner": winner})


def prefers_first(request: dict[str, Any]) -> str:
    """Judges by position alone."""
    return verdict("first")


def prefers_long(request: dict[str, Any]) -> str:
    """Judges by length alone."""
    first, second = compared_answers(request)
    return verdict("tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second")
